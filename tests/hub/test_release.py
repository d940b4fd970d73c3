"""Our checkpoints: from a description to a repository of the stand-in Hub, and back by their tag."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml

import ccl_timm
from ccl_timm import models
from ccl_timm.experiments.results import read_record
from ccl_timm.hub import card, release
from ccl_timm.models import builder, checkpoints
from ccl_timm.registry import resource_dir
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.config import TrainConfig, diff_settings

from ..conftest import TINY

NAME = 'test_resnet_cam.cc_bees'


@pytest.fixture
def cards(workdir, folder, monkeypatch):
    """A folder hub_cards/ with one description, in the place of ours, and 'me' in the place of our organisation."""
    described = workdir / 'hub_cards' / NAME
    described.mkdir(parents=True)
    shutil.copy(resource_dir('hub_cards') / 'template.md', described.parent)
    description = {'train': ' '.join([*TINY, '--mean 0.4 --seed 3']), 'top1': 50.0, 'tolerance': 50.0,
                   'license': 'mit', 'baseline': '--model test_resnet_linear --loss ce'}  # fmt: skip
    (described / 'release.yaml').write_text(yaml.safe_dump(description))
    for module in (release, checkpoints, card):
        monkeypatch.setattr(module, 'resource_dir', lambda name: workdir / name)
        monkeypatch.setattr(module, 'ORGANISATION', 'me')
    yield SimpleNamespace(folder=described, run=workdir / 'output' / 'release' / NAME, data=folder)
    monkeypatch.undo()
    register_again()


def register_again():
    """Let timm know the tags of the checkpoints that there are now."""
    checkpoints.checkpoints.cache_clear()
    if hasattr(builder, 'test_resnet_cam'):
        del builder.test_resnet_cam
        timm.models._registry._clear_model_entries('test_resnet_cam')
        del timm.models._registry._model_entrypoints['test_resnet_cam']
    models.register_variant('test_resnet', 'cam')


def change(cards, **values):
    file = cards.folder / 'release.yaml'
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **values}))


def test_release_trains_checks_writes_a_card_and_pushes(run_cli, online, cards):
    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data)
    assert code == 0, err
    assert 'expected, within 50 points' in err and f'/me/{NAME}/commit/' in out
    files = online.files(f'me/{NAME}')
    text = files['README.md'].decode()
    assert 'license: mit' in text and '`test_resnet_linear`, seed 3' in text
    written = cards.run.with_name(f'{NAME}.card')
    assert sorted(path.name for path in written.iterdir()) == ['README.md', 'config.json', 'runs.jsonl']
    assert (written / 'README.md').read_text() == text

    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data)
    assert code == 0 and 'trained already' in err and 'nothing to send' in err

    # with its records among ours, the name is a pretrained tag
    shutil.copy(written / 'config.json', cards.folder)
    register_again()
    assert timm.list_pretrained('test_resnet_cam*') == [NAME]
    images = torch.randn(2, 3, 32, 32)
    expected = load_trained(cards.run).model(images)
    for create in (ccl_timm.create_model, timm.create_model):
        model = create(NAME, pretrained=True).eval()
        assert torch.equal(model(images), expected) and list(model.pretrained_cfg['mean']) == [0.4] * 3
    assert ccl_timm.create_model('test_resnet_cam').num_classes == 1000  # the plain name stays the plain model


def test_a_tag_without_a_repository_says_how_to_make_it(run_cli, online, cards):
    assert run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data, '--dry-run')[0] == 0
    assert not online.requests
    shutil.copy(cards.run.with_name(f'{NAME}.card') / 'config.json', cards.folder)
    register_again()
    with pytest.raises(ccl_timm.errors.UserError, match=f"'{NAME}' is not published yet: `ccl-timm release {NAME} "):
        ccl_timm.create_model(NAME, pretrained=True)


def test_a_run_is_taken_in_the_place_of_training(run_cli, online, cards):
    change(cards, baseline='')
    argv = ['train', *TINY, '--mean', '0.4', '--data-dir', cards.data, '--output', 'runs', '--experiment']
    assert run_cli('ccl-timm', *argv, 'right', '--seed', '3')[0] == 0
    assert run_cli('ccl-timm', *argv, 'wrong', '--seed', '3', '--lr', '0.9')[0] == 0
    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data, '--run', 'runs/wrong')
    assert code == 2 and "'runs/wrong' holds a run of other settings (lr" in err and not online.requests
    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data, '--run', 'nowhere')
    assert code == 2 and err.endswith("'nowhere' has no args.yaml: it is not the folder of a run.\n")
    shutil.copytree('runs/right', 'runs/half')
    summary = Path('runs/half/summary.csv')
    summary.write_text(summary.read_text().splitlines()[0] + '\n')
    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data, '--run', 'runs/half')
    assert code == 2 and "'runs/half' is half-written, 0 of 1 epochs" in err and not online.requests
    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', 'elsewhere', '--run', 'runs/right')
    assert code == 0 and not cards.run.exists()
    assert 'cross-entropy, same recipe | not run' in online.files(f'me/{NAME}')['README.md'].decode()


def test_another_accuracy_than_described_is_not_published(run_cli, online, cards):
    change(cards, top1=200.0, baseline='')
    code, out, err = run_cli('ccl-timm', 'release', NAME, '--data-dir', cards.data)
    assert code == 2 and '200.00 expected, within 50 points: it is not published' in err
    assert not online.requests


def test_release_lists_and_explains(run_cli, cards):
    code, out, err = run_cli('ccl-timm', 'release')
    assert code == 0 and f'{NAME}  50.00 ± 50' in out
    code, out, err = run_cli('ccl-timm', 'release', 'test_resnet_cam.cc_bee')
    assert code == 2 and f"did you mean '{NAME}'?" in err
    change(cards, top2=1)
    code, out, err = run_cli('ccl-timm', 'release', NAME)
    assert code == 2 and 'release.yaml does not describe a checkpoint' in err and 'top2' in err


@pytest.mark.parametrize('name', release.list_releases())
def test_our_descriptions_are_those_of_the_recorded_runs(name):
    described = release.read_release(name)
    own, *baseline = read_record(resource_dir('hub_cards') / name / 'runs.jsonl')
    wanted = described.runs(own.settings['data_dir'], resource_dir('output'))
    for run, args in zip([own, *baseline], wanted.values(), strict=True):
        config = TrainConfig.resolve(args, 'ccl-timm train')
        assert not diff_settings(run.settings, config.settings())
    assert abs(own.best - described.top1) < 0.005 + described.tolerance
