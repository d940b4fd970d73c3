"""Data sets: digits, numbering of classes, held-out share, pad-crop."""

import shutil
from collections import Counter

import numpy as np
import pytest
import timm.data
import torch
from filelock import FileLock, Timeout
from PIL import Image

from ccl_timm import UserError
from ccl_timm.data import datasets, loaders, prepare
from ccl_timm.training.config import TrainConfig

from ..conftest import write_folder


def settings(*argv):
    return TrainConfig.resolve([str(word) for word in argv])


def create_splits(*argv, channels=3):
    return datasets.create_splits(settings(*argv), channels)


def test_digits_are_whole_and_split_for_good():
    train, validation = datasets.Digits('train'), datasets.Digits('validation')
    assert (len(train), len(validation)) == (1442, 355)
    assert np.bincount(validation.targets).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    image, label = datasets.Digits('train', mode='L')[0]
    assert (image.mode, image.size, label) == ('L', (8, 8), 0)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in validation.images) == 0


def test_digits_as_a_folder_are_the_same_images(tmp_path):
    assert len(prepare.write_digits(tmp_path / 'digits')) == 1797
    splits = create_splits('--data-dir', tmp_path / 'digits')
    assert splits.class_names == [str(label) for label in range(10)]
    assert (len(splits.train), len(splits.validation)) == (1442, 355)
    own = datasets.Digits('validation', mode='L')
    written = sorted((tmp_path / 'digits' / 'validation' / '7').iterdir())
    expected = [image for image, label in zip(own.images, own.targets, strict=True) if label == 7]
    assert all((np.asarray(Image.open(path)) == image).all() for path, image in zip(written, expected, strict=True))
    with pytest.raises(UserError, match='exists and is not empty'):
        prepare.write_digits(tmp_path / 'digits')


def test_one_process_downloads_while_others_wait(workdir, monkeypatch):
    def create(*args, download, **options):
        with pytest.raises(Timeout):
            FileLock('new/.download.lock').acquire(timeout=0)
        raise RuntimeError('no network here')

    monkeypatch.setattr(timm.data, 'create_dataset', create)
    with pytest.raises(UserError, match='no network here'):
        create_splits('--dataset', 'torch/mnist', '--data-dir', 'new', '--dataset-download')


def test_validation_that_lacks_a_class_keeps_the_training_numbers(tmp_path):
    root = write_folder(tmp_path)
    shutil.rmtree(root / 'validation' / 'ant')
    splits = create_splits('--data-dir', root)
    assert splits.class_names == ['ant', 'bee', 'cat']
    assert set(datasets.targets_of(splits.validation)) == {1, 2}
    assert splits.notes == ["Split 'validation' has no image of 1 of 3 classes: ant."]


def test_validation_with_an_unknown_class_is_an_error(tmp_path):
    root = write_folder(tmp_path)
    shutil.copytree(root / 'validation' / 'ant', root / 'validation' / 'dog')
    with pytest.raises(
        UserError, match="Split 'validation' has 1 classes that are not among the 3 of training, such as 'dog'"
    ):
        create_splits('--data-dir', root)


@pytest.mark.parametrize('split, place', [('train', 'train'), ('validation', 'validation')])
def test_images_outside_the_folders_of_classes_are_an_error(split, place, tmp_path):
    root = write_folder(tmp_path)
    stray = next((root / 'train' / 'ant').iterdir())
    shutil.copy(stray, root / place / 'montage.png')
    with pytest.raises(UserError, match=f"Split '{split}' has images outside .* folders, such as 'montage.png'"):
        create_splits('--data-dir', root)


def test_a_class_that_a_map_lacks_is_named(tmp_path):
    root = write_folder(tmp_path)
    with pytest.raises(
        UserError, match=r"not among the 2 of --class-map, --class-names or the recipe, such as 'cat': name it"
    ):
        create_splits('--data-dir', root, '--class-names', 'ant', 'bee')


def test_no_validation_split_names_the_remedies(tmp_path):
    root = write_folder(tmp_path)
    shutil.rmtree(root / 'validation')
    with pytest.raises(UserError, match="no split 'validation'.*--val-fraction 0.2"):
        create_splits('--data-dir', root)
    assert create_splits('--data-dir', root, '--val-split', '').validation is None


