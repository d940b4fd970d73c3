"""reproduce: what it runs, skips, resumes, times, prints and refuses. Runs are made in this process."""

import functools
import signal
from pathlib import Path

import pytest
import yaml

from ccl_timm.experiments import reproduce, tables
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.trainer import Trainer

TINY = ['--img-size', '16', '--batch-size', '8', '--workers', '0', '--checkpoint-hist', '1']
TABLE = {
    'title': 'A small table',
    'seeds': 2,
    'datasets': {'own': {'recipe': 'digits', 'set': {'lr': 0.01}}, 'other': {'recipe': 'digits'}},
    'rows': {
        'tiny:ce': {'model': 'test_resnet_linear', 'loss': 'ce', 'paper': {'own': 90.5, 'other': 80}},
        'tiny:cc': {'model': 'test_resnet_cam', 'loss': 'cc', 'paper': {'own': [91.25, 0.5]}},
    },
    'notes': ['made up'],
}


@pytest.fixture
def small_table(workdir, monkeypatch):
    """A table of our own in the place of the papers'."""
    (workdir / 'tables').mkdir()
    (workdir / 'tables' / 'small.yaml').write_text(yaml.safe_dump(TABLE, sort_keys=False))
    monkeypatch.setattr(tables, '_folder', lambda: workdir / 'tables')


@pytest.fixture
def small(run_cli, folder, small_table, started):
    """Run `ccl-timm reproduce small` with these arguments."""

    def run(*argv):
        own = ('--dataset', 'own', '--data-dir', folder, '--epochs', '2', *argv)
        return run_cli('ccl-timm', 'reproduce', 'small', *own, '--', *TINY)

    return run


def values_in(out):
    """The table alone: rows by name, each with the cell of our values and the paper's."""
    lines = out[out.index('A small table') :].splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('| tiny:')]
    return {name: cells for name, *cells in reversed(rows)}  # the first table, not that of the details


@pytest.mark.slow
def test_killed_and_resumed_prints_the_same_table(small, started, monkeypatch):
    code, whole, err = small('--output', 'whole')
    assert code == 0, err
    step, seen = Trainer.train_step, []

    def dies(run, epoch, *rest):
        seen.append(epoch)
        if len(started) == 6 and epoch == 1:  # the second row's first run, in its second epoch
            raise RuntimeError('killed')
        return step(run, epoch, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='killed'):
        patch.setattr(Trainer, 'train_step', dies)
        small('--output', 'cut')
    assert len(started) == 6
    code, resumed, err = small('--output', 'cut')
    assert code == 0, err
    assert err.count('done already') == 1 and 'resuming after 1' in err
    assert values_in(resumed) == values_in(whole) and len(values_in(whole)) == 2
    runs_there = sorted(path.name for path in Path('cut/small').iterdir())
    assert runs_there == [f'own-tiny-{loss}-seed{seed}' for loss in ('cc', 'ce') for seed in (0, 1)]

    count = len(started)
    code, again, err = small('--output', 'cut')
    assert (code, len(started)) == (0, count) and values_in(again) == values_in(whole)
    code, out, err = small('--output', 'cut', '--epochs', '3', '--rows', 'tiny:ce', '--seeds', '1')
    assert code == 1 and 'epochs was 2, is 3): give another --output.' in err


def test_table_has_our_values_and_the_papers(small):
    code, out, err = small('--seeds', '1')
    ours = Path('output/reproduce/small/own-tiny-cc-seed0/summary.csv').read_text().splitlines()[-1].split(',')
    assert code == 0, err
    assert values_in(out)['tiny:cc'] == [f'{float(ours[5]):.2f} (n=1, 2 of 15 epochs)', '91.25 ± 0.50']
    assert 'Note: made up' in out and 'Recipe digits assumes:' in out
    code, out, err = small('--seeds', '1', '--rows', 'tiny:ce')
    assert code == 0 and [*values_in(out)] == ['tiny:ce'] and 'to tiny:cc 91.25' in out


class Running:
    """A process that ends when it is told to, or when it has been looked at some times."""

    def __init__(self, command, looks=3, code=0, **options):
        self.command, self.looks, self.code, self.options, self.ended = command, looks, code, options, []

    returncode = property(lambda self: None if self.looks else self.code)

    def poll(self):
        self.looks -= self.looks > 0
        return self.returncode

    def terminate(self):
        self.ended.append('terminated')

    def wait(self):
        self.ended.append('waited for')


def test_a_row_that_fails_is_reported_and_the_others_go_on(small, monkeypatch):
    start = reproduce.subprocess.Popen
    fails = functools.partial(Running, looks=0, code=2)
    monkeypatch.setattr(reproduce.subprocess, 'Popen', lambda c, **k: fails(c) if 'ce' in c else start(c, **k))
    code, out, err = small('--seeds', '1')
    assert code == 1 and 'own-tiny-ce-seed0 failed with code 2; its messages are above' in err
    assert values_in(out)['tiny:ce'] == ['not run', '90.50']
    assert '(n=1' in values_in(out)['tiny:cc'][0]


