"""What an installed package holds."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ccl_timm
from ccl_timm import registry
from ccl_timm.heads import Head
from ccl_timm.losses import Loss
from ccl_timm.training import recipes

ROOT = Path(__file__).resolve().parent.parent


def test_our_losses_and_heads_are_found_by_their_entry_points():
    assert registry.our_names('loss') and registry.our_names('head') and not registry.our_names('model')
    assert all(issubclass(registry.load('loss', name), Loss) for name in registry.our_names('loss'))
    assert all(issubclass(registry.load('head', name), Head) for name in registry.our_names('head'))


def test_a_missing_installation_is_one_sentence(monkeypatch):
    installed = list(importlib.metadata.distributions())
    others = [dist for dist in installed if dist.metadata['Name'] != 'ccl-timm']
    monkeypatch.setattr(importlib.metadata, 'distributions', lambda: others)
    registry.refresh()
    try:
        with pytest.raises(ImportError, match='on the path but not installed: run `pip install -e .`'):
            registry.names('loss')
    finally:
        monkeypatch.undo()
        registry.refresh()


def test_a_checkout_finds_its_recipes():
    assert recipes.recipe_folder() == ROOT / 'recipes'
    assert 'digits' in recipes.list_recipes()
    assert (registry.resource_dir('hub_cards') / 'template.md').is_file()


def test_version_is_written_once():
    assert f'version = "{ccl_timm.__version__}"' in (ROOT / 'pyproject.toml').read_text()


def test_public_names_are_there():
    assert all(hasattr(ccl_timm, name) for name in ccl_timm.__all__)


@pytest.mark.slow
def test_wheel_holds_recipes_and_runs_them(tmp_path):
    subprocess.run([sys.executable, '-m', 'build', '--outdir', tmp_path, ROOT], check=True, capture_output=True)
    wheel = next(tmp_path.glob('*.whl'))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / 'installed')
    assert {
        'ccl_timm/_recipes/digits.yaml',
        'ccl_timm/_hub_cards/template.md',
        'ccl_timm/experiments/report.html',
    } <= set(names)
    assert any(name.startswith('ccl_timm/plugin_template/') for name in names)
    code = 'import ccl_timm.cli; raise SystemExit(ccl_timm.cli.timm())'
    argv = ['train.py', '--model', 'resnet18_cam', '--loss', 'cc', '--epochs', '1']
    environment = {'PYTHONPATH': str(tmp_path / 'installed'), 'PATH': '', 'HOME': str(tmp_path)}
    result = subprocess.run(
        [sys.executable, '-c', code, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert 'recipe digits' in result.stderr
