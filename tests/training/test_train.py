"""The built-in script, run by its flags: what it trains, prints, writes, repeats, resumes, and refuses."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ccl_timm.heads import CosineHead
from ccl_timm.losses import list_losses, loss_class
from ccl_timm.training import trainer
from ccl_timm.training.checkpoint_files import read_checkpoint
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.trainer import Trainer

from ..conftest import TINY, results, write_folder


@pytest.fixture
def tiny(run_cli, folder, workdir):
    """Train on the small folder with the flags given."""

    def run(*argv, data=True):
        return run_cli('timm', 'train.py', *TINY, *(['--data-dir', folder] if data else []), *argv)

    return run


def summary(run):
    with open(Path(run) / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_the_literal_command_in_an_empty_folder(run_cli, workdir):
    shorter = ['--epochs', '2', '--input-size', '1', '16', '16', '--train-fraction', '0.5']
    code, out, err = run_cli('timm', 'train.py', '--model', 'resnet18_cam', '--loss', 'cc', *shorter)
    assert code == 0, err
    assert 'no file train.py here: the built-in script' in err
    assert 'No data given: training on the embedded handwritten digits, recipe digits' in err
    assert results(out)[-1]['validation']['top1'] > 30  # chance is 10
    assert 'best top-1' in err.splitlines()[-3]
    assert 'next: timm validate.py output/train/' in err


def test_choices_are_logged_in_one_block_with_their_source(tiny):
    code, out, err = tiny('--lr', '0.01')
    lines = {line.split()[0]: line for line in err.splitlines() if line.endswith(']')}
    assert lines['model'].split('model')[1].strip().startswith('test_resnet_cam, 0.4 M parameters  [command line]')
    assert 'CAMHead' in lines['head']
    assert 'channels last, kernels cropped to small images' in lines['layout']
    assert 'from scratch  [default]' in lines['start']
    assert 'cc (weight=1.0, eps=1e-08, smoothing=0.1)  [command line]' in lines['loss']
    assert '24 to train on, 12 to validate on' in lines['images']
    assert '3, 8 to 8 images each  [the data]' in lines['classes']
    assert '3x32x32  [command line]' in lines['input']
    assert '8 = 8 x 1 processes x 1 accumulated  [command line]' in lines['batch']
    assert '0.01, sgd, cosine  [command line]' in lines['lr']


def test_a_share_of_the_images_is_logged(tiny):
    assert '12 to train on (50% of the split), 12 to validate on' in tiny('--train-fraction', '0.5')[2]


def test_run_folder_is_timms_and_more(tiny, folder):
    assert tiny('--experiment', 'a', '--epochs', '2')[0] == 0
    run = Path('output/train/a')
    names = {path.name for path in run.iterdir()}
    checkpoints = {'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar', 'model_best.pth.tar'}
    assert names == checkpoints | {'args.yaml', 'summary.csv', 'environment.json', '.lock'}
    assert list(summary(run)[0]) == [
        'epoch', 'train_loss', 'train_ce', 'train_cc', 'eval_loss', 'eval_top1', 'eval_top5', 'eval_macro_top1', 'lr',
    ]  # fmt: skip
    row = summary(run)[1]
    assert float(row['train_loss']) == pytest.approx(float(row['train_ce']) + float(row['train_cc']), rel=1e-5)
    args = yaml.safe_load((run / 'args.yaml').read_text())
    assert args['class_names'] == ['ant', 'bee', 'cat'] and args['num_classes'] == 3 and args['lr'] is None
    information = json.loads((run / 'environment.json').read_text())
    assert information['command'].startswith('timm train.py --model test_resnet_cam --loss cc')
    assert {'versions', 'git_commit', 'device', 'plugins', 'data_fingerprint'} <= information.keys()
    assert (information['git_commit'] is not None) == (Path(__file__).parents[2] / '.git').exists()
    checkpoint = read_checkpoint(run / 'last.pth.tar')
    assert checkpoint['args'].class_names == ['ant', 'bee', 'cat']
    assert all(torch.is_tensor(value) for value in checkpoint['state_dict'].values())


def test_args_yaml_repeats_the_run_with_identical_numbers(tiny, run_cli):
    assert tiny('--experiment', 'a', '--epochs', '2', '-j', '1')[0] == 0
    code, out, err = run_cli('timm', 'train.py', '--config', 'output/train/a/args.yaml')
    assert code == 0, err
    assert summary('output/train/a') == summary('output/train/a-1')


@pytest.mark.parametrize(
    'more', [('--loss', 'cc'), ('--loss', 'ce'), ('--loss', 'cc', '--opt', 'adahessian')], ids=' '.join
)
def test_resumed_equals_uninterrupted(more, tiny, monkeypatch):
    flags = [*more, '--epochs', '3', '--model-ema', '--model-ema-decay', '0.5', '--sched-on-updates']
    assert tiny(*flags, '--experiment', 'whole')[0] == 0
    step, seen = Trainer.train_step, []

    def dies(run, epoch, *rest):
        seen.append(epoch)
        if epoch == 2 and seen.count(2) == 2:
            raise RuntimeError('the machine went away')
        return step(run, epoch, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='went away'):
        patch.setattr(Trainer, 'train_step', dies)
        tiny(*flags, '--experiment', 'cut')
    code, out, err = tiny(*flags, '--experiment', 'cut', '--resume', 'auto')
    assert code == 0, err
    assert 'resuming after 2' in err
    assert summary('output/train/whole') == summary('output/train/cut')
    information = json.loads(Path('output/train/cut/environment.json').read_text())
    assert '--resume' not in information['command'] and '--resume auto' in information['resumed'][0]['command']
    whole, cut = (read_checkpoint(Path(f'output/train/{name}/last.pth.tar')) for name in ('whole', 'cut'))
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(value, cut[key][name]) for name, value in whole[key].items())


def test_damaged_last_checkpoint_does_not_lose_the_run(tiny):
    assert tiny('--experiment', 'a', '--epochs', '2')[0] == 0
    last = Path('output/train/a/last.pth.tar')
    last.unlink()
    last.write_bytes(b'cut off in the middle')
    assert RunDir(last.parent).newest_checkpoint().name == 'checkpoint-1.pth.tar'


def test_a_run_is_never_written_over(tiny):
    assert tiny('--experiment', 'a')[0] == 0
    before = Path('output/train/a/summary.csv').read_text()
    code, out, err = tiny('--experiment', 'a')
    assert code == 2 and "'output/train/a' already holds a run: give --resume auto" in err
    code, out, err = tiny('--experiment', 'b', '--resume', 'auto')
    assert code == 0 and "there is no run in 'output/train/b' to resume: it begins" in err
    code, out, err = tiny('--experiment', 'a', '--resume', 'auto', '--lr', '0.3', '--seed', '7')
    assert code == 2 and "'output/train/a' holds a run of other settings" in err and 'lr was None, is 0.3' in err
    assert Path('output/train/a/summary.csv').read_text() == before


def test_held_out_share_is_kept_with_the_run(run_cli, workdir):
    write_folder(workdir / 'images', validation=0)
    argv = ['--data-dir', 'images', '--val-fraction', '0.25', '--experiment', 'a']
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv)
    assert code == 0, err
    rows = Path('output/train/a/split.csv').read_text().splitlines()
    assert rows[0] == 'file,split' and sum(row.endswith(',validation') for row in rows) == 6
    code, out, err = run_cli('timm', 'validate.py', 'output/train/a', '-j', '0')
    assert code == 0 and results(out)['images'] == 6


def test_mixup_gives_soft_targets_to_losses_that_take_them(tiny):
    code, out, err = tiny('--mixup', '0.5', '--cutmix', '1.0', '--mixup-off-epoch', '1', '--epochs', '2')
    assert code == 0, err
    assert 'smoothing=0.0' in err  # Mixup has applied it already


def test_options_that_change_the_step_train(tiny):
    argv = ['--grad-accum-steps', '2', '--clip-grad', '1', '--clip-mode', 'agc', '--channels-last', '--amp']
    argv += ['--amp-dtype', 'bfloat16', '--torchcompile', 'eager', '--layer-decay', '0.8', '--model-ema']
    code, out, err = tiny(*argv, '--opt', 'adamw', '--val-interval', '2', '--epochs', '2')
    assert code == 0, err
    assert len(results(out)) == 1
    assert tiny('--grad-checkpointing')[0] == 0


def test_without_validation_the_training_loss_decides(tiny):
    code, out, err = tiny('--val-split', '', '--experiment', 'a')
    assert code == 0, err
    assert 'best loss' in err and 'eval_top1' not in summary('output/train/a')[0]


def test_vision_transformer_takes_its_image_size(run_cli, folder, workdir):
    argv = ['--model', 'vit_tiny_patch16_224_cam', '--model-kwargs', 'patch_size=8', 'depth=2', '--data-dir', folder]
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv)
    assert code == 0 and 'cropped' not in err, err


def test_batches_without_a_pair_of_one_class_are_warned_of(run_cli, workdir):
    write_folder(workdir / 'images', classes=[f'c{i}' for i in range(24)], train=1, validation=1)
    code, out, err = run_cli('timm', 'train.py', *TINY, '--data-dir', 'images', '--epochs', '2')
    assert code == 0, err
    assert err.count("warning: loss term 'cc' was zero in 100% of this epoch's batches") == 1
    write_folder(workdir / 'one', classes=['ant'])
    code, out, err = run_cli('timm', 'train.py', *TINY, '--data-dir', 'one', '--epochs', '1')
    assert code == 0 and "'ce' was zero" in err and 'no two images' not in err, err


def test_what_a_head_has_to_say_is_passed_on_once(tiny, monkeypatch):
    monkeypatch.setattr(CosineHead, 'caution', lambda self: 'the class vectors point in nearly one direction')
    code, out, err = tiny('--model', 'resnet18_cosine', '--loss', 'arcface', '--epochs', '2')
    assert code == 0, err
    assert err.count('warning: the class vectors point in nearly one direction') == 1


def test_finishing_time_is_logged(run_cli, workdir):
    write_folder(workdir / 'images', train=16)
    code, out, err = run_cli('timm', 'train.py', *TINY, '--data-dir', 'images', '--log-interval', '2')
    assert 'expected to finish at' in err and 'epoch 1/1     2/6  loss' in err


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--model', 'resnet18_can'], "Unknown model 'resnet18_can'; did you mean 'resnet18_cam'?"),
        (['--loss', 'ccc'], "Unknown loss 'ccc'; did you mean 'cc'?"),
        (['--model', 'resnet18'], "loss 'cc' requires attention; resnet18 has a linear classifier: use resnet18_cam."),
        (['--num-classes', '2'], '--num-classes 2 is too small: the data has labels up to 2'),
        (['--data-dir', 'nowhere'], "no data folder 'nowhere'"),
        (['--resume', 'nothing.pth.tar'], "no checkpoint 'nothing.pth.tar'"),
        (['--resume', 'auto'], '--resume auto needs --experiment NAME'),
        (['--learning-rate', '1'], "Unknown argument '--learning-rate'"),
        (['--naflex-loader'], "does not have timm's --naflex-loader: run timm's own train.py"),
        (['--epochs', 'many'], "rgument --epochs: 'many' is not a whole number"),
        (['-b', '0'], '--batch-size: 0 must be at least 1'),
        (['-b', '64'], 'The training split has 24 images, fewer than a batch of 64'),
        (['--opt', 'sgdd'], "Unknown optimizer 'sgdd'; did you mean"),
        (['--val-fraction', '2'], '--val-fraction: 2 must be above 0 and below 1'),
        (['--device', 'cuda:9'], "Device 'cuda:9' is not available here"),
        (['--loss-kwargs', 'lambda=1'], "Loss 'cc' has no option 'lambda'"),
        (['--model-kwargs', 'wings=2'], "Model 'test_resnet_cam' cannot be built with"),
        (['--sched', 'foo'], "settings of the schedule 'foo' do not work"),
        (['--device-modules', 'nosuch'], "--device-modules 'nosuch' cannot be imported"),
        (['--loss-kwargs', 'weight=abc'], "Loss 'cc' cannot be built with"),
        (['--loss-kwargs', 'weight=-1'], "Loss 'cc': weight must not be negative"),
        (['--loss-kwargs', 'smoothing=2'], "Loss 'cc': smoothing must be at least 0 and below 1"),
        (['--aa', 'foo'], 'The settings of data and augmentation do not work'),
        (['--opt-kwargs', 'foo=1'], "The settings of the optimizer 'sgd' do not work"),
        (['--interpolation', 'foo'], 'The settings of data and augmentation do not work'),
        (['--mixup', '0.2', '-b', '7'], 'take pairs: --batch-size 7 must be even'),
        (['-j', '-1'], '--workers: -1 must be at least 0'),
        (['--mean', '0.5', '0.5'], '--mean has 2 values, images 3 channels'),
        (['--pad-crop', '4', '--no-aug'], '--pad-crop takes the place of other crops'),
        (['--output', '/proc/nothing'], "error: '/proc/nothing"),
        (['--model', 'vgg16_cam', '--img-size', '24'], "'vgg16_cam' with loss 'cc' cannot take images of 3x24x24"),
        (['--model', 'vgg16_cam', '--grad-checkpointing'], "--grad-checkpointing does not work with 'vgg16_cam'"),
        (['--train-split', 'trian'], "has no split 'trian' (it has train, validation)"),
        (['--val-split', 'vall'], "has no split 'vall' (it has train, validation)"),
        (['--class-names', 'ant', 'bee'], 'not among the 2 of --class-map, --class-names or the recipe'),
        (['--input-img-mode', 'I;16'], "--input-img-mode: invalid choice: 'I;16'"),
        (['--class-names', 'ant', 'bee', 'cat', 'ant'], "--class-names names the class 'ant' twice"),
        (['--lr', '0.1', '--scale-lr'], '--scale-lr needs --lr and the batch that it is for, --lr-batch N'),
        (['--num-classes', '5', '--class-weight', 'balanced', '--loss', 'ce'], 'weighs the 3 classes of the data'),
        (['--pretrained-path', 'none.pth'], "no checkpoint 'none.pth'"),
        (['--loss', 'pod', '--model', 'resnet18_pedcc', '--cutmix', '1'], 'Mixup and CutMix make soft targets'),
        (['--loss', 'mc', '--model', 'vit_tiny_patch16_224'], 'use a convolutional network'),
        (['--loss', 'arcface'], 'test_resnet_cam has the head CAMHead: use test_resnet_cosine'),
        (['--loss', 'jsd'], "Unknown loss 'jsd'"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(argv, message, tiny, workdir):
    code, out, err = tiny(*argv)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith('error: ') and message.lower() in last.lower()
    assert list(workdir.iterdir()) == []


def test_resume_from_what_is_not_a_checkpoint(tiny, workdir):
    (workdir / 'junk.pth.tar').write_bytes(b'not a checkpoint')
    torch.save({'weights': torch.zeros(1)}, workdir / 'other.pth.tar')
    code, out, err = tiny('--resume', 'junk.pth.tar')
    assert code == 2 and "'junk.pth.tar' is not a readable training checkpoint" in err
    code, out, err = tiny('--resume', 'other.pth.tar')
    assert code == 2 and "'other.pth.tar' is not a training checkpoint" in err


def test_resume_of_another_model(tiny, trained, workdir):
    code, out, err = tiny('--model', 'vgg16_cam', '--resume', trained / 'last.pth.tar')
    assert code == 2 and 'does not fit this model, loss and optimizer' in err
    assert not Path('output').exists()


def test_empty_data_folder(run_cli, workdir):
    (workdir / 'images').mkdir()
    code, out, err = run_cli('timm', 'train.py', *TINY, '--data-dir', 'images', '--val-split', '')
    assert code == 2 and 'Found 0 images' in err


@pytest.mark.parametrize('loss', list_losses())
def test_every_loss_trains_with_its_model(loss, run_cli, workdir):
    head = loss_class(loss).head or 'cam'
    write_folder(workdir / 'images', train=16)
    argv = ['--model', f'test_resnet_{head}', '--loss', loss, '--data-dir', 'images', '--epochs', '3', '--lr', '0.02']
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv, '--warmup-epochs', '0', '--smoothing', '0', '--no-aug')
    assert code == 0, err
    values = [row['train']['loss'] for row in sorted(results(out), key=lambda row: row['epoch'])]
    assert min(values[1:]) < values[0]


@pytest.mark.parametrize(
    'error', [torch.OutOfMemoryError('CUDA'), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_names_what_helps(error, tiny, monkeypatch):
    def step(*args):
        raise error

    monkeypatch.setattr(Trainer, 'train_step', step)
    code, out, err = tiny()
    assert code == 2
    assert '--batch-size 4 --grad-accum-steps 2' in err and '--grad-checkpointing' in err


def test_loss_that_is_not_finite_stops_the_run(tiny):
    code, out, err = tiny('--lr', '1000', '--warmup-epochs', '0', '--epochs', '3')
    assert code == 2 and 'The loss became' in err and 'lower the learning rate' in err


def test_stopped_by_hand_keeps_what_was_done(tiny, monkeypatch):
    fit_epoch = Trainer.train_epoch

    def interrupted(run, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return fit_epoch(run, epoch)

    monkeypatch.setattr(Trainer, 'train_epoch', interrupted)
    code, out, err = tiny('--epochs', '3', '--experiment', 'a')
    assert code == 130 and 'stopped by hand' in err
    assert len(summary('output/train/a')) == 1


def test_device_modules_are_imported(tiny, workdir, monkeypatch):
    (workdir / 'my_device_module.py').write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.syspath_prepend(str(workdir))
    assert tiny('--device-modules', 'my_device_module')[0] == 0
    assert (workdir / 'imported').exists()


def test_positional_data_folder(run_cli, folder, workdir):
    assert run_cli('timm', 'train.py', folder, *TINY)[0] == 0


def test_real_folder_without_validation_split(run_cli, workdir):
    shutil.rmtree(write_folder(workdir / 'images') / 'validation')
    code, out, err = run_cli('timm', 'train.py', *TINY, '--data-dir', 'images')
    assert code == 2 and '--val-fraction 0.2' in err


def test_runs_that_begin_together_get_folders_of_their_own(workdir):
    runs = [RunDir('output/train/same') for _ in range(3)]
    for run in runs:
        run.create()
    paths = {run.path for run in runs}
    assert len(paths) == 3
    for run in runs:
        (run.path / 'args.yaml').touch()
        run.__exit__()
    late = RunDir('output/train/same')
    late.create()
    assert late.path not in paths


def test_a_run_with_a_class_map_resumes(tiny, workdir):
    Path('names.txt').write_text('cat\nbee\nant\n')
    argv = ('--class-map', 'names.txt', '--experiment', 'a', '--epochs', '2')
    assert tiny(*argv)[0] == 0
    code, out, err = tiny(*argv, '--resume', 'auto')
    assert code == 0, err


def test_a_learning_rate_that_a_checkpoint_overrides_is_named(tiny):
    assert tiny('--experiment', 'a', '--lr', '0.1')[0] == 0
    argv = ('--resume', 'output/train/a/last.pth.tar', '--lr', '0.001', '--epochs', '2')
    assert "The learning rate is 0.1, that of the optimizer in 'output/train/a/last.pth.tar'" in tiny(*argv)[2]
    assert 'The learning rate is' not in tiny(*argv, '--no-resume-opt')[2]


def test_options_of_the_optimizer_that_a_checkpoint_overrides_are_named(tiny):
    assert tiny('--experiment', 'a', '--opt', 'sgd', '--momentum', '0.9')[0] == 0
    argv = ('--resume', 'output/train/a/last.pth.tar', '--weight-decay', '0.3', '--epochs', '2')
    said = "The optimizer's weight_decay is 0 and 2e-05, that in 'output/train/a/last.pth.tar', not 0 and 0.3"
    err = tiny(*argv)[2]
    assert said in err and 'momentum is' not in err
    assert "The optimizer's" not in tiny(*argv, '--no-resume-opt')[2]


def test_patience_waits_for_an_epoch_that_is_measured(tiny, run_cli):
    argv = ('--epochs', '8', '--val-interval', '2', '--patience', '1', '--eval-metric', 'top5')  # of 3 classes: 100%
    code, _, err = tiny(*argv, '--experiment', 'a')
    assert code == 0 and 'no better top5 for 1 epochs: stopping after epoch 4' in err
    assert [row['epoch'] for row in summary('output/train/a')] == ['1', '3']
    code, _, err = run_cli('ccl-timm', 'report', 'output/train/a')
    assert code == 0 and 'half-written' not in err


@pytest.mark.parametrize('loss, smoothing', [('ce', 0.2), ('focal', 0.0)])
def test_mixup_smooths_for_losses_that_have_it(loss, smoothing, tiny, monkeypatch):
    seen = []
    make = trainer.make_loaders
    monkeypatch.setattr(trainer, 'make_loaders', lambda config, *args: seen.append(config) or make(config, *args))
    code, out, err = tiny('--model', 'test_resnet', '--loss', loss, '--mixup', '0.2', '--smoothing', '0.2')
    assert code == 0, err
    assert seen[0].smoothing == smoothing
    assert ("0.2 in Mixup's targets" if smoothing else 'not an option of this loss') in out + err


def test_classes_without_a_name_have_a_number(tiny, run_cli, folder):
    assert tiny('--num-classes', '5', '--experiment', 'a')[0] == 0
    code, _, err = run_cli('timm', 'validate.py', 'output/train/a', '--per-class', 'p.csv', '--confusion', 'c.csv')
    assert code == 0, err
    assert [line.split(',')[0] for line in Path('p.csv').read_text().splitlines()[-2:]] == ['3', '4']
    image = next((folder / 'validation').rglob('*.png'))
    code, out, err = run_cli('ccl-timm', 'predict', 'output/train/a', image, '--topk', '5')
    assert code == 0, err


def test_neighbours_of_training_images_are_not_sought_among_them(tiny, run_cli):
    assert tiny('--dataset', 'digits', '--train-fraction', '0.05', '--experiment', 'a', data=False)[0] == 0
    code, _, err = run_cli('timm', 'validate.py', 'output/train/a', '--split', 'train', '--knn', '1')
    assert code == 2 and '--knn among training images finds each one itself: name another --split' in err


def test_batch_norm_over_processes_needs_accelerators(tiny, monkeypatch):
    monkeypatch.setattr(trainer, 'world_size', lambda: 2)
    code, _, err = tiny('--sync-bn', '--device', 'cpu')
    assert code == 2 and '--sync-bn works on accelerators only: leave it out' in err


def test_what_to_do_next_needs_a_split_where_there_was_none(tiny):
    assert 'next: timm validate.py output/train/a --split NAME' in tiny('--val-split', '', '--experiment', 'a')[2]


def test_a_run_that_began_with_a_wider_pedcc_head_is_loaded(tiny, workdir):
    model = timm.create_model('test_resnet_pedcc', num_classes=300)
    save_file(model.state_dict(), 'wide.safetensors')
    argv = ('--model', 'test_resnet_pedcc', '--loss', 'ce', '--pretrained-path', 'wide.safetensors', '--epochs', '2')
    code, out, err = tiny(*argv, '--experiment', 'a')
    assert code == 0, err
    assert load_trained('output/train/a').model.fc.weight.shape == (3, 1024)


def test_a_new_run_from_a_checkpoint_needs_more_epochs_than_that_has(tiny, trained):
    code, out, err = tiny('--model', 'resnet18_cam', '--resume', trained / 'last.pth.tar', '--epochs', '2')
    assert code == 2 and 'has 2 epochs already, which count among the 2 of the new run: give more --epochs' in err
    assert not Path('output').exists()


def test_a_second_order_optimizer_trains(tiny):
    code, out, err = tiny('--opt', 'adahessian', '--loss', 'ce')
    assert code == 0, err


@pytest.mark.parametrize(
    'sched, epochs',
    [('none', 3), ('step', 3), ('plateau', 3), ('multistep', 3), ('constant', 3), ('cosine', 5), ('poly', 5)],
)
def test_planned_epochs_are_timms(sched, epochs):
    config = TrainConfig.resolve(['--sched', sched, '--epochs', '3', '--cooldown-epochs', '2', '--warmup-epochs', '0'])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    options = scheduler_kwargs(config.view(lr=1.0))
    assert config.planned_epochs == epochs == create_scheduler_v2(optimizer, **options)[1]


def test_checkpoint_of_another_run_does_not_write_over_this_one(tiny, trained):
    assert tiny('--experiment', 'a')[0] == 0
    before = Path('output/train/a/summary.csv').read_text()
    code, out, err = tiny('--experiment', 'a', '--resume', trained / 'last.pth.tar')
    assert code == 2 and 'holds another run than' in err
    assert Path('output/train/a/summary.csv').read_text() == before


def test_a_run_does_not_go_on_with_other_data(run_cli, workdir):
    images = write_folder(workdir / 'images')
    argv = ['--data-dir', 'images', '--experiment', 'a']
    assert run_cli('timm', 'train.py', *TINY, *argv)[0] == 0
    (images / 'train' / 'cat' / '0.png').unlink()
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv, '--resume', 'auto')
    assert code == 0 and "warning: The data changed since the run in 'output/train/a' began." in err
    for part in ('train', 'validation'):
        (images / part / 'cat').rename(images / part / 'aaa')
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv, '--resume', 'auto')
    assert code == 2 and 'The classes are no longer those of the run' in err


def test_a_class_map_is_kept_as_names(run_cli, folder, workdir):
    Path('names.txt').write_text('cat\nbee\nant\n')
    argv = ['--data-dir', folder, '--class-map', 'names.txt', '--experiment', 'a']
    assert run_cli('timm', 'train.py', *TINY, *argv)[0] == 0
    Path('names.txt').unlink()
    code, out, err = run_cli('timm', 'train.py', '--config', 'output/train/a/args.yaml')
    assert code == 0, err
    assert summary('output/train/a') == summary('output/train/a-1')
    code, out, err = run_cli('timm', 'validate.py', 'output/train/a', '-j', '0')
    assert results(out)['top1'] == float(summary('output/train/a')[0]['eval_top1'])


def test_accumulated_batches_are_one_step_from_the_start(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(loss_class('cot'), 'set_step', lambda self, step: seen.append(step))
    argv = ['--model', 'resnet18', '--loss', 'cot', '--grad-accum-steps', '2', '-b', '4', '--epochs', '1']
    assert tiny(*argv)[0] == 0
    assert seen == [0, 1, 2, 3]


def test_a_moving_average_is_named_in_the_next_commands(tiny, run_cli, folder):
    code, out, err = tiny('--model-ema', '--experiment', 'a')
    assert 'next: timm validate.py output/train/a --use-ema' in err
    out = run_cli('ccl-timm', 'index', 'output/train/a', folder / 'train', '--use-ema', '-j', '0')[1]
    assert 'use it: ccl-timm predict output/train/a --use-ema IMAGES' in out


def test_initial_checkpoint_of_other_classes_names_what_adapts_it(trained, run_cli, workdir):
    write_folder(workdir / 'images', classes=('ant', 'bee'))
    argv = ['--model', 'resnet18_cam', '--data-dir', 'images', '--experiment', 'a']
    file = trained / 'last.pth.tar'
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv, '--initial-checkpoint', file)
    assert code == 2 and '--pretrained-path adapts a checkpoint to other classes' in err
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv, '--pretrained-path', file, '--lr', '1e-9')
    assert code == 0 and 'pretrained' in err
    old, new = (torch.load(path, weights_only=False)['state_dict'] for path in (file, 'output/train/a/last.pth.tar'))
    assert torch.allclose(old['fc.hidden.weight'], new['fc.hidden.weight'], atol=1e-5)
    assert new['fc.out.weight'].shape[0] == 2


def test_images_of_other_channels_are_one_sentence(run_cli, workdir):
    import numpy as np
    from torchvision.datasets import mnist

    raw = workdir / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for part, count in (('train', 16), ('t10k', 8)):
        images = np.zeros((count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f'{part}-images-idx3-ubyte', images), (f'{part}-labels-idx1-ubyte', labels)):
            head = b'\x00\x00\x08' + bytes([array.ndim]) + np.array(array.shape, '>i4').tobytes()
            (raw / name).write_bytes(head + array.tobytes())
    assert mnist.MNIST('.', train=True).data.shape == (16, 28, 28)
    code, out, err = run_cli('timm', 'train.py', *TINY, '--dataset', 'torch/mnist', '--data-dir', '.')
    assert code == 2 and 'The images have 1 channels, the model takes 3: give --in-chans 1' in err
    argv = ['--config', 'cc_mnist', '--data-dir', '.', '--epochs', '1', '-b', '8', '-j', '0', '--experiment', 'a']
    code, out, err = run_cli('timm', 'train.py', *argv)
    assert code == 0, err


@pytest.mark.parametrize(
    'argv, fused', [([], True), (['--opt-kwargs', 'foreach=True'], None), (['--opt-kwargs', 'fused=False'], False)]
)
def test_adam_updates_weights_in_one_pass_unless_told_otherwise(argv, fused, folder):
    config = TrainConfig.resolve([*TINY, '--data-dir', str(folder), '--opt', 'adamw', *argv])
    assert Trainer(config, RunDir('none')).optimizer.defaults['fused'] is fused
