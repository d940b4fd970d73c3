"""Losses of pytorch-metric-learning by name: each trains, is saved, gathers over processes, and is explained."""

import copy
import importlib.util
import os
import pickle
import re
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ccl_timm
from ccl_timm.losses import create_loss, cross_entropy, list_pml_losses, loss_class
from ccl_timm.testing import LOSS_CHECKS, check_loss
from ccl_timm.training.checkpoint_files import read_checkpoint
from ccl_timm.training.trainer import Trainer

from ..conftest import TINY, results

INSTALLED = importlib.util.find_spec('pytorch_metric_learning') is not None
needs_pml = pytest.mark.skipif(not INSTALLED, reason='needs pytorch-metric-learning')
NAMES = list_pml_losses() if INSTALLED else ['pml:SupConLoss']
WELL_KNOWN = ['pml:ProxyAnchorLoss', 'pml:SupConLoss', 'pml:SubCenterArcFaceLoss', 'pml:MultiSimilarityLoss']
REQUIRED = {'pml:RankedListLoss': {'margin': 0.4, 'Tn': 1.0}}  # options without a default
MINER = {'miner': 'MultiSimilarityMiner(epsilon=0.2)'}
TARGET = torch.arange(16) % 4


def make_task(name, head='linear', **options):
    torch.manual_seed(0)
    model = ccl_timm.create_model(f'test_resnet_{head}', num_classes=4)
    return ccl_timm.create_task(model, name, **REQUIRED.get(name, {}), **options)


def make_outputs(seed=0, dtype=torch.float32):
    drawn = torch.Generator().manual_seed(seed)
    features = torch.randn(16, 6, generator=drawn, dtype=dtype)
    return SimpleNamespace(features=features, logits=torch.randn(16, 4, generator=drawn, dtype=dtype))


