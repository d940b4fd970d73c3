"""reproduce: what it runs, skips, resumes, times, prints and refuses. Runs are made in this process."""

import signal
from pathlib import Path
from types import SimpleNamespace

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


def test_a_row_that_fails_is_reported_and_the_others_go_on(small, monkeypatch):
    run, fails = reproduce.subprocess.run, SimpleNamespace(returncode=2)
    monkeypatch.setattr(reproduce.subprocess, 'run', lambda c, **k: fails if 'ce' in c else run(c, **k))
    code, out, err = small('--seeds', '1')
    assert code == 1 and 'own-tiny-ce-seed0 failed with code 2' in err
    assert values_in(out)['tiny:ce'] == ['not run', '90.50']
    assert '(n=1' in values_in(out)['tiny:cc'][0]


def test_a_signal_ends_the_job_and_all_that_follow(small, monkeypatch):
    """subprocess.run kills its process if an exception comes out of it."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        assert callable(signal.getsignal(signal.SIGTERM)), 'it would kill this process'
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reproduce.subprocess, 'run', run)
    assert small()[0] == 143 and len(commands) == 1


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
