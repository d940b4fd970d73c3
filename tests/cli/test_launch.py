"""timm's scripts, unmodified, with our models and losses; and the guard against training something else silently."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm.task
import torch
import yaml

from ..conftest import results

STAND_IN = Path(__file__).parents[1] / 'upstream_train.py'
REAL = Path(os.environ.get('TIMM_SCRIPTS', '')) / 'train.py' if os.environ.get('TIMM_SCRIPTS') else None
SCRIPTS = [
    pytest.param(STAND_IN, id='stand-in'),
    pytest.param(REAL, id='real', marks=pytest.mark.skipif(REAL is None, reason='TIMM_SCRIPTS names no folder')),
]
WORDS = ['--model', 'test_resnet_cam', '--img-size', '32', '--num-classes', '3', '-b', '8', '-j', '0', '--epochs', '2']


@pytest.fixture
def launch(run_cli, folder, workdir):
    """Run a script on the small folder."""

    def run(script, *argv, data=True):
        return run_cli('timm', script, *(['--data-dir', folder] if data else []), *argv)

    return run


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_trains_with_our_loss_and_args_yaml_repeats_it(script, launch):
    code, out, err = launch(script, *WORDS, '--loss', 'cc', '--loss-kwargs', 'weight=0.5', '--experiment', 'first')
    assert code == 0, err
    assert len(results(out)) == 2
    assert "loss 'cc' {'smoothing': 0.1, 'weight': 0.5} on CAMHead" in err
    args = yaml.safe_load(Path('output/train/first/args.yaml').read_text())
    assert (args['loss'], args['loss_kwargs']) == ('cc', {'weight': 0.5})
    code, again, err = launch(script, '--config', 'output/train/first/args.yaml', '--experiment', 'second', data=False)
    assert code == 0, err
    assert results(again) == results(out)
    first, second = (Path(f'output/train/{name}/summary.csv').read_text() for name in ('first', 'second'))
    assert first == second


@pytest.mark.parametrize('script', SCRIPTS)
def test_timms_task_is_back_in_its_place(script, launch):
    before = timm.task.ClassificationTask
    assert launch(script, *WORDS, '--epochs', '1', '--loss', 'cc')[0] == 0
    assert timm.task.ClassificationTask is before is timm.task.classification.ClassificationTask


@pytest.mark.parametrize('script', SCRIPTS)
def test_without_our_loss_the_script_is_left_alone(script, launch):
    device = [] if torch.accelerator.is_available() else ['--device', 'cpu']
    code, out, err = launch(script, *WORDS, '--epochs', '1', *device)
    assert code == 0, err
    assert 'on CAMHead' not in err


@pytest.mark.parametrize('script', SCRIPTS)
def test_checkpoint_has_plain_names_and_resumes(script, launch):
    assert launch(script, *WORDS, '--loss', 'cc', '--experiment', 'a', '--model-ema', '--epochs', '1')[0] == 0
    checkpoint = torch.load('output/train/a/last.pth.tar', weights_only=False)
    assert 'fc.hidden.weight' in checkpoint['state_dict'] and 'fc.hidden.weight' in checkpoint['state_dict_ema']
    assert checkpoint['task_state']['step'] == 3
    more = ['--resume', 'output/train/a/last.pth.tar', '--experiment', 'b', '--model-ema']
    code, out, err = launch(script, *WORDS, '--loss', 'cc', *more)
    assert code == 0, err
    assert [row['epoch'] for row in results(out)] == [1]


@pytest.mark.parametrize('script', SCRIPTS)
def test_epochs_and_steps_reach_a_loss_with_a_schedule(script, launch):
    argv = [*WORDS, '--model', 'test_resnet_pedcc', '--loss', 'nac', '--loss-kwargs', 'alpha=0.5', '--experiment', 'a']
    code, out, err = launch(script, *argv, '--epochs', '3')
    assert code == 0, err
    first, last = (
        torch.load(f'output/train/a/checkpoint-{epoch}.pth.tar', weights_only=False)['task_state'] for epoch in (0, 2)
    )
    assert (first['epoch'], first['step'], last['epoch'], last['step']) == (0, 3, 2, 9)
    assert first['loss']['delta'] == pytest.approx(0.05)
    previous = torch.load('output/train/a/checkpoint-1.pth.tar', weights_only=False)['task_state']['loss']
    assert last['loss']['delta'] == pytest.approx(0.5 * 2 * previous['mean_norm'].item())


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize(
    'argv, message',
    [
        (['--loss', 'ccc'], "Unknown loss 'ccc'; did you mean 'cc'?"),
        (['--loss', 'cc', '--model', 'resnet18'], "loss 'cc' requires attention; resnet18 has a linear classifier"),
        (['--loss', 'cc', '--model', 'resnet18_camm'], "Unknown model 'resnet18_camm'; did you mean"),
        (['--loss', 'cc', '--jsd-loss'], '--jsd-loss cannot be combined with --loss cc'),
        (['--loss', 'cc', '--bce-loss'], '--bce-loss cannot be combined'),
        (['--loss', 'cc', '--kd-model-name', 'resnet18'], '(distillation) cannot be combined'),
        (['--loss', 'cc', '--head-init-scale', '0.5'], '--head-init-scale cannot be combined'),
        (['--loss', 'pod', '--model', 'test_resnet_pedcc', '--mixup', '0.2'], 'Mixup and CutMix make soft targets'),
        (['--loss', 'cc', '--loss-kwargs', 'wight=1'], "Loss 'cc' has no option 'wight'; did you mean 'weight'?"),
    ],
)
def test_what_cannot_work_is_one_sentence(script, argv, message, launch):
    code, out, err = launch(script, *WORDS, *argv)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not Path('output').exists()


@pytest.mark.parametrize('script', SCRIPTS)
def test_pad_crop_reaches_the_script(script, launch, monkeypatch):
    from torchvision import transforms

    used = []
    crop = transforms.RandomCrop.forward
    monkeypatch.setattr(transforms.RandomCrop, 'forward', lambda self, x: used.append(self.padding) or crop(self, x))
    assert launch(script, *WORDS, '--epochs', '1', '--loss', 'cc', '--pad-crop', '4')[0] == 0
    assert set(used) == {4}
    assert yaml.safe_load(Path('output/train').glob('*/args.yaml').__next__().read_text())['pad_crop'] == 4


def write_recipe(**settings):
    Path('recipe.yaml').write_text(yaml.safe_dump(settings))
    return 'recipe.yaml'


@pytest.mark.parametrize('script', SCRIPTS)
def test_recipe_with_our_loss(script, launch):
    recipe = write_recipe(loss='cc', loss_kwargs={'weight': 2.0}, model='test_resnet_cam', assumed=['nothing'])
    code, out, err = launch(script, *WORDS, '--epochs', '1', '-c', recipe)
    assert code == 0, err
    assert "loss 'cc' {'smoothing': 0.1, 'weight': 2.0}" in err


@pytest.mark.parametrize('flag', ['--conf', '--config', '-c'])
def test_abbreviated_config_does_not_get_past_us(flag, launch):
    code, out, err = launch(STAND_IN, *WORDS, '--epochs', '1', flag, write_recipe(loss='cc'))
    assert code == 0 and "loss 'cc'" in err


def test_settings_that_only_the_built_in_script_has_are_refused(launch):
    code, out, err = launch(STAND_IN, *WORDS, '-c', write_recipe(loss='cc', val_fraction=0.2))
    assert code == 2 and "'val_fraction' works in the built-in script only" in err


def test_script_without_a_task_is_refused(launch):
    Path('old.py').write_text('def main(): pass\n')
    code, out, err = launch('old.py', *WORDS, '--loss', 'cc')
    assert code == 2 and 'has no ClassificationTask, _parse_args, parser' in err


def test_script_that_never_builds_its_task_is_an_error(launch):
    Path('lazy.py').write_text(STAND_IN.read_text().split('def main')[0] + 'def main():\n    _parse_args()\n')
    code, out, err = launch('lazy.py', *WORDS, '--loss', 'cc')
    assert code == 2 and "never built its training task: the loss 'cc' was not used" in err


def test_missing_script(run_cli, workdir):
    assert run_cli('ccl-timm', 'run', 'nothing.py')[0] == 2
    code, out, err = run_cli('timm', 'onnx_export.py')
    assert code == 2 and "There is no file 'onnx_export.py', and it is not built in" in err


@pytest.mark.parametrize('script', SCRIPTS)
def test_stock_script_is_stopped_before_it_trains_something_else(script, folder, workdir):
    recipe = write_recipe(loss='cc', model='resnet18_cam', device_modules=['ccl_timm.autoload'])
    argv = [sys.executable, script, '-c', recipe, '--data-dir', folder, '--device', 'cpu', *WORDS]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 2
    assert "would train with cross-entropy, not with the loss 'cc': run it as `timm " in result.stderr
    assert not Path('output').exists()


@pytest.mark.parametrize('builtin', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_args_yaml_of_every_run_stops_a_stock_script(builtin, folder, launch, run_cli):
    """Also of a run without a recipe, whose loss a stock script would leave out; our launcher repeats it."""
    if builtin:
        code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *WORDS, '--loss', 'cc', '--epochs', '1')
    else:
        code, out, err = launch(STAND_IN, *WORDS, '--loss', 'cc', '--epochs', '1')
    assert code == 0, err
    (recipe,) = Path('output').rglob('args.yaml')
    argv = [sys.executable, STAND_IN, '-c', recipe, '--data-dir', folder, '--device', 'cpu']
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 2 and 'would train with cross-entropy' in result.stderr
    code, out, err = run_cli('timm', STAND_IN, '-c', recipe, '--experiment', 'again')
    assert code == 0, err


def test_a_recipe_imports_no_module_that_was_not_typed(launch):
    recipe = write_recipe(loss='cc', model='resnet18_cam', device_modules=['this'])
    code, out, err = launch(STAND_IN, '-c', recipe)
    assert code == 2 and "wants to import the module 'this'" in err and 'this' not in sys.modules


@pytest.mark.parametrize('script', SCRIPTS)
def test_stock_script_trains_our_models_after_autoload(script, folder, workdir):
    argv = [sys.executable, script, '--data-dir', folder, '--device', 'cpu', *WORDS, '--epochs', '1']
    argv += ['--model', 'resnet18_cam']  # known to timm by name
    result = subprocess.run([*argv, '--device-modules', 'ccl_timm.autoload'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('loss', ['ce', 'poly'])
def test_timms_losses_work_in_a_script_that_knows_no_names(script, loss, launch):
    device = [] if torch.accelerator.is_available() else ['--device', 'cpu']
    code, out, err = launch(script, *WORDS, '--epochs', '1', '--loss', loss, *device)
    assert code == 0, err
    assert ("loss 'poly'" in err) == (loss == 'poly')
