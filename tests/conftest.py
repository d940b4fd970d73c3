"""Small data and short runs that tests share."""

import json
import os
import subprocess
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ccl_timm import cli
from ccl_timm.experiments import reproduce
from ccl_timm.training import step_timing

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test may reach a network
# Beside others a process with several threads is many times slower, not faster. Workers inherit what the process that
# starts them has set.
THREADS = 1 if 'PYTEST_XDIST_WORKER' in os.environ else 2
os.environ['OMP_NUM_THREADS'] = str(THREADS)
torch.set_num_threads(THREADS)

TINY = ['--model', 'test_resnet_cam', '--loss', 'cc', '--img-size', '32', '-b', '8', '-j', '0', '--epochs', '1']


def write_folder(root, classes=('ant', 'bee', 'cat'), train=8, validation=4, seed=0):
    """A folder of noise images whose classes differ in brightness."""
    random = np.random.default_rng(seed)
    for part, count in (('train', train), ('validation', validation)):
        for label, name in enumerate(classes):
            for number in range(count):
                path = root / part / name / f'{number}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 100, (12, 12, 3), np.uint8) + np.uint8(50 * (label % 4))).save(path)
    return root


@pytest.fixture(scope='session', autouse=True)
def nothing_outside_tmp(tmp_path_factory):
    """Home, caches and temporary files of the tests, and of processes that they start, are inside pytest's folder."""
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch:
        for name in ('HOME', 'XDG_CACHE_HOME', 'XDG_CONFIG_HOME', 'MPLCONFIGDIR', 'TMPDIR'):
            patch.setenv(name, str(home))
        patch.delenv('CCL_TIMM_CACHE', raising=False)
        patch.setenv('TORCHINDUCTOR_CACHE_DIR', str(home / 'inductor'))
        patch.setattr(tempfile, 'tempdir', str(home))
        yield home


@pytest.fixture(scope='session', autouse=True)
def no_timed_steps():
    """What a run computes does not depend on how busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timing, 'time_choices', lambda *args, **kwargs: {})
        yield


@pytest.fixture(autouse=True)
def same_threads():
    """No test leaves another number of threads to the next."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder of 3 classes with 8 training and 4 validation images each. Do not change it."""
    return write_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_cli(capsys):
    """Run a command line in this process: ``run_cli('timm', 'train.py', ...)`` -> (code, stdout, stderr)."""

    def run(program, *argv):
        entry = {'timm': cli.timm, 'ccl-timm': cli.main}[program]
        capsys.readouterr()
        try:
            code = entry([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse's --help, and scripts that leave by themselves
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def started(monkeypatch):
    """Commands that reproduce starts; they run in this process, which is many times faster."""
    commands = []

    class Popen:
        def __init__(self, command, **kwargs):
            commands.append(command[3:])
            self.returncode = cli.main(command[3:])

        def poll(self):
            return self.returncode

    fake = SimpleNamespace(run=lambda *args, **kwargs: None, Popen=Popen, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(reproduce, 'subprocess', fake)
    return commands


@pytest.fixture(scope='session')
def trained(folder, tmp_path_factory):
    """Folder of a finished run of two epochs, of a model that timm knows by name. Do not change it."""
    output = tmp_path_factory.mktemp('runs')
    argv = [
        'train.py',
        *TINY,
        '--model',
        'resnet18_cam',
        '--epochs',
        '2',
        '--data-dir',
        str(folder),
        '--output',
        str(output),
    ]
    assert cli.timm([*argv, '--experiment', 'run', '--mean', '0.4', '--std', '0.2', '--crop-pct', '1.0']) == 0
    return output / 'run'


def results(stdout):
    """The JSON that a script printed after ``--result``."""
    return json.loads(stdout.split('--result')[-1])
