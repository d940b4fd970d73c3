"""report: which runs are behind which value, what is printed of them, what is left out and what is refused."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from scipy import stats

from ccl_timm.experiments import matching, report, results, tables
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.run_dir import RunDir

TABLE1 = ('--config', 'cc_mnist', '--model', 'resnet18_cam', '--loss', 'cc')
CE = ('--config', 'cc_mnist', '--model', 'resnet18_linear', '--loss', 'ce')


def write_run(folder, argv, top1, summary=None, environment=None, **more):
    """The files of a run with these arguments of the training script and these values, one per epoch."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    settings = TrainConfig.resolve(list(argv)).settings()
    settings |= {'epochs': len(top1), 'data_dir': '/some/where/mnist', 'class_names': ['0', '1'], 'resume': '', **more}
    settings.pop('config')
    (folder / 'args.yaml').write_text(yaml.safe_dump(settings))
    lines = ['epoch,train_loss,eval_loss,eval_top1,lr']
    lines += [f'{epoch},0.5,0.25,{value},0.1' for epoch, value in enumerate(top1)]
    (folder / 'summary.csv').write_text(summary if summary is not None else '\n'.join(lines) + '\n')
    if environment:
        (folder / 'environment.json').write_text(json.dumps(environment))
    return folder


@pytest.fixture
def runs_of_table1(workdir):
    """Three seeds of cc, two of ce, in folders whose names say nothing."""
    for seed, top1 in enumerate(([90, 98.6, 98.4], [91, 98.5, 98.5], [92, 98.8, 98.7])):
        write_run(f'runs/x{seed}', TABLE1, top1, seed=seed)
    for seed, top1 in enumerate(([90, 97.0, 97.4], [91, 97.9, 97.8])):
        write_run(f'runs/deeper/y{seed}', CE, top1, seed=seed)
    return workdir


