"""Faults that a run must survive or name: signals, kills, a second process, damaged files, full disks, numbers that are
not finite."""

import contextlib
import csv
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ccl_timm import cli
from ccl_timm.training.checkpoint_files import read_checkpoint
from ccl_timm.training.folder_lock import FolderLock
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.trainer import Trainer

RUN = Path('output/train/a')
ARGS = ['--model', 'test_resnet', '--loss', 'ce', '--img-size', '32', '-b', '8', '-j', '0', '--lr', '0.05']
ARGS += ['--warmup-epochs', '1', '--epochs', '3', '--experiment', 'a']


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """Folder of an uninterrupted run of ``ARGS``. Do not change it."""
    output = tmp_path_factory.mktemp('whole')
    assert cli.timm(['train.py', *ARGS, '--data-dir', str(folder), '--output', str(output)]) == 0
    return output / 'a'


@pytest.fixture
def run(whole, workdir):
    """A copy of that run, where ``train`` goes on with it; its checkpoints share no bytes on disk."""
    shutil.copytree(whole, RUN)
    return RUN


@pytest.fixture
def fit(run_cli, folder, workdir):
    """Train in the working folder."""

    def fit(*argv):
        return run_cli('timm', 'train.py', *ARGS, '--data-dir', folder, *argv)

    return fit


@pytest.fixture
def resume(fit):
    return lambda *argv: fit(*argv, '--resume', 'auto')


def assert_refused(result, *texts):
    """A command ended with code 2 and one sentence that contains these texts."""
    code, out, err = result
    last = err.splitlines()[-1]
    assert (code, err.count('error:'), last[:7]) == (2, 1, 'error: '), err
    assert all(text in last for text in texts), last


def assert_equal_runs(first, second):
    """Both runs measured and learnt the same."""
    assert (first / 'summary.csv').read_text() == (second / 'summary.csv').read_text()
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        one, other = (read_checkpoint(run / name) for run in (first, second))
        assert one['epoch'] == other['epoch']
        assert all(torch.equal(value, other['state_dict'][key]) for key, value in one['state_dict'].items())


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@contextlib.contextmanager
def in_second_step_of(epoch, fault):
    """Call ``fault`` in the midst of an epoch, counted from 0."""
    step, seen = Trainer.train_step, []

    def train_step(run, now, *rest):
        seen.append(now)
        if seen.count(epoch) == 2:
            fault()
        return step(run, now, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, 'train_step', train_step)
        yield


def stopped_by_hand():
    raise KeyboardInterrupt


# -- interruptions


def test_a_resumed_plateau_schedule_is_that_of_an_uninterrupted_run(fit, resume):
    plateau = ['--sched', 'plateau', '--patience-epochs', '1', '--decay-rate', '0.5', '--epochs', '8']
    assert fit(*plateau, '--experiment', 'whole')[0] == 0
    with in_second_step_of(6, stopped_by_hand):
        assert fit(*plateau)[0] == 130
    code, out, err = resume(*plateau)
    assert code == 0 and 'resuming after 6' in err, err
    with open(RUN / 'summary.csv', newline='') as file:
        rates = [float(row['lr']) for row in csv.DictReader(file)]
    assert rates[1] == 0.05 and 1e-4 < rates[-1] < 0.05  # warmed up, then reduced
    assert_equal_runs(RUN, RUN.with_name('whole'))


def test_a_plateau_schedule_without_its_metrics_is_not_resumed(fit, resume):
    plateau = ['--sched', 'plateau', '--epochs', '3']
    with in_second_step_of(2, stopped_by_hand):
        fit(*plateau)
    (RUN / 'summary.csv').unlink()
    assert_refused(resume(*plateau), '--sched plateau resumes with the summary.csv', 'restore a copy of it')


def test_files_that_lie_in_the_folder_do_not_keep_a_run_from_going_on(fit, resume, whole):
    RUN.mkdir(parents=True)
    (RUN / 'slurm.log').write_text('mine')
    (RUN / 'args.yaml.tmp').write_text('mod')  # of a kill while args.yaml was written
    with in_second_step_of(1, stopped_by_hand):
        assert resume()[0] == 130
    code, out, err = resume()
    assert code == 0 and 'resuming after 1' in err
    assert_equal_runs(RUN, whole)
    assert [path.name for path in RUN.parent.iterdir()] == ['a'] and (RUN / 'slurm.log').read_text() == 'mine'