def test_held_out_share_is_stratified_seeded_and_independent_of_file_order(tmp_path, monkeypatch):
    root = write_folder(tmp_path, train=10, validation=0)
    splits = create_splits('--data-dir', root, '--val-fraction', '0.2')
    assert np.bincount(datasets.targets_of(splits.validation)).tolist() == [2, 2, 2]
    assert np.bincount(datasets.targets_of(splits.train)).tolist() == [8, 8, 8]
    held = {name for name, part in splits.held_out if part == 'validation'}
    assert len(held) == 6 and len(splits.held_out) == 30
    reader = type(splits.train.dataset.reader)
    init = reader.__init__

    def reversed_order(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.samples.reverse()

    monkeypatch.setattr(reader, '__init__', reversed_order)
    again = create_splits('--data-dir', root, '--val-fraction', '0.2')
    assert {name for name, part in again.held_out if part == 'validation'} == held
    other = create_splits('--data-dir', root, '--val-fraction', '0.2', '--seed', '1')
    assert {name for name, part in other.held_out if part == 'validation'} != held


def test_nothing_can_be_held_out_of_single_images(tmp_path):
    root = write_folder(tmp_path, train=1, validation=0)
    with pytest.raises(UserError, match="No class in '.*' has two images: there is nothing to hold out"):
        create_splits('--data-dir', root, '--val-fraction', '0.3')


def test_class_names_must_fit(tmp_path):
    root = write_folder(tmp_path / 'images')
    (tmp_path / 'map.txt').write_text('ant\nbee\ncat\ndog\n')
    argv = ('--data-dir', root, '--class-map', tmp_path / 'map.txt')
    assert create_splits(*argv, '--num-classes', 5).class_names == ['ant', 'bee', 'cat', 'dog']
    with pytest.raises(UserError, match='--num-classes 3 is too small for 4 class names: give --num-classes 4'):
        create_splits(*argv, '--num-classes', 3)
    for names in ('9876543210', 'ab'):
        with pytest.raises(UserError, match='The embedded digits have the classes 0 to 9, in this order, and not'):
            create_splits('--dataset', 'digits', '--class-names', *names)
    assert create_splits('--dataset', 'digits', '--class-names', *'0123456789').class_names == [*'0123456789']


def test_each_split_has_its_own_transform(tmp_path):
    splits = create_splits('--data-dir', write_folder(tmp_path), '--val-fraction', '0.5')
    splits.train.transform = lambda image: 'train'
    splits.validation.transform = lambda image: 'validation'
    assert (splits.train[0][0], splits.validation[0][0]) == ('train', 'validation')


def test_fingerprint_distinguishes_data(tmp_path):
    first = create_splits('--data-dir', write_folder(tmp_path / 'a'))
    copy = create_splits('--data-dir', shutil.copytree(tmp_path / 'a', tmp_path / 'b'))
    fewer = create_splits('--data-dir', write_folder(tmp_path / 'c', train=7))
    assert first.fingerprint == copy.fingerprint != fewer.fingerprint


def test_names_are_needed_for_all_labels():
    with pytest.raises(UserError, match='labels up to 3, and 2 classes have names'):
        datasets._check_labels(settings(), [0, 3], ['a', 'b'])


def test_label_out_of_range(folder):
    with pytest.raises(UserError, match=r"--num-classes 2 is too small: the data has labels up to 2 \('cat'\)"):
        create_splits('--data-dir', folder, '--num-classes', '2')


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--data-dir', 'nowhere'], "no data folder 'nowhere'"),
        (['--dataset', '', '--data-dir', ''], 'There is no data folder: give one with --data-dir.'),
        (['--dataset', 'digit'], "Unknown data set 'digit'; did you mean 'digits'?"),
        (['--dataset', 'torch/mnist', '--data-dir', ''], "'torch/mnist' needs its folder: give --data-dir DIR."),
        (['--dataset', 'torch/nothing', '--data-dir', '.'], "Split 'train' of 'torch/nothing' cannot be opened"),
        (['--dataset', 'torch/mnist', '--data-dir', '.'], "Split 'train' of 'torch/mnist' cannot be opened"),
    ],
)
def test_data_that_is_not_there(argv, message, workdir):
    with pytest.raises(UserError, match=message.replace('?', r'\?')):
        create_splits(*argv)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match='Found 0 images'):
        create_splits('--data-dir', tmp_path, '--val-split', '')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])  # the second is what Windows writes
def test_class_map_sets_the_order(encoding, folder, tmp_path):
    (tmp_path / 'names.txt').write_text('cat\nbee\nant\n', encoding=encoding)
    splits = create_splits('--data-dir', folder, '--class-map', tmp_path / 'names.txt')
    assert splits.class_names == ['cat', 'bee', 'ant']
    brightest = [i for i, target in enumerate(datasets.targets_of(splits.train)) if target == 0]
    assert np.asarray(splits.train[brightest[0]][0]).mean() > 120  # cat is the brightest class


def test_pad_crop_pads_with_zeros_and_keeps_the_size(folder):
    args = settings('--data-dir', folder)
    splits = datasets.create_splits(args, 3)
    options = dict(batch_size=4, is_training=True, hflip=0.0, color_jitter=None, device=torch.device('cpu'))
    loaders.create_loader(splits.train, input_size=(3, 32, 32), pad_crop=4, **options)
    torch.manual_seed(0)
    images = torch.stack([torch.as_tensor(np.asarray(splits.train[i][0])) for i in range(20)])
    assert images.shape[1:] == (3, 32, 32)
    assert (images.amin(1) == 0).any()  # no pixel of the images themselves is black in all channels
    names = [type(step).__name__ for step in splits.train.transform.transforms]
    assert names[:2] == ['Resize', 'RandomCrop'] and 'RandomResizedCropAndInterpolation' not in names


def test_share_of_the_training_split_is_stratified_and_seeded(tmp_path):
    root = write_folder(tmp_path, train=10)
    whole = create_splits('--data-dir', root)
    share = create_splits('--data-dir', root, '--train-fraction', '0.3')
    assert np.bincount(datasets.targets_of(share.train)).tolist() == share.counts == [3, 3, 3]
    assert len(share.validation) == len(whole.validation) and share.fingerprint != whole.fingerprint
    same, other = (create_splits('--data-dir', root, '--train-fraction', '0.3', '--seed', seed) for seed in ('42', '1'))
    assert same.train.indices == share.train.indices != other.train.indices


def test_share_of_what_is_not_held_out(tmp_path):
    root = write_folder(tmp_path, train=10, validation=0)
    splits = create_splits('--data-dir', root, '--val-fraction', '0.2', '--train-fraction', '0.5')
    assert (len(splits.train), len(splits.validation)) == (12, 6)
    assert not set(splits.train.indices) & set(splits.validation.indices)
    assert Counter(part for _, part in splits.held_out) == {'train': 12, 'unused': 12, 'validation': 6}
    few = create_splits('--data-dir', write_folder(tmp_path / 'few', train=1), '--train-fraction', '0.1')
    assert few.counts == [1, 1, 1]
