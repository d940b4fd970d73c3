"""reproduce and compare: what they run, skip, resume, time, print and refuse. Runs are made in this process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from ccl_timm.experiments import compare, reproduce, tables
from ccl_timm.heads import head_class
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


def test_compare_has_a_control_on_every_head_and_claims_nothing_unshown(run_cli, folder, workdir, started):
    argv = ['--config', 'digits', '--data-dir', folder, '--losses', 'cc', '--backbone', 'test_resnet', '--epochs', '1']
    code, out, err = run_cli('ccl-timm', 'compare', *argv, '--seeds', '2', '--lr', '0.01', '0.02', '--', *TINY)
    assert code == 0, err
    rows = [line for line in out.splitlines() if re.match(r'(ce|cc)\b.* (linear|cam) ', line)]
    assert [row.split('  ')[0] for row in rows] == ['ce', 'ce (control)', 'cc']
    assert rows[2].count('no difference shown') == 2 and '0.0' in rows[2]
    assert len(started) == 3 * 2 * 2
    output = workdir / 'output' / 'compare'
    assert (output / 'compare.txt').read_text() in out
    written = {(row['head'], row['loss']): row['top1'] for row in json.loads((output / 'compare.json').read_text())}
    assert written.keys() == {('linear', 'ce'), ('cam', 'ce'), ('cam', 'cc')} and {*map(len, written.values())} == {2}
    assert {yaml.safe_load(path.read_text())['smoothing'] for path in output.rglob('args.yaml')} == {0.0}
    code, out, err = run_cli('ccl-timm', 'compare', *argv, '--seeds', '1', '--lr', '0.01', '--', *TINY)
    assert len(started) == 12 and 'one seed, no test' in out


def test_rows_of_a_comparison():
    rows = compare.rows_of('resnet18', ['ce', 'focal', 'arcface', 'pod'], [], ['--config', 'finetune'])
    assert [row.name for row in rows] == [
        'linear:ce', 'linear:focal', 'cosine:ce', 'cosine:arcface', 'pedcc:ce', 'pedcc:pod'
    ]  # fmt: skip
    assert rows[3].args == ('--config', 'finetune', '--model', 'resnet18_cosine', '--loss', 'arcface')


def accuracy_with_cross_entropy(head, num_classes, dim=64, images=10):
    """Top-1 in % on new samples of Gaussian classes, after 8 epochs of a small network with this head."""
    torch.manual_seed(0)
    means, target = torch.randn(num_classes, dim), torch.arange(num_classes).repeat_interleave(images)
    samples, unseen = (means[target] + torch.randn(len(target), dim) for _ in range(2))
    body = nn.Sequential(nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.ReLU())
    network = nn.Sequential(body, head_class(head)(256, num_classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(8):
        for batch in torch.randperm(len(target)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(samples[batch]), target[batch]).backward()
            optimizer.step()
    return (network.eval()(unseen).argmax(1) == target).float().mean().item() * 100


def test_cross_entropy_trains_as_well_on_the_pedcc_head_as_on_the_linear_one():
    """The control of `compare`: with bare cosines as logits it ends at 2.5 % here, the linear head at 93 %."""
    assert accuracy_with_cross_entropy('pedcc', 196) > accuracy_with_cross_entropy('linear', 196) - 2


def test_pedcc_head_chooses_the_nearest_centroid_and_is_sure_of_a_sample_on_it():
    head = head_class('pedcc')(196, 196, feature_dim=196)
    nn.init.eye_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)
    assert nn.functional.cross_entropy(head(head.weight), torch.arange(196)) < 1e-3  # 4.28 for bare cosines
    outputs = head.outputs(torch.randn(64, 196))
    assert torch.equal(outputs.logits.argmax(1), outputs.cosine.argmax(1))
    assert head_class('pedcc')(8, 4, scale=2.0)(torch.randn(64, 8)).abs().max() <= 2.001


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--losses', 'cc', 'acrface'], "Unknown loss 'acrface'; did you mean 'arcface'?"),
        (['--lr', '0.1', 'fast'], "--lr: 'fast' is not a number"),
        (['--seeds', '0'], '--seeds: 0 must be at least 1'),
        (['--data-dir', 'nowhere'], "There is no data folder 'nowhere'"),
        ([], 'needs its data: give --data-dir DIR.'),
        (['--backbone', 'resnett18', '--dry-run'], "Unknown model 'resnett18_linear'"),
    ],
)
def test_compare_refuses(argv, message, run_cli, workdir):
    code, out, err = run_cli('ccl-timm', 'compare', *argv)
    assert code == 2 and message in err


@pytest.mark.slow
def test_real_kill_of_the_whole_group(workdir):
    """The processes themselves: killed in the middle of a run, started again, and the same table as without."""
    command = [sys.executable, '-m', 'ccl_timm', 'compare', '--config', 'digits', '--losses', 'ce', '--backbone',
               'test_resnet', '--seeds', '2', '--epochs', '3', '--output']  # fmt: skip
    after = ['--', '--input-size', '1', '16', '16', '--batch-size', '32']
    whole = subprocess.run([*command, 'whole', *after], capture_output=True, text=True, check=True).stdout
    process = subprocess.Popen([*command, 'cut', *after], start_new_session=True, stderr=subprocess.DEVNULL)
    summary = workdir / 'cut' / 'linear-ce-seed1' / 'summary.csv'
    while not summary.exists():
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(summary.read_text().splitlines()) < 4
    again = subprocess.run([*command, 'cut', *after], capture_output=True, text=True, check=True)
    assert again.stdout == whole and 'linear-ce-seed0: done already' in again.stderr
