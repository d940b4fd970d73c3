"""Every recipe and row of the papers' tables: checked by shapes, run for some steps, taken by timm's own script."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ccl_timm import UserError, create_model, losses
from ccl_timm.cli import launch
from ccl_timm.data import datasets, loaders
from ccl_timm.experiments import estimate, tables
from ccl_timm.training import checks, recipes
from ccl_timm.training.config import TrainConfig

# of the same family, for what takes long on a laptop
SMALLER = {'resnet50': 'resnet18', 'vit_base_patch16_224': 'test_vit'}
TINY_SWIN = {'embed_dim': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1)}


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    """Three classes of two images to train on, one to validate on."""
    root, random = tmp_path_factory.mktemp('few'), np.random.default_rng(0)
    for part, count in (('train', 2), ('validation', 1)):
        for name in 'abc':
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 255, (70, 90, 3), np.uint8)).save(root / part / name / f'{i}.png')
    return root


def check(argv):
    args = TrainConfig.resolve(list(argv))
    checks.check_config(args)
    checks.check_fit(args)
    return args


@pytest.mark.parametrize('name', recipes.list_recipes())
def test_recipe_is_whole(name):
    text = recipes.find_recipe(name).read_text()
    header = text[: text.index('device_modules')]
    assert all(re.search(f'(?m)^# {word}  ', header) for word in ('command', 'paper', 'measured', 'hardware'))
    recipe = yaml.safe_load(text)
    assert recipe['device_modules'] == ['ccl_timm.autoload']
    assert recipe['smoothing'] == (0.2 if name == 'fast_cifar10' else 0.0)  # timm's default is 0.1
    assert recipe['assumed'] and all(isinstance(line, str) for line in recipe['assumed'])
    assert ('img_size' in recipe) != ('input_size' in recipe) and 'crop_pct' in recipe
    for loss, kwargs in recipe.get('loss_options', {}).items():
        assert not kwargs.keys() - losses.loss_options(loss).keys()


def distinct_rows():
    """Rows that differ in more than data and what only training shows."""
    rows = {}
    for name in tables.list_tables():
        for row in tables.read_table(name).rows:
            args = TrainConfig.resolve(list(row.args))
            key = (args.model, args.loss, str(args.model_kwargs))
            rows.setdefault(key, (name, row))
    return [pytest.param(row, id=f'{name}-{row.dataset}-{row.name}') for name, row in rows.values()]


@pytest.mark.parametrize('row', distinct_rows())
def test_row_fits(row):
    check(row.args)


@pytest.mark.slow
@pytest.mark.parametrize('name', tables.list_tables())
def test_whole_table_passes_a_dry_run(name, run_cli):
    code, out, err = run_cli('ccl-timm', 'reproduce', name, '--dry-run', '--seeds', '1')
    assert code == 0, err
    assert len(out.splitlines()) == len(tables.read_table(name).rows)


# one of each kind; the others differ from them in settings that test_row_fits checks
QUICK = ('cc_mnist', 'digits', 'finetune', 'pod_cifar10', 'probe')


@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in recipes.list_recipes()],
)
def test_recipe_takes_steps(name, whole, few_images, tmp_path, workdir):
    argv = ['--config', name, '--num-classes', '3', '-b', '3', '-j', '0', '--epochs', '1']
    if name != 'digits':
        argv += ['--dataset', 'folder', '--data-dir', str(few_images)]
    config = TrainConfig.resolve(argv if name != 'digits' else [*argv, '--num-classes', '10'])
    config = replace(config, pretrained=False)
    if not whole:
        for large, small in SMALLER.items():
            config = replace(config, model=config.model.replace(large, small))
        config = replace(config, model_kwargs={**config.model_kwargs, **(TINY_SWIN if 'swin' in config.model else {})})
    cost = estimate.time_run(config, tmp_path / 'run')
    assert cost.epochs == 1 and cost.training > 0 and cost.validation > 0
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', [name for name in recipes.list_recipes() if name not in ('digits', 'probe')])
def test_recipe_goes_through_the_launcher(name, tmp_path):
    own, rest = launch._split_args(['-c', name], tmp_path)
    passed = yaml.safe_load((tmp_path / 'recipe.yaml').read_text())
    assert own.loss == recipes.read_recipe(recipes.find_recipe(name))['loss'] and 'loss' not in passed
    scripts = os.environ.get('TIMM_SCRIPTS')
    if scripts:
        flags = set(re.findall(r"'--([a-z0-9-]+)'", (Path(scripts) / 'train.py').read_text()))
        assert {key.replace('_', '-') for key in passed} <= flags


def test_timms_own_script_is_not_given_a_frozen_backbone(tmp_path):
    """It would train all of it, and args.yaml would say otherwise."""
    with pytest.raises(UserError, match="Recipe probe: 'freeze_backbone' works in the built-in script only"):
        launch._split_args(['-c', 'probe'], tmp_path)


@pytest.mark.parametrize(
    'recipe, loss, classes, expected',
    [
        ('pod_cifar10', 'arcface', None, {'scale': 16, 'margin': 0.3}),
        ('pod_imagenet', 'cm', None, {'scale': 24, 'm2': 0.2, 'm3': 0.1}),
        ('finetune', 'amsoftmax', '1000', {'scale': 32, 'margin': 0.35}),
        ('finetune', 'pod', None, {'alpha': 0.033}),
        ('digits', 'ce', None, {}),
    ],
)
def test_margins_follow_the_number_of_classes(recipe, loss, classes, expected, tmp_path):
    argv = ['--config', recipe, '--loss', loss, *(['--num-classes', classes] if classes else [])]
    assert TrainConfig.resolve(argv).loss_kwargs == expected
    if recipe != 'digits':  # a data set that only the built-in script has
        assert (launch._split_args(argv, tmp_path)[0].loss_kwargs or {}) == expected


def test_number_of_classes_for_margins_is_a_number(tmp_path):
    (tmp_path / 'bad.yaml').write_text('loss: arcface\nmargin_classes: many\n')
    with pytest.raises(UserError, match="margin_classes is a number of classes, such as 196, not 'many'"):
        TrainConfig.resolve(['--config', str(tmp_path / 'bad.yaml')])


def test_model_options_go_with_the_model_that_is_typed(tmp_path):
    resolved = TrainConfig.resolve(['--config', 'pod_cifar10'])
    assert resolved.model_kwargs == {'small_input': True, 'feature_dim': 256}
    assert TrainConfig.resolve(['--config', 'pod_cifar10', '--model', 'resnet50_linear']).model_kwargs == {
        'small_input': True
    }
    assert launch._split_args(['-c', 'cc_mnist', '--model', 'vgg16_cam'], tmp_path)[1][:1] == ['--config']
    assert yaml.safe_load((tmp_path / 'recipe.yaml').read_text())['model_kwargs'] == {'small_input': True}
    (tmp_path / 'bad.yaml').write_text('model_options: {resnet18_cam: 3}\n')
    with pytest.raises(UserError, match="model_options are a mapping of names to options: {'\\*_pedcc'"):
        TrainConfig.resolve(['--config', str(tmp_path / 'bad.yaml')])


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--model', 'resnet18_linear', '--loss', 'cc'], 'requires attention; resnet18_linear has .* use resnet18_cam'),
        (['--model', 'resnet18_mc', '--loss', 'mc', '--img-size', '8'], 'the feature map .* has one only'),
        (['--model', 'vgg16_cosine', '--loss', 'arcface', '--img-size', '24'], 'on images of 3x24x24: .* too small'),
    ],
)
def test_what_does_not_fit_is_found_without_work(argv, message):
    with pytest.raises(UserError, match=message):
        check(['--data-dir', 'x', *argv])


def test_figures_are_the_papers():
    """Some figures of each table, copied from the papers once more."""
    expected = {
        ('cc-table1', 'cars196', 'vgg16:mc'): (92.80, None),
        ('cc-table2', 'cifar100', 'vgg16:cc:batch64'): (75.1, 0.14),
        ('cc-table4', 'mnist', 'resnet18:ce-cam'): (97.67, 0.01),
        ('cc-table5', 'cars196', 'vgg16:cc:weight0.5'): (89.53, 0.07),
        ('pod-table2', 'cifar10', 'resnet50:pod:dim9'): (92.71, None),
        ('pod-table4', 'tiny', 'resnet50:cm'): (59.53, None),
        ('pod-table6', 'imagenet500', 'resnet50:pod'): (82.56, None),
        ('pod-table7', 'facescrub', 'mobilenetv2:softmax'): (87.84, None),
        ('pod-table8', 'imagenet1000', 'vit:pod'): (81.20, None),
    }
    for (name, dataset, row), figure in expected.items():
        found = tables.select(tables.read_table(name), dataset, [row]).rows
        assert [r.paper for r in found] == [figure]
    whole = {name: tables.read_table(name).rows for name in tables.list_tables()}
    assert {name: len(rows) for name, rows in whole.items() if any(row.paper for row in rows)} == {
        'cc-table1': 47, 'cc-table2': 10, 'cc-table4': 24, 'cc-table5': 15, 'pod-table2': 7, 'pod-table4': 40,
        'pod-table6': 10, 'pod-table7': 16, 'pod-table8': 20,
    }  # fmt: skip


def test_no_training_from_scratch_without_a_hint(run_cli, few_images, workdir):
    tiny = ['--data-dir', few_images, '--img-size', '32', '--epochs', '1', '-b', '3', '-j', '0']
    tiny += ['--model', 'test_resnet_cam']
    assert 'recipe finetune' in run_cli('timm', 'train.py', *tiny)[2]
    assert 'recipe finetune' not in run_cli('timm', 'train.py', '--config', 'digits', *tiny)[2]


def test_pad_crop_resizes_as_evaluation_does(few_images):
    args = TrainConfig.resolve(['--data-dir', str(few_images)])
    dataset = datasets.create_split(args, 'train', 3, None)
    loader = dict(batch_size=4, is_training=True, device=torch.device('cpu'))
    loaders.create_loader(dataset, input_size=(3, 32, 32), pad_crop=4, **loader)
    assert dataset.transform.transforms[0](Image.new('RGB', (90, 70))).size == (41, 32)


@pytest.mark.parametrize('name', ['cc_mnist', 'cc_cifar100', 'pod_cifar10', 'pod_imagenet'])
def test_papers_recipes_train_with_the_papers_sgd(name):
    """Plain momentum, weight decay of every parameter, and a tenth of the rate after 30, 60 and 90 epochs."""
    args = TrainConfig.resolve(['--config', name, '--data-dir', 'x', '--model', 'test_resnet_cam'])
    model = create_model('test_resnet_cam', num_classes=10)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD and not optimizer.defaults['nesterov']
    assert [group['weight_decay'] for group in optimizer.param_groups] == [args.weight_decay]
    assert sum(map(len, (group['params'] for group in optimizer.param_groups))) == len(list(model.parameters()))
    if args.sched == 'multistep':
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
        rates = []
        for epoch in range(epochs):
            rates.append(optimizer.param_groups[0]['lr'])
            scheduler.step(epoch + 1)
        assert [epoch for epoch in range(1, epochs) if rates[epoch] < rates[epoch - 1]] == [30, 60, 90]
