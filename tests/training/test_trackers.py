"""Trackers get every number of an epoch, and a tracker that fails stops nothing."""

import sys
from types import SimpleNamespace

import pytest

from ccl_timm.training.trackers import Tracker

SETTINGS = dict(wandb_project=None, wandb_tags=[], wandb_resume_id='', lr=0.1, class_names=['a'])
PARTS = {'train': {'loss': 1.5, 'cc': 0.5}, 'eval': {'top1': 90.0}}


def library(logged, fails_at=None):
    """A stand-in for wandb and trackio, which are called alike."""

    def log(numbers, step):
        if step == fails_at:
            raise ConnectionError('no network')
        logged.append((step, numbers))

    return SimpleNamespace(init=lambda **words: logged.append(words), log=log, finish=lambda: logged.append('finish'))


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_every_number_arrives(name, monkeypatch, tmp_path):
    logged = []
    monkeypatch.setitem(sys.modules, name, library(logged))
    tracker = Tracker(name, tmp_path / 'run', SETTINGS)
    tracker.log(0, PARTS)
    tracker.finish()
    assert logged[0]['name'] == 'run' and logged[0]['config']['lr'] == 0.1
    assert logged[1:] == [(0, {'train/loss': 1.5, 'train/cc': 0.5, 'eval/top1': 90.0}), 'finish']


def test_tensorboard_writes_into_the_run(monkeypatch, tmp_path):
    written, settings = [], []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_text(self, name, text):
            settings.append(text)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append('closed')

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=Writer))
    tracker = Tracker('tensorboard', tmp_path, {**SETTINGS, 'loss_kwargs': {'scale': 16}})
    assert '    loss_kwargs.scale: 16' in settings[0].splitlines()
    tracker.log(3, {'train': {'loss': 1.0}, 'eval': None})
    tracker.finish()
    assert written == [str(tmp_path / 'tensorboard'), ('train/loss', 1.0, 3), 'closed']


@pytest.mark.parametrize('when', ['start', 'later'])
def test_a_failure_is_logged_once(when, monkeypatch, tmp_path, capsys):
    logged = []
    monkeypatch.setitem(sys.modules, 'wandb', library(logged, fails_at=1) if when == 'later' else None)
    tracker = Tracker('wandb', tmp_path, SETTINGS)
    for epoch in range(4):
        tracker.log(epoch, PARTS)
    tracker.finish()
    assert capsys.readouterr().err.count('tracker wandb failed') == 1
    assert 'finish' not in logged and len(logged) == (2 if when == 'later' else 0)


def test_a_run_with_a_tracker(run_cli, folder, workdir, monkeypatch):
    logged = []
    monkeypatch.setattr('ccl_timm.training.checks.importlib.util.find_spec', lambda name: True)
    monkeypatch.setitem(sys.modules, 'wandb', library(logged))
    argv = ['--model', 'test_resnet_cam', '--loss', 'cc', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '2']
    code, out, err = run_cli('timm', 'train.py', *argv, '--data-dir', folder, '--log-wandb')
    assert code == 0, err
    assert {'train/cc', 'train/ce', 'train/lr', 'eval/top1'} <= logged[2][1].keys() and logged[-1] == 'finish'


def test_a_tracker_that_is_not_installed(run_cli, workdir, monkeypatch):
    monkeypatch.setattr('ccl_timm.training.checks.importlib.util.find_spec', lambda name: None)
    code, out, err = run_cli('timm', 'train.py', '--tracker', 'trackio')
    assert code == 2 and '--tracker trackio needs the package trackio: `pip install trackio`' in err
