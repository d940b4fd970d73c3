"""`--dataset hfds/...`: classes, labels and errors; with a stand-in for timm's reader where `datasets` is missing."""

import importlib.util
import io
import sys

import pytest
import timm.data
from PIL import Image

from ccl_timm import UserError
from ccl_timm.data import datasets
from ccl_timm.training.config import TrainConfig

from ..conftest import TINY, results

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec('datasets') is None, reason="needs pip install 'ccl-timm[datasets]'"
)
NAMES = ['ant', 'bee', 'cat']


class Column:
    """Rows of a table, as much of it as timm's reader shows."""

    def __init__(self, rows):
        self.rows = rows
        self.column_names = list(rows[0]) if rows else ['image', 'label']

    def __getitem__(self, index):
        return self.rows[index]


class Reader:
    """Stands for timm's reader of the Hub's data sets."""

    image_key, label_key = 'image', 'label'

    def __init__(self, labels, image=b'png', names=NAMES, column='label'):
        self.dataset = Column([{'image': image, column: label} for label in labels])
        self.class_to_idx = {name: index for index, name in enumerate(names or [])}

    def iter_targets(self):
        for row in self.dataset.rows:
            yield row[self.label_key]

    def __len__(self):
        return len(self.dataset.rows)


def create_splits(monkeypatch, reader, *argv):
    def create_dataset(name, split, **kwargs):
        dataset = timm.data.ImageDataset('', reader=reader)
        assert name == 'hfds/owner/name' and split in ('train', 'validation')
        return dataset

    monkeypatch.setattr(timm.data, 'create_dataset', create_dataset)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    return datasets.create_splits(TrainConfig.resolve(['--dataset', 'hfds/owner/name', *argv]), channels=3)


def test_classes_and_counts_come_from_the_data(monkeypatch):
    splits = create_splits(monkeypatch, Reader([0, 0, 1, 2, 0, 1]))
    assert (splits.class_names, splits.counts) == (NAMES, [3, 2, 1])
    assert datasets.targets_of(splits.validation) == [0, 0, 1, 2, 0, 1]
    without_names = create_splits(monkeypatch, Reader([0, 2, 2], names=None))
    assert (without_names.class_names, without_names.counts) == (None, [1, 0, 2])
    assert splits.fingerprint != without_names.fingerprint


def test_images_of_the_hub_are_recognised_by_more_than_their_labels(monkeypatch):
    readers = [Reader([0, 1, 2]) for _ in range(3)]
    for reader, name in zip(readers, ('dark', 'dark', 'bright'), strict=True):
        reader.dataset._fingerprint = name
    found = [datasets.content_hash(create_splits(monkeypatch, reader).train) for reader in readers]
    assert found[0] == found[1] != found[2]


def test_a_share_can_be_held_out(monkeypatch):
    splits = create_splits(monkeypatch, Reader([0, 1] * 10), '--val-fraction', '0.2')
    assert sorted(datasets.targets_of(splits.validation)) == [0, 0, 1, 1] and len(splits.train) == 16


@pytest.mark.parametrize(
    'reader, message',
    [
        (Reader([0, -1]), "has the label -1 in its column 'label'"),
        (Reader(['ant', 'bee']), "has the label 'ant' in its column 'label'"),
        (Reader([None]), 'has the label None'),
        (Reader([0], column='fine'), r"no column 'label' of labels: name one with --target-key \(fine\)"),
        (Reader([0], image=None), r"no column 'image' of images: name one with --input-key \(label\)"),
        (Reader([]), "Split 'train' of 'hfds/owner/name' holds no image"),
    ],
)
def test_columns_that_training_cannot_use(reader, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        create_splits(monkeypatch, reader)


@pytest.mark.parametrize('name', ['hfds/owner/name', 'HFDS/owner/name', 'hfids/owner/name'])
def test_a_missing_package_is_named_with_its_command(name, monkeypatch, run_cli, workdir):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    code, out, err = run_cli('timm', 'train.py', *TINY, '--dataset', name)
    assert code == 2 and f"'{name}' needs the package datasets: `pip install 'ccl-timm[datasets]'`." in err


@needs_datasets
def test_parquet_files_train_and_validate(run_cli, workdir):
    import datasets
    import pyarrow
    import pyarrow.parquet

    schema = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=NAMES)}).arrow_schema
    (workdir / 'mine').mkdir()
    for part, count in (('train', 24), ('validation', 12)):
        labels, images = [number % 3 for number in range(count)], []
        for number, label in enumerate(labels):
            file = io.BytesIO()
            Image.new('RGB', (12, 12), (80 * label, number, 0)).save(file, 'png')
            images.append({'bytes': file.getvalue(), 'path': None})
        table = pyarrow.table({'image': images, 'label': labels}, schema=schema)
        pyarrow.parquet.write_table(table, workdir / 'mine' / f'{part}-00000-of-00001.parquet')
    argv = ['--dataset', 'hfds/mine', '--data-dir', 'cache', '--model', 'resnet10t', '--loss', 'ce']
    code, out, err = run_cli('timm', 'train.py', *TINY, *argv, '--experiment', 'run')
    assert code == 0 and '24 to train on, 12 to validate on' in err and '3, 8 to 8 images each  [the data]' in err
    code, out, err = run_cli('timm', 'validate.py', 'output/train/run', '-j', '0')
    assert code == 0 and results(out)
    for words_typed, message in (
        (['--input-key', 'img'], "no column 'img' of images: name one with --input-key (image, label)"),
        (['--target-key', 'fine'], "no column 'fine' of labels: name one with --target-key (label)"),
        (['--train-split', 'training'], "Unknown split \"training\". Should be one of ['train', 'validation']"),
    ):
        code, out, err = run_cli('timm', 'train.py', *TINY, *argv, *words_typed)
        assert code == 2 and message in err