@pytest.mark.parametrize('stop, end', [(signal.SIGTERM, ['terminated', 'waited for']), (signal.SIGINT, ['waited for'])])
def test_a_signal_ends_the_jobs_that_run_and_starts_no_other(small, monkeypatch, stop, end):
    """^C reaches them without our help."""
    started = []

    def start(command, **options):
        started.append(Running(command))
        if len(started) == 2:
            assert callable(signal.getsignal(stop)), 'it would kill this process'
            signal.raise_signal(stop)
        return started[-1]

    monkeypatch.setattr(reproduce.subprocess, 'Popen', start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background do not have
    try:
        assert small('--jobs', '3')[0] == 128 + stop
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.ended for process in started] == [end, []], 'the second is not there yet'


def test_several_jobs_at_a_time(small, monkeypatch):
    started, most = [], []

    def start(command, **options):
        number = len(started)
        started.append(Running(command, looks=1 + number, code=int(number == 2), **options))
        most.append(sum(process.returncode is None for process in started))
        options['stderr'].write(b'a message\n')
        return started[-1]

    monkeypatch.setattr(reproduce.subprocess, 'Popen', start)
    monkeypatch.setattr(reproduce.torch, 'get_num_threads', lambda: 6)
    monkeypatch.delenv('OMP_NUM_THREADS')
    code, out, err = small('--jobs', '2')
    assert code == 1 and len(started) == 4 and max(most) == 2
    assert {process.options['env']['OMP_NUM_THREADS'] for process in started} == {'3'}
    log = Path('output/reproduce/small/own-tiny-ce-seed1.log')
    assert (
        f'own-tiny-ce-seed1 failed with code 1; its messages are in {log}, the last: a message' in err
        and err.count(': done') == 3
    )
    assert log.read_bytes() == b'a message\n'


def test_run_of_another_process_is_left_alone(small):
    held = Path('output/reproduce/small/own-tiny-ce-seed0')
    with RunDir(held) as run:
        run.create()
        code, out, err = small('--seeds', '1', '--rows', 'tiny:ce')
    assert code == 1 and 'is in use by another process' in err and {path.name for path in held.iterdir()} == {'.lock'}


def test_dry_run_prints_commands_and_needs_no_data(run_cli, small_table, workdir):
    code, out, err = run_cli('ccl-timm', 'reproduce', 'small', '--dry-run', '--rows', 'tiny:ce', '--', '--amp')
    assert code == 0 and '2 rows checked, 4 runs' in err
    first = out.splitlines()[0]
    assert first == (
        'ccl-timm train --config digits --model test_resnet_linear --loss ce --lr 0.01 --amp --seed 0 '
        '--output output/reproduce/small --experiment own-tiny-ce-seed0 --resume auto'
    )
    assert {path.name for path in workdir.iterdir()} == {'tables'}


def test_estimate_times_rows_and_writes_nothing(small, workdir):
    code, out, err = small('--estimate')
    assert code == 0, err
    lines = out.splitlines()
    hours = [float(line.split()[-1]) for line in lines[1:3]]
    assert lines[3].startswith('in all') and float(lines[3].split()[-1]) == pytest.approx(sum(hours), abs=2e-3)
    assert {path.name for path in workdir.iterdir()} == {'tables'}


@pytest.mark.parametrize(
    'argv, message',
    [
        (['cc-tabel1'], "Unknown table 'cc-tabel1'; did you mean 'cc-table1'?"),
        (['cc-table1', '--dataset', 'mnits'], "no data set 'mnits'; did you mean 'mnist'?"),
        (['cc-table1', '--dataset', 'mnist', '--rows', 'resnet18:c'], "no row 'resnet18:c' for mnist"),
        (['cc-table1', '--dataset', 'mnist', '--seeds', '0'], '--seeds: 0 must be at least 1'),
        (['cc-table1'], 'several data sets: give --dataset mnist|cifar100|cars196'),
        (['cc-table1', '--dataset', 'mnist', '--rows', 'resnet18:cc'], 'mnist resnet18:cc needs its data'),
        (['cc-table1', '--dataset', 'mnist', '--rows', 'resnet18:cc', '--data-dir', 'no'], "no data folder 'no'"),
        (['pod-table2', '--rows', 'resnet50:pod:dim9', '--dry-run', '--', '--lrr', '1'], "Unknown argument '--lrr'"),
    ],
)
def test_reproduce_refuses(argv, message, run_cli, workdir):
    code, out, err = run_cli('ccl-timm', 'reproduce', *argv)
    assert code == 2 and message in err
    assert not any(workdir.iterdir())


def test_tables_are_listed(run_cli):
    code, out, err = run_cli('ccl-timm', 'reproduce')
    assert [line.split()[0] for line in out.splitlines()[1:]] == tables.list_tables()