def lines_of(markdown, first):
    """Cells of the lines that begin with a cell."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in markdown.splitlines() if line[:1] == '|']
    return [row for row in rows if row[0] == first]


def test_table_stands_beside_the_papers(runs_of_table1, run_cli):
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')
    assert (code, err) == (0, '')
    layout, line = lines_of(out, 'resnet18:cc')
    assert layout[1:3] == ['98.53 ± 0.15 (n=3, 3 of 300 epochs)', '98.52 ± 0.09']
    assert layout[3:] == ['not run', '78.23 ± 0.07', 'not run', '88.41 ± 0.06']
    header = lines_of(out, 'row')[1]
    cells = dict(zip(header, line, strict=True))
    assert (cells['seeds'], cells['epochs'], cells["recipe's epochs"]) == ('3', '3', '300')
    assert cells['last epoch'] == '98.53 ± 0.15' and cells['difference'] == '+0.01'
    assert cells['best epoch'] == '98.63 ± 0.15'
    assert cells['against the best other'] == '+0.08 to resnet18:mc 98.45'  # no p after 3 of 300 epochs
    low, high = stats.ttest_ind([98.4, 98.5, 98.7], [97.4, 97.8], equal_var=False).confidence_interval()
    assert cells['against our ce'].startswith(f'+0.93 [{low:+.2f}, {high:+.2f}] no difference shown')
    assert cells['against our ce'].endswith(' [linear]')
    assert lines_of(out, 'vgg16:cc')[0][1] == 'not run' and lines_of(out, 'resnet18:mc')[0][-2:] == ['', '']
    assert 'Note: fical is reimplemented' in out


def test_chosen_rows_keep_their_tests_and_are_drawn(runs_of_table1, run_cli):
    whole = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    chosen = ['--table', 'cc-table1', '--rows', 'resnet18:cc']
    code, out, err = run_cli('ccl-timm', 'report', 'runs', *chosen, '--plot', 'curves.svg')
    assert (code, err) == (0, 'written: curves.svg\n')
    layout, line = lines_of(out, 'resnet18:cc')
    assert line == lines_of(whole, 'resnet18:cc')[1] and not lines_of(out, 'resnet18:ce')
    drawn = Path('curves.svg').read_text()
    assert 'resnet18:cc (n=3)' in drawn and 'resnet18:ce' not in drawn


@pytest.mark.parametrize('more', [['--rows', 'resnet18:focal'], []], ids=['rows', 'repeated'])
def test_neither_rows_nor_repeated_runs_change_the_tests(more, workdir, run_cli):
    values = {TABLE1: [98.4, 98.5, 98.8], CE: [97.4, 97.8, 97.5], (*CE[:-1], 'focal'): [97.9, 97.8, 98.2]}
    for argv, top1 in values.items():
        for seed, value in enumerate(top1):
            for name in ('runs', 'again'):
                write_run(f'{name}/{argv[-1]}{seed}', argv, [value], seed=seed)
    whole = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    other = run_cli('ccl-timm', 'report', 'runs', *([] if more else ['again']), '--table', 'cc-table1', *more)[1]
    assert lines_of(whole, 'resnet18:focal') == lines_of(other, 'resnet18:focal')
    assert 'for the 2 tests' in whole and 'for the 2 tests' in other


def test_runs_of_a_row_that_differ_in_epochs_have_columns_of_their_own(workdir, run_cli):
    measured = {'epoch': 0, 'split': 'validation', 'measures': {'images': 100}}
    for epochs in (1, 2):
        folder = write_run(f'runs/{epochs}', TABLE1, [98.0] * epochs, seed=0)
        (folder / 'features.json').write_text(json.dumps({**measured, 'epoch': epochs - 1}))
    out = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    assert '| resnet18:cc | resnet18:cc, 1 epochs |' in out


def test_only_tests_that_can_be_made_are_counted_over_all_runs_given(workdir, run_cli):
    """Two seeds on both sides make a test, whatever row shows them; one seed makes none, nor another backbone's two."""
    other = ('--model', 'test_resnet_cam'), ('--model', 'test_resnet_linear')
    for number, (options_of_run, top1) in enumerate((
        (TABLE1, 98.1), (TABLE1, 98.2), (CE, 97.1), (CE, 97.3), ((*CE[:-1], 'focal'), 97.5),
        ((*TABLE1, '--batch-size', '64'), 98.5), ((*TABLE1, '--batch-size', '64'), 98.6),
        ((*CE, '--batch-size', '64'), 97.5), ((*CE, '--batch-size', '64'), 97.8),
        ((*TABLE1, *other[0]), 98.5), ((*TABLE1, *other[0]), 98.6), ((*CE, *other[1]), 97.5), ((*CE, *other[1]), 97.8),
    )):  # fmt: skip
        write_run(f'runs/{number}', options_of_run, [top1], seed=number)
    out = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    assert "p < 0.05 after Holm's correction for the 2 tests" in out
    assert lines_of(out, 'resnet18:focal')[1][-2] == 'one seed, no test [linear]'


def test_a_run_with_another_optimizer_than_its_row_is_marked(workdir, run_cli):
    write_run('runs/old', (*TABLE1, '--opt', 'sgd', '--opt-kwargs'), [98], seed=0)
    write_run('other/new', TABLE1, [98], seed=0)
    settings = {}
    for name in ('runs', 'other'):
        header, row = (lines_of(run_cli('ccl-timm', 'report', name, '--table', 'cc-table1')[1], key)[1]
                       for key in ('row', 'resnet18:cc'))  # fmt: skip
        settings[name] = dict(zip(header, row, strict=True)).get('settings')
    assert settings == {'runs': 'opt=sgd', 'other': None}


def test_a_p_against_the_papers_value_takes_all_epochs_and_images(workdir, run_cli):
    for seed, top1 in enumerate((98.4, 98.5, 98.7)):
        write_run(f'runs/{seed}', TABLE1, [50.0] * 299 + [top1], seed=seed)
    out = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    p = stats.ttest_1samp([98.4, 98.5, 98.7], 98.45).pvalue
    assert f'+0.08 to resnet18:mc 98.45, p = {p:.2g}' in lines_of(out, 'resnet18:cc')[1]


