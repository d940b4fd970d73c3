"""The built-in script on two processes: one run, one report, one message; and runs that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ccl_timm.training import trainer
from ccl_timm.training.checkpoint_files import read_checkpoint

from ..conftest import results, write_folder

MODEL = ['--model', 'test_resnet_cam', '--loss', 'cc', '--img-size', '32', '-b', '4', '-j', '0', '--lr', '0.01']
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def timm(*argv):
    command = [sys.executable, '-c', 'import sys; from ccl_timm.cli import timm; sys.exit(timm())', *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def test_two_processes_make_one_run_and_count_each_image_once(workdir, run_cli):
    folder = write_folder(workdir / 'images', validation=3)  # 9 images: a sampler for two processes pads them to 10
    ran = timm('--nproc', '2', 'train.py', *MODEL, '--data-dir', folder, '--epochs', '2', '--experiment', 'two')
    assert ran.returncode == 0, ran.stderr
    assert '8 = 4 x 2 processes x 1 accumulated' in ran.stderr
    assert ran.stdout.count('--result') == 1 and ran.stderr.count('epoch 2/2  loss') == 1
    run = workdir / 'output' / 'train' / 'two'
    assert json.loads((run / 'environment.json').read_text())['processes'] == 2
    measured = {result['epoch']: result['validation'] for result in results(ran.stdout)}
    code, out, err = run_cli('timm', 'validate.py', run / 'last.pth.tar', '-j', '0')
    assert code == 0, err
    assert results(out)['images'] == 9
    for name in ('top1', 'top5', 'macro_top1', 'loss'):
        assert results(out)[name] == pytest.approx(measured[1][name], rel=1e-5)


def test_one_process_with_bad_input_ends_all_with_one_message(workdir):
    """The second process alone finds no data: the first waits for it in vain."""
    folder = write_folder(workdir / 'images')
    program = workdir / 'program.py'
    program.write_text(
        'import os, sys\n'
        'from ccl_timm import cli\n'
        'from ccl_timm.training.trainer import Trainer\n'
        'from ccl_timm.errors import UserError\n'
        'step = Trainer.train_step\n'
        'def fails(*args):\n'
        "    if os.environ['RANK'] == '1': raise UserError('The second process has had enough.')\n"
        '    return step(*args)\n'
        'Trainer.train_step = fails\n'
        'sys.exit(cli.timm())\n'
    )
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(program)]
    argv = ['train.py', *MODEL, '--data-dir', str(folder)]
    ran = subprocess.run([*command, *argv], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert ran.returncode != 0
    said = [line for line in ran.stderr.splitlines() if line.startswith('error:')]
    assert said == ['error: The second process has had enough.']


def test_more_processes_than_devices_are_refused(workdir, run_cli, monkeypatch):
    monkeypatch.setattr(trainer, 'pick_device', lambda name: 'cuda')
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_RANK', '1')
    code, _, err = run_cli('timm', 'train.py', '--config', 'digits')
    assert code == 2 and 'Each process needs a device of its own, and this machine has 1: start no more' in err


def test_a_mistake_on_two_processes_is_one_sentence(workdir):
    ran = timm('--nproc', '2', 'train.py', '--data-dir', 'nowhere')
    assert ran.returncode == 2
    assert [line for line in ran.stderr.splitlines() if 'nowhere' in line] == [
        "error: There is no data folder 'nowhere': give an existing one with --data-dir."
    ]
    assert 'Traceback' not in ran.stderr


def killed_and_resumed(folder, epochs, kills, seed):
    """Kill a run again and again, at random moments after its first sign of life; return the kills that hit."""
    draw, hits = random.Random(seed), 0
    argv = [*MODEL, '--data-dir', str(folder), '--epochs', epochs, '--experiment', 'cut', '--resume', 'auto']
    command = [sys.executable, '-c', 'import sys; from ccl_timm.cli import timm; sys.exit(timm())', 'train.py', *argv]
    while True:
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
            for line in process.stderr:
                if line.startswith(b'    epochs') and hits < kills:
                    time.sleep(draw.uniform(0, 0.3))
                    process.send_signal(signal.SIGKILL)
                    hits += process.wait() == -signal.SIGKILL
                    break
            else:
                assert process.wait() == 0
                return hits


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_as_those_that_were_not(kills, workdir, folder, run_cli):
    epochs = str(4 * kills + 4)
    argv = [*MODEL, '--data-dir', folder, '--epochs', epochs, '--experiment', 'whole']
    torch.set_num_threads(1)
    assert run_cli('timm', 'train.py', *argv)[0] == 0
    assert killed_and_resumed(folder, epochs, kills, seed=kills) >= kills // 2
    whole, cut = (Path('output/train') / name for name in ('whole', 'cut'))
    assert (whole / 'summary.csv').read_text() == (cut / 'summary.csv').read_text()
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        first, second = (read_checkpoint(run / name) for run in (whole, cut))
        assert first['epoch'] == second['epoch']
        assert all(torch.equal(value, second['state_dict'][key]) for key, value in first['state_dict'].items())
    names = [{path.name for path in run.glob('checkpoint-*')} for run in (whole, cut)]
    assert names[0] == names[1]
