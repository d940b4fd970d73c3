"""A new plugin package: written, renamed, refused where something stands, and really installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccl_timm.cli.new_plugin import scaffold_plugin
from ccl_timm.errors import UserError

FILES = [
    'README.md',
    'pyproject.toml',
    'src/my_loss/__init__.py',
    'src/my_loss/heads.py',
    'src/my_loss/losses.py',
    'src/my_loss/models.py',
    'tests/test_my_loss.py',
]


def test_writes_the_package_under_the_folders_name(tmp_path):
    folder = tmp_path / 'deep' / 'My-Loss'
    assert [path.relative_to(folder).as_posix() for path in scaffold_plugin(folder)] == FILES
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()) == FILES
    texts = {name: (folder / name).read_text() for name in FILES}
    assert not [name for name, text in texts.items() if 'example_plugin' in text or 'example-plugin' in text]
    assert 'name = "my-loss"\n' in texts['pyproject.toml']
    assert 'my_loss_net = "my_loss.models:my_loss_net"\n' in texts['pyproject.toml']
    for name in FILES:
        if name.endswith('.py'):
            compile(texts[name], name, 'exec')


def test_an_empty_folder_and_a_relative_path_will_do(tmp_path, monkeypatch):
    (tmp_path / 'my_loss').mkdir()
    monkeypatch.chdir(tmp_path / 'my_loss')
    assert len(scaffold_plugin('.')) == len(FILES)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / 'note.txt').write_text('mine')
    with pytest.raises(UserError, match='is not empty, and nothing is overwritten; name a new folder'):
        scaffold_plugin(tmp_path)
    with pytest.raises(UserError, match=r'note\.txt is a file|makes no module name'):
        scaffold_plugin(tmp_path / 'note.txt')
    (tmp_path / 'note').write_text('mine')
    with pytest.raises(UserError, match='note is a file; name a new folder'):
        scaffold_plugin(tmp_path / 'note')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['note', 'note.txt']


@pytest.mark.parametrize('name', ['2nd', '_x', 'a__b', 'trailing-', 'größe', 'a+b'])
def test_a_name_that_is_no_module_name(tmp_path, name):
    with pytest.raises(UserError, match='makes no module name; name the folder with letters a-z and digits'):
        scaffold_plugin(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['ccl-timm', 'CCL_timm', 'timm', 'torch', 'class', 'json'])
def test_a_name_that_is_taken(tmp_path, name):
    with pytest.raises(UserError, match='is taken by Python or a package that plugins need; choose another name'):
        scaffold_plugin(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The rendered package, built and installed: its folder, and an environment that finds it beside a broken one."""
    root = tmp_path_factory.mktemp('plugin')
    folder, site = root / 'my-loss', root / 'site'
    scaffold_plugin(folder)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--no-build-isolation']
    subprocess.run([*pip, '--target', str(site), str(folder)], check=True)
    broken = site / 'broken_plugin-1.dist-info'
    broken.mkdir()
    (broken / 'METADATA').write_text('Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1\n')
    (broken / 'entry_points.txt').write_text('[ccl_timm.losses]\nbroken = no_such_module:Loss\n')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(site), str(Path(__file__).parents[2])])}
    env.pop('CCL_TIMM_PLUGINS', None)
    return folder, env


@pytest.mark.slow
def test_an_installed_plugin_trains_beside_a_broken_one(installed, folder, tmp_path):
    _, env = installed
    code = 'import sys; from ccl_timm.cli import timm; sys.exit(timm())'
    argv = ['train.py', '--model', 'my_loss_net', '--loss', 'my_loss_loss', '--data-dir', str(folder), '--epochs', '1']
    argv += ['--img-size', '32', '-b', '8', '-j', '0', '--experiment', 'a']
    command = [sys.executable, '-c', code, *argv]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    information = json.loads((tmp_path / 'output' / 'train' / 'a' / 'environment.json').read_text())
    assert {(plugin['kind'], plugin['name']) for plugin in information['plugins']} == {
        ('model', 'my_loss_net'),
        ('loss', 'my_loss_loss'),
    }
    code = 'import sys; from ccl_timm.cli import main; sys.exit(main())'
    command = [sys.executable, '-c', code, 'plugins', '--check', '--json']
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert {row['name']: row['state'] for row in json.loads(result.stdout)} == {
        'broken': 'broken',
        'my_loss_loss': 'loaded',
        'my_loss_head': 'loaded',
        'my_loss_net': 'loaded',
    }


def test_the_package_is_found_without_import_and_its_own_tests_pass(installed):
    folder, env = installed
    code = (
        'import sys; from ccl_timm import registry\n'
        'for p in registry.find_plugins():\n'
        "    if p.distribution == 'my-loss': print(p.kind, p.name, p.value, p.version, p.error)\n"
        "print('my_loss' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, '-c', code], env=env, check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == [
        'head my_loss_head my_loss.heads:NormalisedHead 0.1.0 None',
        'loss my_loss_loss my_loss.losses:ConfidencePenalty 0.1.0 None',
        'model my_loss_net my_loss.models:my_loss_net 0.1.0 None',
        'False',
    ]
    ran = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider'],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
