"""Training on a frozen backbone: the features, where they are kept, and the whole model that comes out."""

import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import ccl_timm
from ccl_timm.data.cache import cache_dir
from ccl_timm.losses import list_losses, loss_class
from ccl_timm.training import frozen
from ccl_timm.training.checkpoint_files import read_checkpoint
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.run_dir import RunDir

from ..conftest import TINY, results, write_folder

FROZEN = ['train.py', *TINY, '--freeze-backbone', '--lr', '0.05', '--mean', '0.4']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of features that only this test knows."""
    monkeypatch.setenv('CCL_TIMM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(frozen, '_loaded', {})
    return tmp_path / 'cache' / 'features'


@pytest.fixture
def fit(run_cli, folder, workdir):
    """Train on features of the small folder: ``fit('--loss', 'ce') -> (code, stdout, stderr)``."""
    return lambda *argv: run_cli('timm', *FROZEN, '--data-dir', folder, *argv)


def backbone(checkpoint):
    return {
        name: value for name, value in read_checkpoint(checkpoint)['state_dict'].items() if not name.startswith('fc.')
    }


@pytest.mark.parametrize('loss', [name for name in list_losses() if 'feature_map' not in loss_class(name).requires])
def test_every_loss_trains_on_features(loss, fit):
    head = loss_class(loss).head or 'linear'
    code, out, err = fit('--model', f'test_resnet_{head}', '--loss', loss)
    assert code == 0, err
    assert results(out)[-1]['validation']['top1'] >= 0


def test_a_transformer_trains_on_features(fit):
    code, _, err = fit('--model', 'test_vit_cosine', '--loss', 'arcface', '--img-size', '64')
    assert code == 0, err


def test_the_result_is_a_whole_model_with_the_backbone_as_it_was(fit, run_cli, folder, workdir):
    code, out, err = fit('--epochs', '3', '--model-ema', '--experiment', 'a')
    assert code == 0, err
    run = workdir / 'output' / 'train' / 'a'
    first, last = (backbone(run / f'checkpoint-{epoch}.pth.tar') for epoch in (0, 2))
    assert all(torch.equal(first[name], last[name]) for name in first) and len(first) > 20
    heads = [read_checkpoint(run / f'checkpoint-{epoch}.pth.tar')['state_dict'] for epoch in (0, 2)]
    assert not torch.equal(heads[0]['fc.out.weight'], heads[1]['fc.out.weight'])

    code, out, err = run_cli('timm', 'validate.py', run / 'last.pth.tar', '-j', '0', '--use-ema')
    assert code == 0, err
    row = RunDir(run).rows()[-1]
    assert results(out)['top1'] == pytest.approx(row['eval_top1'])
    assert results(out)['loss'] == pytest.approx(row['eval_loss'], rel=1e-4)

    code, _, err = run_cli('ccl-timm', 'export', run / 'last.pth.tar', 'exported')
    assert code == 0, err
    (features,) = [f for f in frozen._loaded.values() if len(f['labels']) == 12]
    images = [path for name in ('ant', 'bee', 'cat') for path in sorted((folder / 'validation' / name).iterdir())]
    exported = ccl_timm.load('exported')
    with torch.inference_mode():
        from_features = exported.model.get_classifier()(features['features'])
    assert torch.allclose(exported.outputs(images).logits, from_features, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(fit, workdir):
    argv = ['--feature-views', '2', '--epochs', '3']
    assert fit(*argv, '--experiment', 'whole')[0] == 0
    runs = workdir / 'output' / 'train'
    code, _, err = fit(*argv, '--resume', str(runs / 'whole' / 'checkpoint-1.pth.tar'), '--experiment', 'resumed')
    assert code == 0, err
    whole, resumed = (read_checkpoint(runs / name / 'last.pth.tar')['state_dict'] for name in ('whole', 'resumed'))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    'name, backbone',
    [
        ('resnet18', 'resnet18'),
        ('resnetblur18', 'resnetblur18'),
        ('test_vit', 'test_vit'),
        ('test_vit_cam', 'test_vit'),
    ],
)
def test_the_cache_knows_the_backbone(name, backbone, monkeypatch):
    """The first two have weights of the same names and shapes."""
    monkeypatch.setattr(frozen, 'content_hash', lambda dataset: '')
    config = TrainConfig.resolve(['--model', name])
    model = ccl_timm.create_model(name, num_classes=3)
    facts = frozen._facts(config, model, timm.data.resolve_model_data_config(model), [])
    assert facts['backbone'] == backbone


def test_features_are_read_again_and_computed_anew_where_they_must(fit, cache, monkeypatch):
    assert cache_dir('features') == cache
    _, _, err = fit()
    assert err.count('written to') == 2 and 'read from' not in err
    files = sorted(cache.iterdir())

    monkeypatch.setattr(frozen, '_loaded', {})
    _, _, err = fit('--model', 'test_resnet_cosine', '--loss', 'arcface')  # another head and loss, the same features
    assert err.count('read from') == 2 and sorted(cache.iterdir()) == files

    monkeypatch.setattr(frozen, '_loaded', {})
    files[0].write_bytes(files[0].read_bytes()[:-9])
    _, _, err = fit()
    assert 'is damaged' in err and err.count('read from') == 1 and err.count('written to') == 1

    for other in (['--seed', '7'], ['--mean', '0.5'], ['--img-size', '40'], ['--gp', 'max']):  # a seed: other weights
        _, _, err = fit(*other)
        assert err.count('written to') == 2, other


def test_a_held_out_share_and_all_images_have_the_same_features(fit):
    assert fit()[2].count('written to') == 2
    code, _, err = fit('--val-fraction', '0.25')
    assert code == 0 and 'written to' not in err
    assert '18 to train on, 6 to validate on' in err


def test_views_are_drawn(fit):
    code, _, err = fit('--feature-views', '3')
    assert code == 0 and err.count('written to') == 4, err
    views = torch.stack([found['features'] for found in list(frozen._loaded.values())[:3]])
    drawn = frozen.Features(views, torch.zeros(24)).draw(torch.zeros(100, dtype=torch.int64))
    assert len(drawn.unique(dim=0)) == 3
    assert all(any(torch.equal(row, view[0]) for view in views) for row in drawn)


def test_unreadable_images_are_left_out(run_cli, workdir):
    folder = write_folder(workdir / 'images')
    (folder / 'train' / 'bee' / '0.png').write_bytes(b'no image')
    code, out, err = run_cli('timm', *FROZEN, '--data-dir', folder, '--feature-views', '2')
    assert code == 0, err
    labels = next(iter(frozen._loaded.values()))['labels']
    assert labels.tolist().count(-1) == 1 and len(labels) == 24


def test_a_cache_that_cannot_be_written_stops_no_run(fit, monkeypatch, workdir):
    (workdir / 'file').write_text('')
    monkeypatch.setenv('CCL_TIMM_CACHE', str(workdir / 'file'))
    code, _, err = fit()
    assert code == 0 and 'features are not kept for later runs' in err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--loss', 'mc', '--model', 'test_resnet_mc'], "the loss 'mc' requires the feature map"),
        (['--loss', 'ce', '--model', 'test_resnet_mc'], 'whose head adds a layer to the feature map'),
        (['--loss', 'ce', '--mixup', '0.2'], 'leave out --mixup and --cutmix'),
    ],
)
def test_what_does_not_work_is_one_sentence(argv, message, fit, workdir):
    code, _, err = fit(*argv)
    assert code == 2 and message in err.splitlines()[-1]
    assert not (workdir / 'output').exists()


def test_views_go_with_a_frozen_backbone(run_cli, folder):
    code, _, err = run_cli('timm', 'train.py', *TINY, '--data-dir', folder, '--feature-views', '2')
    assert code == 2 and err.splitlines()[-1] == 'error: --feature-views 2 goes with --freeze-backbone.'


def test_two_processes_compute_the_features_of_one(fit, workdir, folder, cache):
    assert fit()[0] == 0
    one = {path.name: path.read_bytes() for path in cache.iterdir()}
    for path in cache.iterdir():
        path.unlink()
    argv = ['--nproc', '2', *FROZEN, '-b', '4', '--data-dir', str(folder), '--experiment', 'two']
    call = f'import sys; from ccl_timm.cli import timm; sys.exit(timm({argv}))'
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    ran = subprocess.run([sys.executable, '-c', call], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in cache.iterdir()) == sorted(one)
    for path in cache.iterdir():
        expected, found = safetensors.torch.load(one[path.name]), safetensors.torch.load_file(path)
        assert torch.equal(expected['labels'], found['labels'])
        assert torch.allclose(expected['features'], found['features'], atol=1e-5)