def test_json_and_csv_have_what_summary_csv_has(runs_of_table1, run_cli):
    records = json.loads(run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1', '--format', 'json')[1])[
        'records'
    ]
    found = {(record['row'], record['data']): record for record in records}
    assert len(records) == len(tables.read_table('cc-table1').rows)
    cc = found['resnet18:cc', 'mnist']
    assert cc['last_epoch'] == [98.4, 98.5, 98.7] and cc['best_epoch'] == [98.6, 98.5, 98.8]
    assert cc['seeds'] == [0, 1, 2] and cc['paper'] == 98.52 and cc['runs'] == ['runs/x0', 'runs/x1', 'runs/x2']
    assert found['vgg16:cc', 'mnist']['last_epoch_mean'] is None
    out = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1', '--format', 'csv')[1]
    rows = {(row['row'], row['data']): row for row in csv.DictReader(out.splitlines())}
    assert rows['resnet18:ce', 'mnist']['last_epoch'] == '97.4;97.8'
    assert float(rows['resnet18:cc', 'mnist']['p_ce']) == cc['p_ce']


def test_report_is_the_same_from_the_records_alone(runs_of_table1, run_cli):
    """As in hub_cards/results: other folder names, no checkpoints, read on another machine, in another order."""
    whole = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    for number, path in enumerate(sorted(Path('runs').rglob('args.yaml'), reverse=True)):
        kept = Path('results') / f'{number}'
        kept.mkdir(parents=True)
        settings = yaml.safe_load(path.read_text())
        settings |= {'data_dir': 'elsewhere', 'output': '', 'workers': 7, 'a_setting_of_tomorrow': 3}
        (kept / 'args.yaml').write_text(yaml.safe_dump(settings))
        shutil.copy(path.parent / 'summary.csv', kept)
    assert run_cli('ccl-timm', 'report', 'results', '--table', 'cc-table1')[1] == whole


def test_records_hold_everything_that_the_report_prints(runs_of_table1, run_cli):
    environment = {'command': 'timm train.py --data-dir /home/me/mnist', 'recipe': '/home/me/r.yaml'}
    focal = (*CE[:-1], 'focal')
    few = RunDir(write_run('runs/few', focal, [97, 98], seed=0, train_fraction=0.125, environment=environment))
    few.add_extra_split({'split': 'test1k', 'epoch': 0, 'images': 1000, 'top1': 50, 'top5': 60, 'loss': 1})
    few.add_extra_split({'split': 'test1k', 'epoch': 1, 'images': 1000, 'top1': 96, 'top5': 99, 'loss': 1})
    argv = ['--table', 'cc-table1', '--record', 'results/a.jsonl']
    code, whole, err = run_cli('ccl-timm', 'report', 'runs', *argv)
    assert code == 0, err
    assert '98.00 (n=1, 2 of 300 epochs, 12.5% of the images)' in whole and '| 12.5% ' in whole
    assert '| test1k 96.00 |' in whole and 'test1k 50' not in whole
    assert run_cli('ccl-timm', 'report', 'results', '--table', 'cc-table1')[1] == whole
    record = Path('results/a.jsonl').read_text()
    assert len(record.splitlines()) == 1 + 6 and '/home' not in record and '/some' not in record
    code, out, err = run_cli('ccl-timm', 'report', 'runs', *argv)
    assert code == 2 and "Two runs are called '" in err and Path('results/a.jsonl').read_text() == record
    write_run('more/extra', TABLE1, [97], seed=9)
    assert run_cli('ccl-timm', 'report', 'more', '--record', 'results/a.jsonl')[0] == 0
    assert len(Path('results/a.jsonl').read_text().splitlines()) == 1 + 7
    Path('foreign.jsonl').write_text('{}')
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--record', 'foreign.jsonl')
    assert code == 2 and "'foreign.jsonl' is not a file of recorded runs" in err
    assert Path('foreign.jsonl').read_text() == '{}'
    shares = run_cli('ccl-timm', 'report', 'results', '--format', 'csv')[1]
    assert ',test1k=96.0' in shares


