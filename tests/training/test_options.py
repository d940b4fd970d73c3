"""Recipes and flags: what is read, what is checked, which comes first."""

import re
from pathlib import Path

import pytest
import yaml

from ccl_timm import UserError
from ccl_timm.console.arguments import UPSTREAM_ONLY
from ccl_timm.training import recipes
from ccl_timm.training.config import TrainConfig, diff_settings


def write(workdir, text):
    (workdir / 'recipe.yaml').write_text(text)
    return ['--config', 'recipe.yaml']


def test_flags_come_before_the_recipe_and_it_before_defaults(workdir):
    argv = write(workdir, 'epochs: 7\nlr: 1e-3\nbatch_size: 16\ndata_dir: here\n')
    config = TrainConfig.resolve([*argv, '--epochs', '3'])
    assert (config.epochs, config.lr, config.batch_size, config.momentum) == (3, 0.001, 16, 0.9)
    assert [config.source(key) for key in ('epochs', 'lr', 'momentum')] == ['cli', 'recipe.yaml', 'default']


@pytest.mark.parametrize(
    'text, message',
    [
        ('learnign_rate: 1', "unknown key 'learnign_rate'"),
        ('epoch: 1', "unknown key 'epoch'; did you mean 'epochs'?"),
        ('epochs: many', "'epochs: many' does not fit"),
        ('epochs: 1.5', "'1.5' is not a whole number"),
        ('epochs: true', 'it is a number'),
        ('epochs: [1]', 'it is a number'),
        ('epochs: null', 'it needs a value'),
        ('pretrained: "no"', 'it is true or false'),
        ('input_size: [3, 32]', 'it is a list of 3'),
        ('mean: 0.5', 'it is a list'),
        ('model_kwargs: small', 'it is a mapping'),
        ('model: [a]', 'it is text'),
        ('eval_metric: f1', "it is one of 'top1', 'macro_top1', 'top5', 'loss'"),
        ('aug_splits: 3', "'aug_splits: 3' needs timm's own train.py"),
        ('- a\n- b', 'must be a mapping of settings'),
        ('a: [', 'is not YAML'),
        ('loss_options: {arcface: 3}', 'loss_options are a mapping'),
    ],
)
def test_recipes_with_mistakes(text, message, workdir):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig.resolve(write(workdir, text))


def test_upstreams_settings_may_stand_in_a_recipe_if_they_are_off(workdir):
    argv = write(workdir, yaml.safe_dump(UPSTREAM_ONLY))
    config = TrainConfig.resolve(argv)
    assert not set(UPSTREAM_ONLY) & set(config.settings())


def test_options_of_a_loss_go_with_that_loss(workdir):
    argv = write(workdir, 'loss: cc\nloss_kwargs: {weight: 2}\nloss_options: {cc: {eps: 1e-6}, arcface: {scale: 16}}\n')
    assert TrainConfig.resolve(argv).loss_kwargs == {'eps': 1e-6, 'weight': 2}
    assert TrainConfig.resolve([*argv, '--loss', 'arcface']).loss_kwargs == {'scale': 16}
    assert TrainConfig.resolve([*argv, '--loss', 'ce']).loss_kwargs == {}
    assert TrainConfig.resolve([*argv, '--loss-kwargs', 'weight=3']).loss_kwargs == {'weight': 3}


def test_without_data_the_digits_recipe_is_the_base():
    config = TrainConfig.resolve(['--model', 'resnet18_cam'])
    assert (config.config, config.dataset, config.source('dataset')) == ('digits', 'digits', 'digits')
    assert TrainConfig.resolve(['--data-dir', 'x']).config == ''


@pytest.mark.parametrize(('argv', 'precision'), [
    (['--amp', 'auto', 'images'], (True, 'auto')),
    (['images', '--amp', 'auto'], (True, 'auto')),
    (['--amp', 'images'], (True, 'float16')),
    (['--amp', 'auto', 'images', '--amp-dtype', 'bfloat16'], (True, 'bfloat16')),
])  # fmt: skip
def test_amp_takes_the_word_auto_and_leaves_a_folder_alone(argv, precision):
    config = TrainConfig.resolve(argv)
    assert (config.amp, config.amp_dtype) == precision and config.data_dir == 'images'


@pytest.mark.parametrize('name', recipes.list_recipes())
def test_packaged_recipe_is_sound(name):
    config = TrainConfig.resolve(['--config', name, '--data-dir', 'x'])
    content = recipes.read_recipe(recipes.find_recipe(name))
    assert content['device_modules'] == ['ccl_timm.autoload']  # stops a stock script from training something else
    assert content['assumed'] and config.loss
    header = recipes.find_recipe(name).read_text().split('\n\n')[0]
    assert '# command' in header and '# paper' in header


def test_recipe_by_name_by_path_and_unknown(workdir):
    assert recipes.find_recipe('digits').name == 'digits.yaml'
    assert recipes.find_recipe(str(recipes.find_recipe('digits'))) == recipes.find_recipe('digits')
    with pytest.raises(UserError, match="No recipe 'digit'.*did you mean 'digits'"):
        recipes.find_recipe('digit')


def test_defaults_are_timms():
    """Against timm's own script, where TIMM_SCRIPTS names its folder."""
    import importlib.util
    import os

    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip('TIMM_SCRIPTS names no folder')
    spec = importlib.util.spec_from_file_location('upstream', Path(folder) / 'train.py')
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    theirs = {action.dest: action.default for action in upstream.parser._actions if action.dest != 'help'}
    own = TrainConfig.defaults()
    different = {key: (value, own[key]) for key, value in theirs.items() if key in own and own[key] != value}
    assert different == {'device': ('cuda', 'auto')}
    assert {key: theirs[key] for key in theirs if key not in own} == UPSTREAM_ONLY
    assert {key for key in own if key not in theirs} - {'config'} == set(TrainConfig.names(own=True))


def test_flags_come_before_the_recipe_under_another_name(workdir):
    argv = write(workdir, 'dataset: digits\nlr: 0.05\ninput_size: [1, 32, 32]\n')
    config = TrainConfig.resolve([*argv, '--data-dir', 'mine', '--lr-base', '0.3', '--img-size', '64'])
    assert (config.dataset, config.data_dir, config.lr, config.lr_base) == ('', 'mine', None, 0.3)
    assert (config.input_size, config.in_chans, config.img_size) == (None, 1, 64)
    config = TrainConfig.resolve(
        [*write(workdir, 'dataset: torch/mnist\nimg_size: 32\nin_chans: 3\n'), '--data-dir', 'mine']
    )
    assert config.dataset == 'torch/mnist'
    config = TrainConfig.resolve([*write(workdir, 'img_size: 32\nin_chans: 3\n'), '--input-size', '1', '28', '28'])
    assert (config.input_size, config.in_chans, config.img_size) == ([1, 28, 28], None, None)


def test_tuples_are_the_lists_that_a_yaml_file_gives_back():
    before, now = {'model_kwargs': {'widths': [8, 16]}}, {'model_kwargs': {'widths': (8, 16)}}
    assert diff_settings(before, now) == []
    assert diff_settings(before, {'model_kwargs': {'widths': (8, 17)}})
