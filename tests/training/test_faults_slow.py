"""Runs that are killed at random moments, and pairs of processes that begin the same run at the same moment.

The smoke tests are the same with small counts: ``pytest -m slow tests/training/test_faults_slow.py -k smoke``.
"""

import multiprocessing.util
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from ccl_timm import cli
from ccl_timm.losses import list_losses, loss_class
from ccl_timm.training.checkpoint_files import read_checkpoint
from ccl_timm.training.run_dir import RunDir

from ..conftest import write_folder

pytest.importorskip('fcntl', reason='this system has neither forks nor locks on files')
pytestmark = pytest.mark.slow

SETTINGS = {
    'ema': ['--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup'],
    'accumulation': ['--grad-accum-steps', '4', '--sched-on-updates'],  # of 6 batches, the second update has 2
    'mixup': ['--mixup', '0.4', '--cutmix', '1', '--mixup-off-epoch', '5'],
    'balanced': ['--samples-per-class', '2', '-b', '6'],
    'workers': ['-j', '2'],
    'plateau': ['--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5', '--warmup-epochs', '2'],
    'patience': ['--patience', '2', '--lr', '0.3'],
    **{loss: ['--loss', loss] for loss in ('pod', 'center', 'asoftmax', 'fical', 'pedcc')},
}
# Runs are forked from a process that has imported everything: they start at once.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['ccl_timm.training.trainer', 'torch._dynamo', __name__])


def train(argv, log, barrier=None):
    """Train in this new process, at the same moment as others that wait at the barrier."""
    with open(log, 'ab') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    if barrier:
        barrier.wait()
    sys.exit(cli.timm(['train.py', *argv]))


def start(argv, log, barrier=None):
    process = FORKS.Process(target=train, args=(argv, log, barrier))
    process.start()
    return process


def finish(process, log):
    process.join(300)
    assert process.exitcode == 0, log.read_text()


def kill_at_random(argv, log, kills, longest, draw):
    """Start a run again and again until it ends, and kill it at most so many times; returns the kills that hit.

    Each process lives for a random share of ``longest`` seconds.
    """
    hits = 0
    while hits < kills:
        process = start(argv, log)
        process.join(draw.uniform(0, longest))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return hits
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        hits += 1
    finish(start(argv, log), log)
    return hits


def content(run):
    """All that a run's folder holds, except its name and how and when it was started."""
    settings = RunDir(run).settings()
    del settings['experiment']
    checkpoints = {path.name: read_checkpoint(path) for path in run.glob('*.pth.tar')}
    for checkpoint in checkpoints.values():
        del checkpoint['args']
    files = {path.name for path in run.iterdir()}
    return {'files': files, 'args': settings, 'summary': (run / 'summary.csv').read_text(), **checkpoints}


def differing(one, other, name=''):
    """Names of the values that differ, in dictionaries and lists of tensors and plain values."""
    if type(one) is not type(other):
        return [name]
    if isinstance(one, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [name]
        return [found for key in one for found in differing(one[key], other[key], f'{name}/{key}')]
    same = torch.equal(one, other) if torch.is_tensor(one) else one == other
    return [] if same else [name]


@pytest.fixture(scope='module', autouse=True)
def forks(tmp_path_factory):
    """Start the process that runs are forked from; the folder of its socket must outlive pytest's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, 'tempdir', str(tmp_path_factory.getbasetemp().parent))
        multiprocessing.util.get_temp_dir()
    process = FORKS.Process(target=time.time)
    process.start()
    process.join()


@pytest.fixture
def argv(workdir):
    """Settings of a run of 8 epochs of 6 batches, of which a test changes some."""
    data = write_folder(workdir / 'images', train=16)
    basic = ['--loss', 'cc', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '8', '--lr', '0.05']
    return [*basic, '--warmup-epochs', '1', '--data-dir', str(data)]


@pytest.mark.parametrize('kills', [pytest.param(1, id='smoke'), 5])
@pytest.mark.parametrize('setting', SETTINGS)
def test_killed_at_any_moment_a_run_ends_as_one_that_was_not(setting, kills, argv, workdir):
    head = loss_class(setting).head if setting in list_losses() else None
    argv = ['--model', f'test_resnet_{head or "cam"}', *argv, *SETTINGS[setting]]
    log, began = workdir / 'log', time.monotonic()
    finish(start([*argv, '--experiment', 'whole'], log), log)
    longest = (time.monotonic() - began) / 2
    whole, draw, hits, number = content(Path('output/train/whole')), random.Random(f'{setting} {kills}'), 0, 0
    while hits < kills:
        name, number = f'cut-{number}', number + 1
        hits += kill_at_random([*argv, '--experiment', name, '--resume', 'auto'], log, kills - hits, longest, draw)
        assert differing(whole, content(Path('output/train', name))) == []
    assert 'Traceback' not in log.read_text()
    print(f'{setting}: {hits} kills of {number} runs')


def interrupted(argv, name, log):
    """The folder of a run that is killed in its third epoch or a later one."""
    run = Path('output/train', name)
    process = start([*argv, '--experiment', name], log)
    while not (run / 'checkpoint-1.pth.tar').exists() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    return run


@pytest.mark.parametrize(
    'fresh, fresh_auto, resumed', [pytest.param(1, 1, 1, id='smoke'), pytest.param(12, 12, 8, id='32')]
)
def test_of_two_processes_on_one_run_one_trains_and_one_refuses(fresh, fresh_auto, resumed, argv, workdir):
    argv, log = ['--model', 'test_resnet_cam', *argv], workdir / 'log'
    finish(start([*argv, '--experiment', 'whole'], log), log)
    whole, cut = content(Path('output/train/whole')), interrupted(argv, 'cut', log)
    for number, kind in enumerate(['fresh'] * fresh + ['fresh auto'] * fresh_auto + ['resumed'] * resumed):
        run, logs = Path('output/train', f'pair-{number}'), [workdir / f'log-{number}-{i}' for i in (1, 2)]
        if kind == 'resumed':
            shutil.copytree(cut, run)
        barrier = FORKS.Barrier(2)
        args = [*argv, '--experiment', run.name, *([] if kind == 'fresh' else ['--resume', 'auto'])]
        pair = [start(args, log, barrier) for log in logs]
        for process in pair:
            process.join(300)
        said = {process.exitcode: log.read_text() for process, log in zip(pair, logs, strict=True)}
        assert said.keys() == {0, 2}, said
        assert re.findall('.*[Ee]rror.*', said[2]) == [said[2].splitlines()[-1]]
        assert said[2].splitlines()[-1].startswith(f"error: The run in '{run}' is in use by another process: ")
        assert differing(whole, content(run)) == []