def test_a_share_of_the_images_is_no_further_seed_of_all_of_them(workdir, run_cli):
    write_run('runs/whole', TABLE1, [97, 98], seed=0)
    settings = yaml.safe_load(Path('runs/whole/args.yaml').read_text())
    del settings['train_fraction']  # as before there was such a share
    Path('runs/whole/args.yaml').write_text(yaml.safe_dump(settings))
    for seed in (1, 2):
        write_run(f'runs/{seed}', TABLE1, [70, 80, 81], seed=seed, train_fraction=0.125)
    out = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')[1]
    cells = lines_of(out, 'resnet18:cc')
    assert cells[0][1] == '98.00 (n=1, 2 of 300 epochs)'
    assert ['81.00 ± 0.00', '2', '3', '12.5%'] in [row[3:7] for row in cells[1:]]


def test_half_written_runs_are_named_and_left_out(runs_of_table1, run_cli):
    head = 'epoch,train_loss,eval_loss,eval_top1,lr\n'
    write_run('runs/cut', TABLE1, [1, 2, 3], summary=head + '0,1,1,98,0.1\n1,1,1,98', seed=7)
    write_run('runs/empty', TABLE1, [1, 2], summary='', seed=8)
    write_run('runs/unmeasured', TABLE1, [1], summary='epoch,train_loss,lr\n0,1,0.1\n', seed=9)
    write_run('runs/garbage', TABLE1, [1], summary=head + '0,1,1,many,0.1\n', seed=10)
    write_run('runs/no_yaml', TABLE1, [1], seed=11)
    Path('runs/no_yaml/args.yaml').write_text('{')
    write_run('runs/no_args', TABLE1, [1], seed=12)
    Path('runs/no_args/args.yaml').unlink()
    write_run('runs/other', TABLE1, [1], seed=13)
    Path('runs/other/args.yaml').write_text('epochs: 1')
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')
    assert code == 0
    assert lines_of(out, 'resnet18:cc')[0][1] == '98.53 ± 0.15 (n=3, 3 of 300 epochs)'
    for text in (
        "left out: 'runs/cut' is half-written, 1 of 3 epochs.",
        "left out: 'runs/empty' is half-written, 0 of 2 epochs.",
        "left out: 'runs/unmeasured' was not measured after its last epoch",
        "left out: 'runs/garbage/summary.csv' is not a table of epochs: row 1 is no epoch with its numbers",
        'runs/no_yaml',
        "left out: 'runs/no_args' has no args.yaml",
        "left out: 'runs/other' has an args.yaml that is not a run's",
    ):
        assert text in err
    assert err.count('\n') == 7


def test_runs_are_given_to_rows_by_what_was_trained(workdir, run_cli):
    write_run('runs/table1', ('--config', 'cc_cifar100', '--model', 'vgg16_bn_cam', '--loss', 'cc'), [75, 76])
    write_run(
        'runs/batch', ('--config', 'cc_cifar100', '--model', 'vgg16_bn_cam', '--loss', 'cc', '-b', '64'), [75, 74]
    )
    half = ('--config', 'cc_cifar100', '--model', 'vgg16_bn_cam', '--loss', 'cc', '--loss-kwargs', 'weight=0.5')
    write_run('runs/weight', half, [70, 71])
    cells = {}
    for name in ('cc-table1', 'cc-table2', 'cc-table5'):
        code, out, err = run_cli('ccl-timm', 'report', 'runs', '--table', name)
        cells[name] = {
            record['row']: record['last_epoch'][0]
            for record in json.loads(run_cli('ccl-timm', 'report', 'runs', '--table', name, '--format', 'json')[1])[
                'records'
            ]
            if record['seeds']
        }
    assert cells == {
        'cc-table1': {'vgg16:cc': 76},
        'cc-table2': {'vgg16:cc:batch32': 76, 'vgg16:cc:batch64': 74},
        'cc-table5': {'vgg16:cc:weight0.5': 71, 'vgg16:cc:weight1': 76},  # the default weight is 1
    }
    assert (
        "'runs/batch' is no row of cc-table5; closest: cifar100 vgg16:cc:weight1, but batch_size was 32, is 64" in err
    )


