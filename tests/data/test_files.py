"""Folders and files as they come: damaged images, links, pipes, hidden files, names, and what vanishes meanwhile."""

import io
import os
import random
import shutil
import struct
import zlib

import pytest
import timm
import torch
from PIL import Image

from ccl_timm.data import check, datasets, fingerprint, loaders, prepare
from ccl_timm.data.files import FolderReader, UnreadableImage, read_image, scan
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.prediction import find_images, predict

from ..conftest import TINY, results, write_folder

CPU = torch.device('cpu')
FORMATS = dict.fromkeys(('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'QOI', 'PPM'), 'RGB')
FORMATS |= {'GIF': 'P', 'DDS': 'RGBA', 'ICO': 'RGBA'}


def encoded(form, rng):
    """The bytes of a small noise image."""
    size = (rng.randrange(9, 40), rng.randrange(9, 40))
    image = Image.frombytes('RGB', size, rng.randbytes(3 * size[0] * size[1])).convert(FORMATS[form])
    file = io.BytesIO()
    image.save(file, form, **({'compression': 'tiff_lzw'} if form == 'TIFF' and rng.random() < 0.5 else {}))
    return file.getvalue()


def mutant(form, rng):
    """The bytes of an image that is damaged in one way, or whole."""
    data = bytearray(encoded(form, rng))
    kind = rng.choice(['flip', 'head', 'cut', 'insert', 'delete', 'giant', 'whole'])
    place = rng.randrange(len(data))
    if kind == 'flip':
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 'head':
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(min(60, len(data)))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    elif kind == 'cut':
        del data[place:]
    elif kind == 'insert':
        data[place:place] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 'delete':
        del data[place : place + rng.randrange(1, 40)]
    elif kind == 'giant':
        return bytes(giant(data, form, rng))
    return bytes(data)


def giant(data, form, rng):
    """The image with a header of huge dimensions, where the format allows it by changing a few bytes."""
    width, height = rng.choice([(20_000, 20_000), (60_000, 3), (2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 0)])
    places = {'PNG': (16, '>II'), 'BMP': (18, '<II'), 'QOI': (4, '>II'), 'DDS': (12, '<II'), 'GIF': (6, '<HH')}
    if form == 'PPM':
        return b'P6 %d %d 255 ' % (width, height) + data[12:]
    if form in places:
        start, layout = places[form]
        short = layout.endswith('HH')
        struct.pack_into(layout, data, start, *((v & 0xFFFF if short else v) for v in (width, height)))
    if form == 'PNG':
        struct.pack_into('>I', data, 29, zlib.crc32(data[12:29]))
    return data


def write_mutants(root, count, seed):
    """A folder of damaged images with a whole one after each, whose suffix is any that timm reads."""
    rng = random.Random(seed)
    whole = encoded('PNG', rng)
    for number in range(count):
        form = list(FORMATS)[number % len(FORMATS)]
        name = f'{number:05d}_{form}{rng.choice([".png", ".jpg", ".jpeg"])}'
        content = mutant(form, rng)
        for split in ('train', 'validation'):
            folder = root / split / 'ab'[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            (folder / f'{number:05d}_whole.png').write_bytes(whole)
    return root


def settings(*argv):
    return TrainConfig.resolve([str(word) for word in argv])


def read_in_every_way(root, size=32):
    """Read a folder as training from files, training in memory, validation, prediction and the check do.

    Returns:
        By way, the names of the images that it could not read; None where it does not count them.
    """
    config = {'input_size': (3, size, size), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear'}
    config |= {'crop_pct': 0.9, 'crop_mode': 'center'}
    found = {}
    for way, memory in (('files', 'off'), ('memory', 'on')):
        argv = ('--in-memory', memory, '-b', 4, '-j', 0, '--img-size', size, '--no-aug', '--color-jitter', 0)
        own = settings('--data-dir', root, *argv, '--train-interpolation', 'bilinear')
        splits = datasets.create_splits(own, 3)
        loader, loader_eval = loaders.make_loaders(own, 2, CPU, config, splits)
        assert sum(len(target) for _, target in loader) > 0
        found[way] = _named(splits.train)
        labels = torch.cat([target for _, target in loader_eval])
        found[f'validation, {way}'] = _named(splits.validation)
        unreadable = (labels == -1).sum() if memory == 'off' else len(splits.validation) - len(labels)
        assert unreadable == len(found[f'validation, {way}'])
    model = timm.create_model('test_resnet', num_classes=2)
    trained = Trained('test_resnet', model, config, None, {})
    read, left = predict(trained, find_images([root / 'train']), batch_size=64)
    found['predict'] = {os.path.relpath(path, root / 'train') for path, _ in left}
    assert len(read) + len(left) == len(splits.train)
    problems = check.check_folder(root).problems.get('unreadable', [])
    found['check'] = {name.split(' (')[0].removeprefix('train/') for name in problems if name.startswith('train/')}
    return found


def _named(dataset):
    return {dataset.reader.filename(i) for i, named in enumerate(dataset.named.tolist()) if named}


@pytest.mark.parametrize('count', [120, pytest.param(6000, marks=pytest.mark.slow)])
def test_no_damaged_image_escapes(count, tmp_path, recwarn):
    found = read_in_every_way(write_mutants(tmp_path, count, seed=count))
    assert 0.2 * count < len(found['check']) < count and not any('whole' in name for name in found['check'])
    assert all(names == found['check'] for names in found.values())


def test_links_that_loop_pipes_and_hidden_files_are_no_images(folder, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(folder, tmp_path / 'images')
    for name in ('loop', 'loop2'):
        (root / 'train' / name).symlink_to('.')
        (root / 'train' / 'ant' / name).symlink_to('..')
    os.mkfifo(root / 'validation' / 'ant' / 'pipe.png')
    (root / 'train' / '.ipynb_checkpoints').mkdir()
    for name in ('.ipynb_checkpoints/0.png', 'ant/._0.png'):
        shutil.copy(root / 'train' / 'ant' / '0.png', root / 'train' / name)
    assert len(FolderReader(root / 'train').samples) == 24 and len(scan(root / 'train').repeated) == 4
    assert timm.data.create_dataset('', root=str(folder / 'train'), search_split=False).reader.class_to_idx == (
        FolderReader(root / 'train').class_to_idx
    )
    code, out, err = run_cli('timm', 'train.py', '--data-dir', root, *TINY)
    assert code == 0 and "'ant/pipe.png' cannot be read, and is left out: not a regular file" in err
    assert run_cli('ccl-timm', 'data', 'check', root)[0] == 1
    assert run_cli('ccl-timm', 'data', 'split', root / 'train', tmp_path / 'new')[0] == 0
    assert len(list((tmp_path / 'new').rglob('*.png'))) == 24


def test_names_with_digits_that_are_no_numbers(tmp_path):
    root = write_folder(tmp_path, ('10²', '1²2', '9', '10'), train=1, validation=1) / 'train'
    os.rename(root / '9' / '0.png', root / '9' / '3④4.png')
    assert [*FolderReader(root).class_to_idx] == ['1²2', '9', '10', '10²']


def test_classes_of_the_same_name_in_several_folders_are_one_with_a_warning(folder, tmp_path, capsys):
    for year in ('2023', '2024'):
        shutil.copytree(folder / 'train' / 'ant', tmp_path / year / 'ant')
    shutil.copytree(folder / 'train' / 'bee', tmp_path / '2024' / 'bee')
    assert timm.data.create_dataset('', root=str(tmp_path), search_split=False).reader.class_to_idx == (
        FolderReader(tmp_path).class_to_idx
    )
    err = capsys.readouterr().err
    assert '1 classes are spread over several folders' in err and '2023/ant' in err and '2024/ant' in err


def test_names_that_are_not_utf8(folder, tmp_path, run_cli, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(folder, tmp_path / 'images')
    for part in ('train', 'validation'):
        os.rename(root / part / 'ant' / '0.png', os.fsencode(root / part / 'ant') + b'/\xff\xe9.png')
    assert run_cli('timm', 'train.py', '--data-dir', root, *TINY)[0] == 0
    code, out, err = run_cli('ccl-timm', 'data', 'check', root)
    assert code == 0 and 'names that are not UTF-8' in out and r'train/ant/\xff\xe9.png' in out
    code, out, err = run_cli('ccl-timm', 'predict', trained, root / 'validation')
    assert code == 0 and r'\xff\xe9.png' in out


def test_unreadable_and_vanished_images_are_left_out_of_a_measurement(folder, tmp_path, run_cli, trained):
    root = shutil.copytree(folder, tmp_path / 'images')
    (root / 'validation' / 'ant' / '0.png').write_bytes(b'DDS ')
    (root / 'validation' / 'bee' / 'gone.png').symlink_to(tmp_path / 'gone.png')
    for workers in ('0', '1'):
        code, out, err = run_cli('timm', 'validate.py', trained, '--data-dir', root, '-j', workers)
        assert code == 0 and results(out)['images'] == 11, err
        assert '2 images could not be read' in err


def test_a_training_folder_that_vanishes_ends_the_run_in_a_sentence(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / 'images')
    splits = datasets.create_splits(settings('--data-dir', root), 3)
    shutil.rmtree(root / 'train')
    with pytest.raises(UserError, match='is the folder of the training images gone'):
        datasets.Replacing(splits.train)[0]


@pytest.mark.parametrize('name', ['torhc/cifar10', 'a/b', '../x', 'cifar10'])
def test_an_unknown_scheme_does_not_train_on_the_folder(name, folder, run_cli):
    code, out, err = run_cli('timm', 'train.py', '--dataset', name, '--data-dir', folder, *TINY)
    assert code == 2 and f"Unknown data set '{name}'" in err and ('did you mean' in err) == (name[:4] == 'torh')


@pytest.mark.parametrize(
    'file, label',
    [('x.png', '../../victim'), ('/etc/passwd', 'n01'), ('../../x', 'n01'), ('x.png', '..'), ('.', 'n01')],
)
def test_annotations_cannot_write_outside_of_the_new_folder(file, label, tmp_path, run_cli):
    source, victim = tmp_path / 'a' / 'source', tmp_path / 'a' / 'victim'
    victim.mkdir(parents=True)
    shutil.copytree(write_folder(tmp_path / 'own') / 'train', source / 'train')
    (source / 'val' / 'images').mkdir(parents=True)
    (source / 'val' / 'images' / 'x.png').write_bytes(b'x')
    (source / 'val' / 'val_annotations.txt').write_text(f'{file}\t{label}\t0\n')
    before = sorted(tmp_path.rglob('*'))
    code, out, err = run_cli('ccl-timm', 'data', 'tiny-imagenet', source, tmp_path / 'a' / 'b' / 'new')
    assert code == 2 and '\nerror: ' in err and sorted(tmp_path.rglob('*')) == before


def test_classes_of_imagenet_are_names_of_folders(tmp_path, run_cli):
    write_folder(tmp_path / 'source')
    for text, message in (('/etc', 'has no folder of 1 of the 1 classes'), (b'\xff\xfe', 'not a text file in UTF-8')):
        (tmp_path / 'classes.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
        argv = ['imagenet-subset', tmp_path / 'source', tmp_path / 'new', '--classes', tmp_path / 'classes.txt']
        code, out, err = run_cli('ccl-timm', 'data', *argv)
        assert code == 2 and message in err and not (tmp_path / 'new').exists()


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def stop_at_the_tenth(image, path, *args, **kwargs):
        saved.append(path)
        if len(saved) == 10:
            raise KeyboardInterrupt
        save(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, 'save', stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        prepare.write_digits(tmp_path / 'digits')
    assert not any(tmp_path.iterdir())


def test_fingerprint_sees_contents_and_the_validation_split(folder, tmp_path):
    def of(root):
        return datasets.create_splits(settings('--data-dir', root), 3).fingerprint

    root = shutil.copytree(folder, tmp_path / 'images')
    before = of(root)
    assert of(root) == before == of(folder) and fingerprint.change(before, before) == 'none'
    assert fingerprint.change(before.split('-')[0], before) == 'unknown'  # of a run of an older version
    image = root / 'train' / 'ant' / '0.png'
    content = bytearray(image.read_bytes())
    content[-20] ^= 1  # the same size
    image.write_bytes(bytes(content))
    replaced = of(root)
    assert fingerprint.change(before, replaced) == 'contents'
    (root / 'validation' / 'ant' / '3.png').unlink()
    assert fingerprint.change(replaced, of(root)) == 'contents'
    image.unlink()
    assert fingerprint.change(before, of(root)) == 'files'


def test_every_reason_makes_an_image_unreadable(tmp_path):
    (tmp_path / 'text.png').write_text('no image')
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'folder.png').mkdir()
    for name, reason in (
        ('text', 'not an image'),
        ('pipe', 'not a regular'),
        ('folder', 'not a regular'),
        ('no', 'No such'),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / f'{name}.png', 'RGB')


@pytest.mark.parametrize('memory', ['auto', 'off'])
def test_a_class_of_damaged_files_stops_no_training(memory, run_cli, workdir):
    root = write_folder(workdir / 'images', train=20)
    for path in (root / 'train' / 'ant').iterdir():
        path.write_bytes(b'damaged')
    code, out, err = run_cli('timm', 'train.py', *TINY, '--data-dir', root, '--in-memory', memory)
    assert code == 0, err
