"""Evaluation: figures from the confusion matrix, images that cannot be read, neighbours by features."""

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import nn
from torch.nn import functional as F

from ccl_timm.data import datasets
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import choose_data, evaluate, open_for
from ccl_timm.training.run_dir import RunDir

from ..conftest import TINY, results, write_folder


def batches(logits, target, size=7):
    return list(zip(logits.split(size), target.split(size), strict=True))


def test_figures_are_sklearns():
    torch.manual_seed(0)
    logits, target = torch.randn(50, 4), torch.randint(4, (50,))
    found = evaluate(nn.Identity(), batches(logits, target), torch.device('cpu'))
    predicted = logits.argmax(1)
    assert found.confusion.tolist() == confusion_matrix(target, predicted).tolist()
    assert found.metrics['macro_top1'] == pytest.approx(100 * balanced_accuracy_score(target, predicted))
    assert found.metrics['top1'] == pytest.approx(100 * (predicted == target).float().mean().item())
    assert found.metrics['loss'] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)
    assert found.unreadable == 0


def test_images_that_cannot_be_read_and_absent_classes_do_not_count():
    logits = torch.eye(4)[[0, 1, 2, 0, 0]]
    found = evaluate(nn.Identity(), batches(logits, torch.tensor([0, 1, 1, -1, -1]), 2), torch.device('cpu'))
    assert found.unreadable == 2 and found.metrics['top1'] == pytest.approx(200 / 3)
    assert found.accuracies == [100.0, 50.0, None, None]
    assert found.metrics['macro_top1'] == 75.0


def test_the_command_writes_tables_and_names_what_it_cannot_read(run_cli, trained, workdir):
    folder = write_folder(workdir / 'images')
    (folder / 'validation' / 'bee' / '1.png').write_bytes(b'not an image')
    argv = [trained, '--data-dir', folder, '-j', '0', '--per-class', 'a.csv', '--confusion', 'b.csv', '--recall']
    code, out, err = run_cli('timm', 'validate.py', *argv, '--knn', '3')
    assert code == 0, err
    assert "bee/1.png' cannot be read, and is left out" in err and '1 images could not be read' in err
    result = results(out)
    assert result['images'] == 11 and {'recall_at_1', 'recall_at_5', 'map_at_r', 'knn', 'macro_top1'} <= result.keys()
    rows = list(csv.DictReader(Path('a.csv').open()))
    assert [(row['class'], row['images']) for row in rows] == [('ant', '4'), ('bee', '3'), ('cat', '4')]
    confusion = [[int(n) for n in row[1:]] for row in list(csv.reader(Path('b.csv').open()))[1:]]
    assert [sum(row) for row in confusion] == [4, 3, 4]
    hits = sum(confusion[k][k] for k in range(3))
    assert result['top1'] == pytest.approx(100 * hits / 11)
    code, out, err = run_cli('timm', 'validate.py', *argv)
    assert code == 2 and "'b.csv' exists already" in err


def test_values_of_a_further_split_are_kept_with_the_run(run_cli, trained, workdir):
    run = shutil.copytree(trained, workdir / 'run')
    for part in ('train', 'validation', 'train'):
        code, out, err = run_cli(
            'timm', 'validate.py', run / 'last.pth.tar', '--split', part, '-j', '0', '--save-split'
        )
        assert code == 0, err
    rows = RunDir(run).extra_splits()
    assert [row['split'] for row in rows] == ['validation', 'train']
    assert (rows[-1]['top1'], rows[-1]['images']) == (results(out)['top1'], results(out)['images'])
    assert rows[-1]['epoch'] + 1 == len(RunDir(run).rows()) and 'reports show' not in err
    (run / 'last.pth.tar').rename(run / 'newer.pth.tar')
    shutil.copy(run / 'checkpoint-0.pth.tar', run / 'last.pth.tar')
    code, out, err = run_cli('timm', 'validate.py', run / 'last.pth.tar', '--split', 'train', '-j', '0', '--save-split')
    assert code == 0 and "reports show results of a run's last epoch" in err and len(RunDir(run).extra_splits()) == 3