def test_data_sets_that_differ_in_their_folders_are_known_by_the_name_of_the_run(workdir, run_cli):
    swin = ('--config', 'pod_swin', '--model', 'swin_base_patch4_window7_224_pedcc', '--loss', 'pod')
    write_run('runs/a', (*swin, '--num-classes', '100'), [80], experiment='facescrub-swin-pod-seed0', seed=0)
    write_run('runs/b', (*swin, '--num-classes', '100'), [70], experiment='mine', seed=1)
    write_run('runs/c', (*swin, '--num-classes', '500'), [60], seed=0)
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--table', 'pod-table8', '--format', 'json')
    ran = {(r['row'], r['data']): r['last_epoch'] for r in json.loads(out)['records'] if r['seeds']}
    assert ran == {('swin:pod', 'facescrub'): [80], ('swin:pod', 'imagenet500'): [60]}
    assert "left out: 'runs/b' fits several rows of pod-table8 (facescrub swin:pod, imagenet100 swin:pod)" in err


def test_other_epochs_are_no_other_seeds(runs_of_table1, run_cli):
    """Runs of other epochs or precision stand on lines of their own; a second run of a seed does not count twice."""
    write_run('runs/long', TABLE1, [90, 91, 92, 99.0], seed=5)
    write_run('runs/amp', TABLE1, [90, 91, 94.0], amp=True, seed=0)
    write_run('runs/z', TABLE1, [90, 91, 10.0], seed=2)
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--table', 'cc-table1')
    layout, *lines = lines_of(out, 'resnet18:cc')[:4]
    assert layout[1] == '99.00 (n=1, 4 of 300 epochs)'
    assert [line[2:6] for line in lines] == [
        ['', '99.00', '1', '4'],  # most groups have amp=False
        ['', '98.53 ± 0.15', '3', '3'],
        ['amp=True', '94.00', '1', '3'],
    ]
    assert "left out: 'runs/z' has the settings and the seed of 'runs/x2'" in err
    table, found = tables.read_table('cc-table1'), results.read_results(['runs'])
    report_of = report.table_report(table, matching.match_rows(table, found), found)
    curves = report_of.curves['mnist, top-1 %']
    assert {name: len(of_runs) for name, of_runs in curves.items()} == {
        'resnet18:ce': 2,
        'resnet18:cc': 1,
        'resnet18:cc, 3 epochs': 3,
        'resnet18:cc amp=True': 1,
    }


def test_options_of_the_loss_and_data_separate_runs(workdir, run_cli):
    write_run('runs/a', TABLE1, [90.0], seed=0, environment={'data_fingerprint': 'aa-aa'})
    write_run('runs/b', TABLE1, [80.0], seed=1, environment={'data_fingerprint': 'aa-aa'})
    write_run('runs/c', (*TABLE1, '--loss-kwargs', 'smoothing=0.3'), [70.0], seed=1)
    write_run('runs/d', (*TABLE1, '--smoothing', '0.3'), [60.0], seed=2)
    write_run('runs/e', TABLE1, [50.0], seed=2, environment={'data_fingerprint': 'bb-aa'})
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--format', 'json')
    groups = {tuple(record['last_epoch']) for record in json.loads(out)['records']}
    assert groups == {(90.0, 80.0), (70.0,), (60.0,), (50.0,)}, err
    code, out, err = run_cli('ccl-timm', 'report', '--diff', 'runs/a', 'runs/c')
    assert "'smoothing': 0.3" in out


def test_a_folder_is_one_whether_it_was_named_or_not(workdir, run_cli):
    images = ('--model', 'resnet18_cam', '--loss', 'cc', '--data-dir', 'bees')
    for seed, more in enumerate(((), ('--dataset', 'folder'))):
        write_run(f'runs/{seed}', (*images, *more), [60 + seed], seed=seed, data_dir='/home/me/bees')
    (row,) = lines_of(run_cli('ccl-timm', 'report', 'runs')[1], 'resnet18_cam')
    assert row[2:5] == ['bees', '60.50 ± 0.71', '2']