@needs_pml
@pytest.mark.parametrize(
    'name', [name if name in WELL_KNOWN else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_each_loss_trains_on_a_model_and_its_state_is_saved(name):
    task = make_task(name)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    images = torch.randn(16, 3, 32, 32)
    task.train()
    before = {key: parameter.clone() for key, parameter in task.loss.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        task(images, TARGET)['loss'].backward()
        assert all(parameter.grad is not None for parameter in task.parameters())
        optimizer.step()
    assert not any(torch.equal(before[key], parameter) for key, parameter in task.loss.named_parameters())
    other = make_task(name)
    other.load_task_state(pickle.loads(pickle.dumps(task.get_task_state())))
    copies = (other.loss, copy.deepcopy(task.loss), pickle.loads(pickle.dumps(task.loss)))
    for loss in copies:
        assert all(torch.equal(value, loss.state_dict()[key]) for key, value in task.loss.state_dict().items())


@needs_pml
def test_proxies_keep_the_precision_of_the_model():
    task = make_task('pml:ProxyAnchorLoss').to(torch.bfloat16)
    task.train()(torch.randn(16, 3, 32, 32, dtype=torch.bfloat16), TARGET)['loss'].backward()
    assert task.loss.metric.proxies.dtype == task.loss.metric.proxies.grad.dtype == torch.bfloat16


@needs_pml
@pytest.mark.parametrize('head', ['cam', 'mc', 'pedcc'])
def test_on_every_head(head):
    task = make_task('pml:SupConLoss', head)
    result = task(torch.randn(16, 3, 64, 64), TARGET)
    assert result['loss'].isfinite() and result['metric'] > 0
    assert torch.allclose(result['loss'], result['ce'] + result['metric'])


@needs_pml
@pytest.mark.parametrize('check', LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('name', WELL_KNOWN[:2])  # one with parameters, one without
def test_check(name, check):
    check_loss(name, checks=[check])


@needs_pml
def test_is_the_package_own_loss_beside_cross_entropy():
    from pytorch_metric_learning import distances, losses, miners

    outputs = make_outputs()
    ours = create_loss('pml:MultiSimilarityLoss', alpha=3, weight=0.5, ce_weight=2.0, smoothing=0.1, **MINER)
    pairs = miners.MultiSimilarityMiner(epsilon=0.2)(outputs.features, TARGET)
    metric = losses.MultiSimilarityLoss(alpha=3)(outputs.features, TARGET, pairs)
    expected = 2 * cross_entropy(outputs.logits, TARGET, 0.1) + 0.5 * metric
    assert torch.allclose(ours(outputs, TARGET), expected)
    assert not torch.allclose(metric, losses.MultiSimilarityLoss(alpha=3)(outputs.features, TARGET))

    ours = create_loss('pml:ContrastiveLoss', distance='LpDistance(p=1, normalize_embeddings=False)')
    metric = losses.ContrastiveLoss(distance=distances.LpDistance(p=1, normalize_embeddings=False))
    expected = cross_entropy(outputs.logits, TARGET) + metric(outputs.features, TARGET)
    assert torch.allclose(ours(outputs, TARGET), expected)


DISTRIBUTED = [
    ('pml:ProxyAnchorLoss', {'num_classes': 4, 'num_features': 6}),
    ('pml:SupConLoss', {}),
    ('pml:SubCenterArcFaceLoss', {'num_classes': 4, 'num_features': 6}),
    ('pml:MultiSimilarityLoss', MINER),
]


class Scaled(nn.Module):
    """Features times a learnt factor, then the loss: something to distribute, with no model."""

    def __init__(self, name, options):
        super().__init__()
        torch.manual_seed(0)
        self.loss = create_loss(name, **options).double()
        self.factor = nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.layer = nn.Linear(6, 4).double()

    def forward(self, rows):
        features = make_outputs(dtype=torch.float64).features[rows] * self.factor
        return self.loss(SimpleNamespace(features=features, logits=self.layer(features)), TARGET[rows])


def gradients(module, rows):
    module(rows).backward()
    return {key.removeprefix('module.'): parameter.grad for key, parameter in module.named_parameters()}


def process(rank, folder):
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = []
    for case in DISTRIBUTED:
        module = nn.parallel.DistributedDataParallel(Scaled(*case))
        found.append(gradients(module, slice(8 * rank, 8 * rank + 8)))
    torch.save(found, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@needs_pml
def test_two_processes_with_half_a_batch_each_are_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for case, *found in zip(DISTRIBUTED, *(torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)), strict=True):
        expected = gradients(Scaled(*case), slice(0, 16))
        assert expected.keys() == found[0].keys()
        for key, gradient in expected.items():
            for its in found:
                torch.testing.assert_close(its[key], gradient, rtol=1e-9, atol=1e-12, msg=f'{case[0]}: {key}')


@needs_pml
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(run_cli, folder, workdir, monkeypatch):
    argv = ['timm', 'train.py', *TINY, '--data-dir', folder, '--loss', 'pml:ProxyAnchorLoss', '--lr', '0.05']
    argv += ['--loss-kwargs', 'alpha=16', 'miner=MultiSimilarityMiner(epsilon=0.2)', '--sched', 'none']
    argv += ['--epochs', '2', '--experiment']
    assert run_cli(*argv, 'whole')[0] == 0
    train_epoch = Trainer.train_epoch

    def dies(trainer, epoch):
        return train_epoch(trainer, epoch) if epoch == 0 else sys.exit(1)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'train_epoch', dies)
        assert run_cli(*argv, 'cut')[0] == 1
    code, out, err = run_cli(*argv, 'cut', '--resume', 'auto')
    assert code == 0, err
    assert 'alpha=16' in err and {'ce', 'metric'} <= results(out)[-1]['train'].keys()
    whole, cut = (read_checkpoint(Path('output/train', name, 'last.pth.tar')) for name in ('whole', 'cut'))
    assert all(torch.equal(value, cut['state_dict'][key]) for key, value in whole['state_dict'].items())
    proxies = [checkpoint['task_state']['loss']['metric.proxies'] for checkpoint in (whole, cut)]
    assert torch.equal(*proxies)


@pytest.mark.slow
@needs_pml
def test_is_compared(run_cli, workdir):
    argv = ['compare', '--config', 'digits', '--backbone', 'test_resnet', '--losses', 'pml:SupConLoss', '--trials', '1']
    argv += ['--seeds', '1', '--epochs', '1', '--jobs', '1', '--', '--img-size', '16', '--train-fraction', '0.2']
    code, out, err = run_cli('ccl-timm', *argv)
    assert code == 0, err
    assert re.search(r'pml:SupConLoss +linear +\d', out) and re.search(
        r'pml:SupConLoss +linear .*weight=1 smoothing=0', out
    )


@needs_pml
def test_is_listed(run_cli):
    code, out, err = run_cli('ccl-timm', 'losses', '--pml')
    assert code == 0 and all(name in out for name in NAMES)
    code, out, err = run_cli('ccl-timm', 'losses', 'pml:ProxyAnchorLoss')
    assert code == 0 and 'margin=0.1' in out and 'miner: ' in out


@needs_pml
@pytest.mark.parametrize(
    'name, options, message',
    [
        ('ProxyAnchor', {}, "Unknown loss 'pml:ProxyAnchor'; did you mean 'pml:ProxyAnchorLoss'?"),
        ('VICRegLoss', {}, "Unknown loss 'pml:VICRegLoss'"),
        ('SupConLoss', {'temprature': 1}, "has no option 'temprature'; did you mean 'temperature'?"),
        ('SupConLoss', {'weight': -1}, 'weight must not be negative'),
        ('SupConLoss', {'miner': 'MultiMiner'}, "no miner 'MultiMiner'; did you mean"),
        ('SupConLoss', {'miner': 'AngularMiner(20)'}, "miner must be NAME or 'NAME(option=value, ...)', not"),
        ('SupConLoss', {'miner': 'AngularMiner(degrees=20)'}, "AngularMiner has no option 'degrees'; its options"),
        ('SupConLoss', {'distance': 'open("x")'}, "distance must be NAME or 'NAME(option=value, ...)', not"),
        ('CircleLoss', {'distance': 'LpDistance'}, 'CircleLoss refuses'),
    ],
)
def test_mistakes_are_one_sentence(name, options, message):
    with pytest.raises(ccl_timm.UserError) as caught:
        create_loss(f'pml:{name}', **options)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_a_misspelt_option_of_its_class_is_refused():
    with pytest.raises(ccl_timm.UserError, match="SupConLoss has no option 'temprature'"):
        loss_class('pml:SupConLoss')(temprature=1)


def test_without_the_package_the_error_has_the_remedy(run_cli, monkeypatch):
    for module in [name for name in sys.modules if name.startswith('pytorch_metric_learning.')]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning', None)
    with pytest.raises(ccl_timm.UserError, match=r"not installed: `pip install 'ccl-timm\[pml\]'`"):
        loss_class('pml:SupConLoss')
    code, _, err = run_cli('timm', 'train.py', '--loss', 'pml:SupConLoss')
    assert code == 2 and 'pytorch-metric-learning, which is not installed' in err