@pytest.mark.parametrize(
    'number, code, saving',
    [
        (signal.SIGTERM, 143, True),
        (signal.SIGHUP, 129, False),
        pytest.param(signal.SIGTERM, 143, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_after_it_has_saved(number, code, saving, fit, resume, whole, monkeypatch):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip('nohup: a run goes on')

    def stop():
        assert callable(signal.getsignal(number)), 'it would kill this process'
        signal.raise_signal(number)

    write_row = RunDir.add_row
    with monkeypatch.context() as patch, contextlib.nullcontext() if saving else in_second_step_of(1, stop):
        if saving:
            patch.setattr(RunDir, 'add_row', lambda *args, **kwargs: (write_row(*args, **kwargs), stop()))
        stopped, out, err = fit()
    assert stopped == code and f'stopped by {number.name}' in err
    assert signal.getsignal(number) is signal.SIG_DFL
    rows = RunDir(RUN).rows()
    assert len(rows) == 1 and read_checkpoint(RUN / 'last.pth.tar')['epoch'] == 0
    assert resume()[0] == 0
    assert_equal_runs(RUN, whole)


def test_a_signal_that_is_ignored_stays_so(fit):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with in_second_step_of(0, lambda: signal.raise_signal(signal.SIGHUP)):
            assert fit('--epochs', '1')[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def start_two_processes(folder):
    """Train on two processes until the first epoch begins; a folder's name tells them from all others."""
    program = 'import sys; from ccl_timm.cli import timm; sys.exit(timm())'
    command = [sys.executable, '-c', program, '--nproc', '2', 'train.py', *ARGS, '-b', '4', '--epochs', '10000']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(
        [*command, '--data-dir', folder], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    for line in process.stderr:
        if line.startswith('epoch 1/'):
            return process
    raise AssertionError(f'ended with {process.wait()}')


def processes_with(text):
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if os.fsencode(text) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc').is_dir(), reason='processes are listed in /proc')
@pytest.mark.parametrize('number, code, killed', [(signal.SIGINT, 130, False), (signal.SIGKILL, 137, True)])
def test_two_processes_end_together(number, code, killed, folder, workdir):
    folder = shutil.copytree(folder, workdir / 'images')
    process = start_two_processes(folder)
    workers = [pid for pid in processes_with(folder) if pid != process.pid]
    try:
        assert len(workers) == 2
        os.kill(workers[1] if killed else process.pid, number)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code and 'Traceback' not in err, err
    errors = [line for line in err.splitlines() if line.startswith('error:')]
    assert len(errors) == killed  # said by the launcher, or by the process that lost the other
    assert all('A process was killed by SIGKILL' in line or 'Another process of this run' in line for line in errors)
    deadline = time.monotonic() + 10
    while processes_with(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(folder) == []


# -- two processes on one run


@pytest.mark.parametrize('argv', [[], ['--resume', 'auto']])
def test_a_run_in_use_is_left_alone(argv, run, fit):
    before = content(run)
    with FolderLock() as lock:
        assert lock.take(run)
        used = "The run in 'output/train/a' is in use by another process"
        assert_refused(fit(*argv), used if argv else 'already holds a run')
    assert content(run) == {**before, run / '.lock': b''}
    assert fit('--resume', 'auto')[0] == 0


def test_a_folder_in_which_a_run_is_about_to_begin_is_left_alone(fit, workdir):
    RUN.mkdir(parents=True)
    with FolderLock() as lock:
        assert lock.take(RUN)
        assert_refused(fit(), "The run in 'output/train/a' is in use by another process")
        assert [path.name for path in RUN.iterdir()] == ['.lock']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no processes by fork')
def test_the_lock_of_a_killed_process_is_free_though_its_worker_lives(run, resume):
    receiver, sender = os.pipe()
    holder = os.fork()
    if holder == 0:
        FolderLock().take(run)
        worker = os.fork()
        if worker:
            os.write(sender, f'{worker}\n'.encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(receiver, 20))
    try:
        assert_refused(resume(), 'is in use by another process')
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert resume()[0] == 0
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(receiver)
        os.close(sender)


# -- damaged files

DAMAGE = [b'', b'{', b'\xff\xfe\x00\x80', b'[1]\n', b'!!python/object/apply:os.mkdir [executed]\n']
SUMMARY_DAMAGE = [b'\xff\xfe\x00\x80', b'epoch,lr\nx,y\n', b'\0\n\0\n', b'stray\n']


@pytest.mark.parametrize(
    'name, expected',
    [
        ('args.yaml', {'train': 2, 'validate': 0, 'card': 2, 'report': 2}),
        ('environment.json', {'train': 2, 'validate': 0, 'card': 2, 'report': 2}),
        ('summary.csv', {'train': 2, 'validate': 0, 'card': 2, 'report': 2}),
    ],
)
@pytest.mark.parametrize('command', ['train', 'validate', 'card', 'report'])
def test_damaged_files_of_a_run_are_named(command, name, expected, run, run_cli, resume):
    """Or not needed: a checkpoint holds the settings too."""
    for damage in DAMAGE if name != 'summary.csv' else SUMMARY_DAMAGE:
        (run / name).write_bytes(damage)
        before = content(run)
        result = {
            'train': resume,
            'validate': lambda: run_cli('timm', 'validate.py', run, '-j', '0'),
            'card': lambda: run_cli('ccl-timm', 'card', run),
            'report': lambda: run_cli('ccl-timm', 'report', run.parent),
        }[command]()
        if command == 'report' and expected[command]:
            assert_refused(result, 'None of these runs is finished')
            assert "left out: 'output/train/a" in result[2] and name in result[2]
        elif expected[command]:
            assert_refused(result, "'output/train/a", name)
        else:
            assert result[0] == 0, result[2]
        assert content(run) == {run / '.lock': b'', **before}
    assert not Path('executed').exists()


def flip(path):
    """Change bytes of the weights; nothing but check sums tells."""
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 2000] = bytes(255 - byte for byte in damaged[middle : middle + 2000])
    path.write_bytes(damaged)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize('damage, said', [(flip, 'is damaged'), (truncate, '')])
def test_a_run_goes_on_from_the_newest_intact_checkpoint(damage, said, run, resume, whole):
    for name in ('last.pth.tar', 'checkpoint-2.pth.tar'):  # the same file, where the system has hard links
        damage(run / name)
    code, out, err = resume()
    assert code == 0 and said in err and 'resuming after 2' in err, err
    assert_equal_runs(run, whole)


@pytest.mark.parametrize('damage', [flip, truncate])
def test_a_damaged_checkpoint_is_not_used(damage, run, run_cli, fit, folder):
    damage(run / 'model_best.pth.tar')
    for argv in (
        ('timm', 'validate.py', run, '-j', '0'),
        ('ccl-timm', 'predict', run, folder),
        ('ccl-timm', 'export', run, 'exported'),
        ('timm', 'train.py', *ARGS, '--data-dir', folder, '--experiment', 'b', '--resume', run / 'model_best.pth.tar'),
    ):
        assert_refused(run_cli(*argv), "model_best.pth.tar' is ")
    assert not Path('exported').exists() and not RUN.with_name('b').exists()


# -- disks and names


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def no_large_files():
    """A function after which no file can grow beyond 100 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('fault', ['checkpoint', 'summary'])
def test_a_full_disk_loses_nothing(fault, fit, resume, whole, no_large_files, monkeypatch):
    with monkeypatch.context() as patch:
        if fault == 'checkpoint':
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            with in_second_step_of(1, no_large_files):
                result = fit()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        else:
            with in_second_step_of(1, lambda: patch.setattr(RunDir, 'add_row', lambda *a, **k: full_disk())):
                result = fit()
    assert_refused(result, "'output/train/a' cannot be written", 'MB free', '--resume auto resumes')
    code, out, err = resume()
    assert code == 0 and 'resuming after 1' in err
    assert_equal_runs(RUN, whole)


@pytest.mark.parametrize(
    'argv',
    [
        ('timm', 'train.py', *ARGS, '--output', 'full'),
        ('ccl-timm', 'export', RUN, 'full'),
        ('ccl-timm', 'card', RUN, '-o', 'full'),
        ('ccl-timm', 'report', RUN, '--record', 'full/a.jsonl'),
        ('ccl-timm', 'data', 'digits', 'full'),
    ],
    ids=['train', 'export', 'card', 'report', 'digits'],
)
@pytest.mark.parametrize('number', [errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_named(number, argv, run, run_cli, folder, workdir, monkeypatch):
    mkdir = os.mkdir

    def refuse(path, *rest, **kwargs):
        if workdir in Path(path).resolve().parents:
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *rest, **kwargs)

    monkeypatch.setattr(os, 'mkdir', refuse)
    before = content(run)
    result = run_cli(*argv, *(['--data-dir', folder] if argv[0] == 'timm' else []))
    if number == errno.ENOSPC and argv[0] == 'timm':
        assert_refused(result, "'full/a' cannot be written", 'MB free')
    else:
        assert_refused(result, os.strerror(number))
    assert content(run) == before and not Path('full').exists()


@pytest.mark.parametrize(
    'name, message',
    [
        ('../x', "--experiment '../x' must be a name of a folder below --output"),
        ('/tmp/x', "--experiment '/tmp/x' must be a name"),
        ('..', "--experiment '..' must be a name"),
        ('a\0b', "--experiment 'a\\x00b' must be a name"),
        ('a' * 4000, 'is longer than the 255 bytes of a file name'),
    ],
    ids=['above', 'absolute', 'dots', 'NUL', 'long'],
)
def test_a_name_that_no_folder_below_the_output_can_have(name, message, fit, workdir):
    result = fit('--experiment', name)
    assert_refused(result, message)
    assert len(result[2].splitlines()[-1]) < 400
    assert not any(workdir.iterdir())


# -- numbers that are not finite


def test_a_validation_loss_that_is_not_finite_is_no_result(fit):
    """The only batch of the epoch has a finite loss, and gradients after which no weight is."""
    argv = ['--model', 'test_resnet_cam', '--loss', 'cc', '--loss-kwargs', 'weight=1e36', '-b', '24', '--lr', '1000']
    result = fit(*argv, '--warmup-epochs', '0', '--epochs', '1')
    assert_refused(result, 'The validation loss became nan in epoch 1', 'lower the learning rate')
    assert not list(RUN.glob('*.pth.tar')) and '--result' not in result[1]


def test_a_model_that_diverged_is_not_used(run, run_cli, folder):
    said = "has weights that are not finite numbers, such as 'fc.bias': its training diverged"
    assert run_cli('ccl-timm', 'export', run, 'exported')[0] == 0
    weights = safetensors.torch.load_file('exported/model.safetensors')
    weights['fc.bias'][0] = float('nan')
    safetensors.torch.save_file(weights, 'exported/model.safetensors', {'format': 'pt'})
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=False)
    checkpoint['state_dict']['fc.bias'][0] = float('nan')
    torch.save(checkpoint, run / 'model_best.pth.tar')
    for source in (run, 'exported'):
        assert_refused(run_cli('ccl-timm', 'predict', source, folder, '--format', 'json'), said)
        assert_refused(run_cli('timm', 'validate.py', source, '-j', '0', '--data-dir', folder), said)
    assert_refused(run_cli('ccl-timm', 'export', run, 'again'), said)
    assert not Path('again').exists()


# -- settings that compute, but not what was meant


def test_one_image_at_a_time_is_refused_where_batch_norm_cannot_take_it(fit):
    argv = ['-b', '1', '--epochs', '1']
    assert_refused(fit(*argv), "'test_resnet' cannot be trained with --batch-size 1, give 2 or more")
    assert not RUN.exists()
    assert fit(*argv, '--img-size', '64')[0] == 0  # its last feature map has more than one pixel


def test_a_warm_up_that_outlasts_the_run_is_warned_of(fit):
    code, out, err = fit('--warmup-epochs', '5', '--epochs', '1')
    assert code == 0 and 'warning: --warmup-epochs is 5, the run has 1: the learning rate ends near 1e-05' in err
    for name, argv in {'b': ['--epochs', '2'], 'c': ['--epochs', '1', '--sched-on-updates']}.items():
        code, out, err = fit('--warmup-epochs', '1', *argv, '--experiment', name)
        assert code == 0 and '--warmup-epochs is' not in err


@pytest.mark.parametrize(
    'term, argv',
    [
        ('sc', ['--loss', 'pod', '--model', 'test_vit_pedcc', '-b', '1']),
        ('fical', ['--loss', 'fical', '--model', 'test_resnet_cosine', '--loss-kwargs', 'exponent=1000']),
    ],
)
def test_a_term_without_effect_is_not_put_down_to_pairs(term, argv, fit):
    code, out, err = fit(*argv, '--epochs', '1')
    assert code == 0, err
    assert f"loss term '{term}' was zero in 100% of this epoch's batches and had no effect there." in err
    assert 'no two images' not in err