def test_patience_ends_a_run(workdir, run_cli):
    write_run('a/seed', TABLE1, [98, 97, 96.5], epochs=300, patience=2)
    code, out, err = run_cli('ccl-timm', 'report', 'a')
    assert code == 0 and lines_of(out, 'resnet18_cam')[0][3:6] == ['96.50', '1', '3']
    write_run('b/seed', TABLE1, [98, 97, 96.5], epochs=300, patience=3)
    code, out, err = run_cli('ccl-timm', 'report', 'b')
    assert code == 2 and 'None of these runs is finished' in err and '3 of 300 epochs' in err


def test_runs_without_a_table_are_grouped_by_their_settings(runs_of_table1, run_cli):
    write_run('runs/lr', (*TABLE1, '--lr', '0.01', '--loss-kwargs', 'weight=2.0'), [1, 2, 3], seed=3)
    code, out, err = run_cli('ccl-timm', 'report', 'runs')
    header = lines_of(out, 'model')[0]
    rows = [dict(zip(header, line, strict=True)) for line in lines_of(out, 'resnet18_cam')]
    assert [row['seeds'] for row in rows] == ['1', '3'] and [row['loss'] for row in rows] == ['cc', 'cc']
    assert {row['settings'] for row in rows} == {'loss_kwargs={weight=2.0}, lr=0.01', ''}
    assert 'Settings, unless a line shows others: lr=0.1.' in out
    assert rows[1]['last epoch'] == '98.53 ± 0.15' and rows[1]['data'] == 'torch/mnist'
    assert (
        rows[1]['against our ce'] == '+0.93 [-0.52, +2.39] no difference shown; 1.89 would have been [linear]'
        and rows[0]['against our ce'] == ''
    )


def test_settings_without_a_most_common_value_are_shown_for_all_runs(workdir, run_cli):
    for number, lr in enumerate(('0.1', '0.01', '0.01', '0.1')):
        write_run(f'runs/{number}', (*TABLE1, '--lr', lr, *(('--amp',) if number > 1 else ())), [1], seed=0)
    rows = lines_of(run_cli('ccl-timm', 'report', 'runs')[1], 'resnet18_cam')
    shown = ['amp=False, lr=0.1', 'amp=False, lr=0.01', 'amp=True, lr=0.01', 'amp=True, lr=0.1']
    assert [sorted(row[3].split(', ')) for row in rows] == [sorted(text.split(', ')) for text in shown]


def test_baseline_is_on_the_same_head_or_the_linear_one_of_that_backbone(workdir):
    names = ['resnet18_cam/ce', 'resnet18_linear/ce', 'resnet50_linear/ce', 'resnet18_cam/cc', 'resnet18_pedcc/pod']
    groups = []
    for name in names:
        model, loss = name.split('/')
        folder = write_run(name, ('--config', 'digits', '--model', model, '--loss', loss), [1])
        groups.append(matching.Group((results.Result.of(RunDir(folder)),)))
    found = [matching.baseline_of(group, groups) for group in groups]
    assert found == [groups[1], None, None, groups[0], groups[1]]
    assert matching.baseline_of(groups[3], groups[1:]) is groups[1]


@pytest.mark.parametrize('reverse', [False, True])
def test_baseline_has_the_same_options_and_trains_as_much(reverse, workdir):
    groups = {}
    for name, model, loss, *flags in (
        ('frozen', 'linear', 'ce', '--freeze-backbone'), ('tuned', 'linear', 'ce'), ('cosine', 'cosine', 'arcface'),
        ('narrow', 'cam', 'ce', '--model-kwargs', 'reduction=4'), ('cam', 'cam', 'ce'), ('cc', 'cam', 'cc'),
    ):  # fmt: skip
        argv = ('--config', 'digits', '--model', f'resnet18_{model}', '--loss', loss, *flags)
        groups[name] = matching.Group((results.Result.of(RunDir(write_run(name, argv, [1]))),))
    ordered = [*groups.values()][:: -1 if reverse else 1]
    assert matching.baseline_of(groups['cosine'], ordered) is groups['tuned']
    assert matching.baseline_of(groups['cc'], ordered) is groups['cam']
    assert matching.baseline_of(groups['frozen'], ordered) is None