@pytest.mark.parametrize(
    'source, argv, message',
    [
        ('run', [], "of a split of the run's own data: name it with --split alone"),
        ('run', ['--split', 'train', '--data-dir', 'images'], 'name it with --split alone'),
        ('run', ['--split', 'train', '--use-ema'], 'no moving average'),
        ('alone/last.pth.tar', ['--split', 'train'], "with a run, which 'alone' is not"),
    ],
)
def test_values_are_kept_with_no_other_run(source, argv, message, run_cli, trained, workdir):
    shutil.copytree(trained, 'run')
    Path('alone').mkdir()
    shutil.copy(trained / 'last.pth.tar', 'alone')
    code, out, err = run_cli('timm', 'validate.py', source, *argv, '-j', '0', '--save-split')
    assert code == 2 and message in err
    assert not Path('run/extra_splits.csv').exists() and not Path('alone/extra_splits.csv').exists()


def test_a_foreign_extra_splits_csv_stays(run_cli, trained, workdir):
    shutil.copytree(trained, 'run')
    Path('run/extra_splits.csv').write_text('screw,price\n1,2\n')
    code, out, err = run_cli('timm', 'validate.py', 'run', '--split', 'train', '-j', '0', '--save-split')
    assert (
        code == 2 and 'was not written by' in err and Path('run/extra_splits.csv').read_text() == 'screw,price\n1,2\n'
    )
    assert "left out: 'run/extra_splits.csv'" in run_cli('ccl-timm', 'report', 'run')[2]


def test_a_folder_without_splits_has_the_two_shares_that_a_run_made_of_it(run_cli, folder, workdir):
    argv = ('--data-dir', folder / 'train', '--val-fraction', '0.25', '--output', 'out', '--experiment', 'a')
    assert run_cli('timm', 'train.py', *TINY, *argv)[0] == 0
    for split, images in (('train', 18), ('validation', 6), ('', 6)):
        flags = ['--split', split] if split else []
        code, out, err = run_cli('timm', 'validate.py', 'out/a', '-j', '0', *flags)
        assert code == 0 and f'{images} images' in err, err
    code, out, err = run_cli('timm', 'validate.py', 'out/a', '-j', '0', '--split', 'tset')
    assert code == 2 and "has no split 'tset'" in err


def test_a_share_that_would_be_drawn_anew_is_no_longer_held_out(run_cli, workdir):
    images = write_folder(workdir / 'images', validation=0) / 'train'
    argv = ('--data-dir', 'images', '--val-fraction', '0.25', '--output', 'out', '--experiment', 'a')
    assert run_cli('timm', 'train.py', *TINY, *argv)[0] == 0
    shutil.copy(images / 'ant' / '0.png', images / 'ant' / 'new.png')
    for flags in ([], ['--fit-temperature']):
        code, out, err = run_cli('timm', 'validate.py', 'out/a', '-j', '0', *flags)
        assert code == 2 and 'The data has changed after training, and with it which images' in err
    code, out, err = run_cli('timm', 'validate.py', 'out/a', '-j', '0', '--data-dir', images)
    assert code == 0, err


def test_a_run_without_validation_is_told_to_name_a_split(run_cli, folder, workdir):
    argv = ('--data-dir', folder / 'train', '--val-split', '', '--output', 'out', '--experiment', 'a')
    assert run_cli('timm', 'train.py', *TINY, *argv)[0] == 0
    for command in (('timm', 'validate.py', 'out/a', '-j', '0'), ('ccl-timm', 'features', 'out/a', '-j', '0')):
        code, out, err = run_cli(*command)
        assert code == 2 and 'The run had no split to validate on: give --split NAME.' in err
    code, out, err = run_cli('timm', 'validate.py', 'out/a', '-j', '0', '--data-dir', folder, '--ood', 'typo')
    assert code == 2 and "There is no folder 'typo' for --ood." in err and 'images of' not in err


def test_neighbours_are_sought_among_the_images_trained_on(workdir):
    images = write_folder(workdir / 'images', train=20)
    given = ['--data-dir', str(images), '--val-fraction', '0.2', '--train-fraction', '0.5', '--split', 'validation']
    trained_on = TrainConfig.resolve(given[:-2])
    config = choose_data(trained_on.settings(), split='validation')
    model = SimpleNamespace(data_config={'input_size': (3, 8, 8)}, class_names=None, fingerprint='')
    known = open_for(config, 'train', model, training=True)
    assert known.indices == datasets.create_splits(trained_on, 3).train.indices
    assert len(open_for(config, 'validation', model, named=True)) == 12  # the part of that name, not what was held out