def test_baseline_has_features_as_wide_and_the_same_stem(workdir):
    groups = {}
    for model, loss, *extra in (
        ('linear', 'ce'),
        ('linear', 'ce', 'output_stride=16'),
        ('cam', 'cc', 'output_stride=16', 'reduction=4'),
        ('linear', 'ce', 'feature_dim=2'),
        ('linear', 'ce', 'small_input=True'),
        ('cam', 'cc'),
        ('cosine', 'ce', 'scale=9.0'),
        ('cam', 'cc', 'hidden_features=2'),
        ('pedcc', 'pod', 'feature_dim=64'),
        ('cam', 'cc', 'small_input=True'),
        ('cosine', 'arcface', 'small_input=True'),
    ):
        name = '-'.join([loss, *extra])
        own = ['--model-kwargs', *extra] if extra else []
        folder = write_run(name, ('--config', 'digits', '--model', f'resnet18_{model}', '--loss', loss, *own), [1])
        groups[name] = matching.Group((results.Result.of(RunDir(folder)),))
    found = {name: matching.baseline_of(group, list(groups.values())) for name, group in groups.items()}
    assert {name: own.results[0].name for name, own in found.items() if own} == {
        'cc': 'ce',
        'ce-scale=9.0': 'ce',
        'cc-output_stride=16-reduction=4': 'ce-output_stride=16',
        'cc-hidden_features=2': 'ce-feature_dim=2',
        'pod-feature_dim=64': 'ce',
        'cc-small_input=True': 'ce-small_input=True',
        'arcface-small_input=True': 'ce-small_input=True',
    }


def test_diff_prints_settings_versions_and_data_before_results(workdir, run_cli):
    before = {'versions': {'torch': '2.14', 'timm': '1'}, 'device': 'cpu', 'data_fingerprint': 'aa', 'git_commit': 'c1'}
    now = {'versions': {'torch': '2.15', 'timm': '1'}, 'device': 'cpu', 'data_fingerprint': 'bb', 'git_commit': 'c1'}
    write_run('a', TABLE1, [98, 97.5], environment=before)
    write_run('b', (*TABLE1, '--lr', '0.2'), [98, 98.25], environment=now, newer=1)
    code, out, err = run_cli('ccl-timm', 'report', 'a', 'b', '--diff')
    assert code == 0 and out.splitlines() == [
        'a -> b',
        'other settings, of those that change what is computed:',
        '  lr was 0.1, is 0.2',
        'settings that only one of them has:',
        '  newer',
        'other versions:',
        "  torch was '2.14', is '2.15'",
        'other machine: none',
        'other data:',
        "  data_fingerprint was 'aa', is 'bb'",
        'top-1 %:',
        '  last epoch: 97.50 -> 98.25 (+0.75)',
        '  best epoch: 98.00 -> 98.25 (+0.25)',
        '  epochs: 2 -> 2',
    ]
    Path('b/environment.json').unlink()
    assert 'versions, machine and data are not known' in run_cli('ccl-timm', 'report', 'a', 'b', '--diff')[1]


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], 'The following arguments are required: RUN'),
        (['nowhere'], "There is no folder 'nowhere': name folders of runs"),
        (['empty'], "'empty' holds no run: there is no args.yaml or summary.csv in it."),
        (['a', '--table', 'cc-table9'], "Unknown table 'cc-table9'; did you mean"),
        (['a', '--format', 'pdf'], "invalid choice: 'pdf'"),
        (['a', '-o', 'taken'], "'taken' exists already: name another file."),
        (['a', '--diff'], '--diff takes the folders of two runs'),
        (['a', 'a', '--diff', '--table', 'cc-table1'], '--diff takes the folders of two runs'),
        (['a', 'a', '--diff', '--plot', 'b.svg'], '--diff takes the folders of two runs'),
        (['a', '--rows', 'resnet18:cc'], '--rows are those of a table: give its name with --table.'),
        (['a', '--table', 'cc-table1', '--rows', 'resnet18:xc'], "has no row 'resnet18:xc'; did you mean"),
        (['a', '--plot', 'taken'], "'taken' exists already: name another file."),
        (['a', '--plot', 'b.gif'], 'must end in .png or .svg'),
        (['a', 'other', '--plot', 'b.svg'], '--plot draws the runs of one data set; these are of 2.'),
        (['a', 'empty', '--diff'], "'empty' has no args.yaml"),
        (['a', 'broken', '--diff'], "'broken/environment.json' is not JSON"),
    ],
)
def test_report_refuses(argv, message, workdir, run_cli):
    write_run('a', TABLE1, [98])
    write_run('other', TABLE1, [98], data_dir='cifar10', dataset='')
    write_run('broken', TABLE1, [98])
    Path('broken/environment.json').write_text('{')
    Path('empty').mkdir()
    Path('taken').write_text('mine')
    code, out, err = run_cli('ccl-timm', 'report', *argv)
    assert code == 2 and message in err and Path('taken').read_text() == 'mine'


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if name in ('cc-table1', 'pod-table4') else [pytest.mark.slow])
        for name in tables.list_tables()
    ],
)
def test_every_table_prints_its_own_rows_and_no_others(name, workdir, run_cli):
    """One run of each row finds that row again, whatever its folder is called."""
    table = tables.read_table(name)
    for number, row in enumerate(table.rows):
        experiment = '-'.join([row.dataset, *row.name.split(':'), 'seed0'])
        write_run(f'runs/{number:03}', row.args, [10 + number / 8], experiment=experiment, seed=0)
    code, out, err = run_cli('ccl-timm', 'report', 'runs', '--table', name, '--format', 'json')
    assert (code, err) == (0, '')
    records = json.loads(out)['records']
    assert {(r['row'], r['data']): r['last_epoch'] for r in records} == {
        (row.name, row.dataset): [10 + number / 8] for number, row in enumerate(table.rows)
    }
    assert all(r['paper'] == (row.paper and row.paper[0]) for r, row in zip(records, table.rows, strict=True))
    layout = re.search(
        r'after the last epoch:\n\n(.*?)\n\n', run_cli('ccl-timm', 'report', 'runs', '--table', name)[1], re.S
    )
    assert 'not run' not in layout.group(1)


def test_what_the_training_script_writes_is_found(workdir, run_cli, monkeypatch):
    """A real run of a row, with settings that a row leaves open, is that row's, and shows its summary.csv."""
    shared = {'input_size': [1, 16, 16], 'batch_size': 128, 'scale_lr': True}
    rows = {
        f'tiny:{loss}': {'model': f'test_resnet_{head}', 'loss': loss, 'paper': {'own': 99.5}}
        for loss, head in (('ce', 'linear'), ('cc', 'cam'))
    }
    content = {'title': 'Small', 'seeds': 1, 'datasets': {'own': {'recipe': 'digits', 'set': shared}}, 'rows': rows}
    Path('small.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(tables, '_folder', lambda: workdir)
    row = tables.read_table('small').rows[1]
    own = ['--epochs', '1', '--seed', '3', '--experiment', 'a', '--workers', '1', '--checkpoint-hist', '1']
    code, out, err = run_cli('timm', 'train.py', *row.args, *own)
    assert code == 0, err
    code, out, err = run_cli('ccl-timm', 'report', 'output', '--table', 'small', '--format', 'json')
    assert (code, err) == (0, '')
    with open('output/train/a/summary.csv') as file:
        top1 = float(list(csv.DictReader(file))[-1]['eval_top1'])
    first, second = json.loads(out)['records']
    assert first['seeds'] == [] and second['seeds'] == [3] and second['last_epoch'] == [top1]
    assert (second['epochs'], second['recipe_epochs'], second['best_other_row']) == (1, 15, 'tiny:ce')
