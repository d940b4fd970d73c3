"""`ccl-timm data`: what it writes from the archives that people have, what it finds, what it divides."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from ccl_timm.data import archives, check, datasets, prepare
from ccl_timm.training.config import TrainConfig

from ..conftest import write_folder


def put(path, value=0, mode='RGB', size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def tree(root):
    """Relative paths of all files, with their bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*') if path.is_file()}


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / 'have' / 'tiny-imagenet-200'
    for label, name in enumerate(('n01', 'n02')):
        for number in range(3):
            put(root / 'train' / name / 'images' / f'{name}_{number}.JPEG', label * 90 + number)
        (root / 'train' / name / f'{name}_boxes.txt').write_text('n01_0.JPEG\t0\t0\t1\t1\n')
        put(root / 'val' / 'images' / f'val_{label}.JPEG', label * 90)
    put(root / 'test' / 'images' / 'test_0.JPEG')
    (root / 'val' / 'val_annotations.txt').write_text('val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n')
    return root.parent


def test_tiny_imagenet(tiny, tmp_path, run_cli):
    before = tree(tiny)
    code, out, err = run_cli('ccl-timm', 'data', 'tiny-imagenet', tiny, tmp_path / 'new')
    assert code == 0 and '6 images of 2 classes in train, 2 images of 2 classes in validation' in out
    assert 'the official set 100000' in err
    assert set(tree(tmp_path / 'new')) == {
        *(f'train/{name}/{name}_{number}.JPEG' for name in ('n01', 'n02') for number in range(3)),
        'validation/n01/val_1.JPEG',
        'validation/n02/val_0.JPEG',
    }
    assert (tmp_path / 'new/validation/n01/val_1.JPEG').is_symlink()
    assert tree(tiny) == before
    assert run_cli('ccl-timm', 'data', 'check', tmp_path / 'new')[0] == 0


@pytest.mark.parametrize('part', ['val', 'validation'])
def test_imagenet_subset(part, tmp_path, run_cli):
    names = [f'n{number:02d}' for number in (3, 1, 2)]
    for name in names:
        put(tmp_path / 'have/train' / name / 'a.JPEG')
        put(tmp_path / 'have' / part / name / 'b.JPEG')
    code, out, err = run_cli(
        'ccl-timm', 'data', 'imagenet-subset', tmp_path / 'have', tmp_path / 'two', '--num-classes', 2
    )
    assert code == 0 and "No source names the paper's classes" in err
    assert (
        sorted(os.listdir(tmp_path / 'two/train')) == sorted(os.listdir(tmp_path / 'two/validation')) == ['n01', 'n02']
    )
    (tmp_path / 'mine.txt').write_text('n03\n')
    argv = ('ccl-timm', 'data', 'imagenet-subset', tmp_path / 'have', tmp_path / 'one')
    assert run_cli(*argv, '--classes', tmp_path / 'mine.txt')[0] == 0
    assert set(tree(tmp_path / 'one')) == {'train/n03/a.JPEG', 'validation/n03/b.JPEG'}
    (tmp_path / 'mine.txt').write_text('n03\nn09\n')
    (tmp_path / 'none.txt').write_text('')
    for argv, message in (
        (['--classes', tmp_path / 'mine.txt'], "has no folder of 1 of the 2 classes, such as 'n09'"),
        (['--classes', tmp_path / 'none.txt'], 'There is no image to link to in'),
        (['--num-classes', '4'], 'has 3 classes, fewer than --num-classes 4'),
        ([], 'Which classes?'),
    ):
        code, out, err = run_cli('ccl-timm', 'data', 'imagenet-subset', tmp_path / 'have', tmp_path / 'no', *argv)
        assert code == 2 and message in err and not (tmp_path / 'no').exists()


def test_a_source_without_a_command_of_its_own_does_not_name_one(run_cli):
    code, out, err = run_cli('ccl-timm', 'data', 'facescrub')
    assert code == 2 and 'With that folder' not in err
    assert 'With that folder' in run_cli('ccl-timm', 'data', 'cars196')[2]


def write_cars(root):
    """The official archive of Stanford Cars in small: 2 classes, 2 training images, 1 of test, unpacked in a folder."""
    from scipy.io import savemat

    fields = [('class', 'O'), ('fname', 'O')]
    for part, rows in (
        ('cars_train', [(2, '00001.jpg'), (1, '00002.jpg')]),
        ('cars_test', [(2, '00001.jpg'), (1, '00002.jpg')]),
    ):
        for label, name in rows:
            put(root / part / part / name, label * 60)
        kind = {'cars_train': 'cars_train_annos', 'cars_test': 'cars_test_annos_withlabels'}[part]
        (root / 'devkit').mkdir(exist_ok=True)
        savemat(root / 'devkit' / f'{kind}.mat', {'annotations': np.array(rows, dtype=fields)})
    savemat(root / 'devkit/cars_meta.mat', {'class_names': np.array(['Acura TL', 'Ram C/V Van'], dtype=object)})
    return root


def test_cars196_from_the_official_archive(tmp_path, run_cli):
    have = write_cars(tmp_path / 'have')
    assert run_cli('ccl-timm', 'data', 'cars196', have, tmp_path / 'new')[0] == 0
    paths = {'Ram C-V Van/00001.jpg', 'Acura TL/00002.jpg'}
    assert set(tree(tmp_path / 'new')) == {f'{part}/{path}' for part in ('train', 'validation') for path in paths}
    brightness = Image.open(tmp_path / 'new/train/Ram C-V Van/00001.jpg').getpixel((0, 0))[0]
    assert abs(brightness - 120) < 4
    (have / 'cars_test/cars_test/00002.jpg').unlink()
    code, out, err = run_cli('ccl-timm', 'data', 'cars196', have, tmp_path / 'again')
    assert code == 2 and '1 of 4 images are missing' in err and not (tmp_path / 'again').exists()
    (have / 'devkit/cars_test_annos_withlabels.mat').unlink()
    code, out, err = run_cli('ccl-timm', 'data', 'cars196', have, tmp_path / 'again')
    assert code == 2 and 'lacks cars_test_annos_withlabels.mat' in err


def test_cars196_from_class_folders(tmp_path, run_cli):
    put(tmp_path / 'have/train/Acura TL/1.jpg')
    put(tmp_path / 'have/test/Acura TL/2.jpg')
    assert run_cli('ccl-timm', 'data', 'cars196', tmp_path / 'have', tmp_path / 'new')[0] == 0
    assert set(tree(tmp_path / 'new')) == {'train/Acura TL/1.jpg', 'validation/Acura TL/2.jpg'}


@pytest.mark.parametrize('name', sorted(archives.SOURCES))
def test_without_a_folder_the_source_of_the_data_is_named(name, workdir, run_cli):
    code, out, err = run_cli('ccl-timm', 'data', name)
    assert code == 2 and archives.SOURCES[name].get in err
    code, out, err = run_cli('ccl-timm', 'data', name, 'nowhere', 'new')
    assert code == 2 and archives.SOURCES[name].get in err
    assert run_cli('ccl-timm', 'data', name, '--help')[0] == 0
    if archives.SOURCES[name].layout:
        (workdir / 'empty').mkdir()
        code, out, err = run_cli('ccl-timm', 'data', name, 'empty', 'new')
        assert code == 2 and "'empty' holds no train/" in err


def test_data_lists_its_commands(run_cli):
    code, out, err = run_cli('ccl-timm', 'data')
    assert code == 0 and all(f'  {name}' in out for name in ('digits', 'check', 'split', *archives.SOURCES))


@pytest.mark.parametrize(
    'broken, kind', [([], 'symbolic links'), (['symlink'], 'hard links'), (['symlink', 'link'], 'copies')]
)
def test_links_fall_back(broken, kind, tmp_path, monkeypatch):
    path = put(tmp_path / 'have/1.png')

    def refuse(*args, **kwargs):
        raise OSError('not here')

    for name in broken:
        monkeypatch.setattr(os, name, refuse)
    assert prepare.write_links({'train/a/1.png': path}, tmp_path / 'new', tmp_path / 'have') == kind
    written = tmp_path / 'new/train/a/1.png'
    assert written.read_bytes() == path.read_bytes()
    assert (written.is_symlink(), written.samefile(path)) == (kind == 'symbolic links', kind != 'copies')


def test_what_fails_half_way_leaves_nothing_and_the_source_as_it_was(tmp_path, monkeypatch):
    paths = [put(tmp_path / f'have/{number}.png') for number in range(3)]
    link, before = os.symlink, tree(tmp_path / 'have')

    def stop_at_the_third(path, workdir):
        if path == paths[2]:
            raise KeyboardInterrupt
        link(path, workdir)

    monkeypatch.setattr(os, 'symlink', stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare.write_links({f'train/a/{path.name}': path for path in paths}, tmp_path / 'new', tmp_path / 'have')
    assert not (tmp_path / 'new').exists() and tree(tmp_path / 'have') == before


def test_a_folder_that_cannot_tell_two_names_apart_never_writes_into_the_source(tmp_path, monkeypatch):
    first, second = put(tmp_path / 'have/a.png', 1), put(tmp_path / 'have/b.png', 2)
    before = tree(tmp_path / 'have')
    os.makedirs(tmp_path / 'place')
    prepare._link(first, tmp_path / 'place/x.png')
    with pytest.raises(FileExistsError):
        prepare._link(second, tmp_path / 'place/x.png')
    assert tree(tmp_path / 'have') == before


def test_split_holds_out_what_training_would(folder, workdir, run_cli):
    before = tree(folder)
    code, out, err = run_cli(
        'ccl-timm', 'data', 'split', folder / 'train', 'parts', '--val-fraction', '0.25', '--seed', '3'
    )
    assert (
        code == 0 and '18 images of 3 classes in train, 6 images of 3 classes in validation, as symbolic links' in out
    )
    assert tree(folder) == before
    argv = ['--data-dir', str(folder / 'train'), '--val-fraction', '0.25', '--seed', '3']
    record = datasets.create_splits(TrainConfig.resolve(argv), channels=3).held_out
    assert set(tree(workdir / 'parts')) == {f'{part}/{name}' for name, part in record}


def test_classes_held_out_are_the_last_by_name(workdir, run_cli):
    source = write_folder(workdir / 'images', ('ant', 'bee', 'cat', 'dog', 'eel'), train=4) / 'train'
    run_cli('ccl-timm', 'data', 'split', source, 'all', '--val-fraction', '0.25')
    code, out, err = run_cli(
        'ccl-timm', 'data', 'split', source, 'half', '--val-fraction', '0.25', '--held-out-classes', '.5'
    )
    assert code == 0 and '8 images of 2 classes in unseen' in out, err
    classes = {split: sorted(path.name for path in Path('half', split).iterdir()) for split in ('train', 'unseen')}
    assert classes == {'train': ['ant', 'bee', 'cat'], 'unseen': ['dog', 'eel']}
    trained = sorted(path.relative_to('half') for path in Path('half').glob('[tv]*/*/*'))
    assert trained == sorted(path.relative_to('all') for path in Path('all').glob('*/[abc]*/*'))
    code, out, err = run_cli('ccl-timm', 'data', 'check', 'half')
    assert code == 0 and 'unseen' in out, out
    (Path('half/unseen/dog/more.png')).write_bytes(b'no image')
    code, out, err = run_cli('ccl-timm', 'data', 'check', 'half')
    assert code == 1 and 'unseen/dog/more.png' in out
    code, out, err = run_cli('ccl-timm', 'data', 'split', source, 'none', '--held-out-classes', '0.01')
    assert code == 2 and '0.01 of 5 classes is none or all of them' in err and not Path('none').exists()


def test_split_refuses_what_it_cannot_do(folder, workdir, run_cli):
    put(workdir / 'one/a/1.png')
    for number in range(5):
        put(workdir / f'one/b/{number}.png')
    code, out, err = run_cli('ccl-timm', 'data', 'split', 'one', 'parts')
    assert code == 0 and 'warning: 1 classes have one image, which is for training: a' in err
    assert os.listdir('parts/validation') == ['b'] and sorted(os.listdir('parts/train')) == ['a', 'b']
    shutil.copy('one/a/1.png', 'one/c.png')
    (workdir / 'nothing').mkdir()
    put(workdir / 'single/a/1.png')
    for argv, message in (
        (['one', 'parts'], "1 images in 'one' lie outside of any class folder, such as 'c.png'"),
        ([folder / 'train', 'parts'], "'parts' exists and is not empty"),
        ([folder / 'train', folder / 'train' / 'new'], 'which is not changed: name a folder outside'),
        ([folder, 'new'], f"has splits (train, validation): name one of them, such as '{folder}/train'"),
        ([folder / 'train', 'new', '--val-fraction', '1'], '--val-fraction: 1 must be above 0 and below 1'),
        (['nowhere', 'new'], "no folder 'nowhere'"),
        (['nothing', 'new'], 'Found 0 images'),
        (['single', 'new'], "No class in 'single' has two images"),
    ):
        code, out, err = run_cli('ccl-timm', 'data', 'split', *argv)
        assert code == 2 and message in err
    assert not (workdir / 'new').exists() and not (folder / 'train' / 'new').exists()


@pytest.fixture
def messy(tmp_path):
    """A folder with every problem that the check knows, each at one place."""
    root = tmp_path / 'messy'
    for number in range(4):
        put(root / f'train/ant/{number}.png', (number + 1, 0, 0), size=(10 + number, 6))
        put(root / f'train/bee/{number}.png', (0, number + 1, 0))
    put(root / 'train/cat/0.png', (0, 0, 9))
    put(root / 'validation/ant/0.png', (77, 0, 0), size=(40, 30))
    put(root / 'validation/bee/cmyk.jpg', (1, 2, 3, 4), 'CMYK')
    put(root / 'validation/bee/clear.png', (1, 2, 3, 4), 'RGBA')
    put(root / 'validation/bee/palette.png', 3, 'P')
    put(root / 'validation/bee/deep.png', 300, 'I;16')
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (8, 6), 5).save(root / 'validation/bee/turned.jpg', exif=exif)
    put(root / 'validation/2024/ant/1.png', (78, 0, 0))
    put(root / 'validation/dog/0.png', (5, 5, 5))
    put(root / 'validation/loose.png', (6, 6, 6))
    whole = put(tmp_path / 'whole.jpg', (9, 8, 7), size=(90, 90)).read_bytes()
    (root / 'train/ant/cut.jpg').write_bytes(whole[: len(whole) // 2])
    (root / 'train/ant/text.png').write_text('not an image at all')
    (root / 'train/ant/gone.png').symlink_to(tmp_path / 'gone.png')
    shutil.copy(root / 'train/ant/1.png', root / 'train/ant/again.png')
    shutil.copy(root / 'train/ant/2.png', root / 'train/bee/ant.png')
    shutil.copy(root / 'train/bee/3.png', root / 'validation/bee/leak.png')
    put(root / 'train/bee/photo.webp')
    (root / 'train/bee/.DS_Store').write_text('')
    (root / 'train/bee/._0.png').write_text('')
    (root / 'train/loop').symlink_to('bee')
    os.rename(put(root / 'train/ant/odd.png', (99, 9, 9)), os.fsencode(root / 'train/ant') + b'/\xff.png')
    (root / 'train/empty').mkdir()
    (root / 'test').mkdir()
    return root


MESS = {
    'unreadable': ['train/ant/cut.jpg', 'train/ant/gone.png', 'train/ant/text.png'],
    'no_class': ['validation/loose.png'],
    'empty_split': ['test'],
    'unknown_class': ['validation/dog'],
    'missing_class': ['validation/cat'],
    'deep_class': ['validation/2024/ant'],
    'empty_class': ['train/empty'],
    'several_splits': ['train/bee/3.png = validation/bee/leak.png'],
    'several_classes': ['train/ant/2.png = train/bee/ant.png'],
    'twice': ['train/ant/1.png = train/ant/again.png'],
    'sixteen_bit': ['validation/bee/deep.png'],
    'cmyk': ['validation/bee/cmyk.jpg'],
    'alpha': ['validation/bee/clear.png'],
    'turned': ['validation/bee/turned.jpg'],
    'palette': ['validation/bee/palette.png'],
    'other_file': ['train/bee/photo.webp'],
    'not_utf8': [r'train/ant/\xff.png'],
    'hidden': ['train/bee/._0.png'],
    'repeated': ['train/loop'],
}


def test_check_finds_each_problem_by_name(messy, run_cli):
    assert {*MESS, 'closed'} == set(check.PROBLEMS)  # root can list every folder
    code, out, err = run_cli('ccl-timm', 'data', 'check', messy, '--json')
    found = json.loads(out)
    assert code == 1 and found['broken'] is True
    names = {kind: [name.split(' (')[0] for name in row['names']] for kind, row in found['problems'].items()}
    assert names == MESS
    assert found['splits']['train'] == {
        'images': 15,
        'classes': 3,
        'fewest': {'class': 'cat', 'images': 1},
        'most': {'class': 'ant', 'images': 9},
        'ratio': 9.0,
        'width': [8, 9, 13],
        'height': [6, 6, 6],
    }
    code, out, err = run_cli('ccl-timm', 'data', 'check', messy, '--show', 1)
    assert code == 1 and 'train       15      3        1 to 9 (1 : 9.0)' in out
    assert 'broken: 3 cannot be decoded' in out and '... and 2 more' in out and 'text.png' not in out


@pytest.mark.parametrize(
    'kind', sorted(kind for kind, problem in check.PROBLEMS.items() if problem.breaks and kind != 'closed')
)
def test_each_broken_thing_alone_is_code_1(kind, folder, tmp_path, run_cli):
    root = shutil.copytree(folder, tmp_path / 'copy')
    if kind == 'unreadable':
        (root / 'train/ant/cut.png').write_bytes((root / 'train/ant/0.png').read_bytes()[:60])
    if kind == 'no_class':
        put(root / 'train/loose.png')
    if kind == 'empty_split':
        (root / 'test').mkdir()
    if kind == 'unknown_class':
        put(root / 'validation/dog/0.png')
    assert run_cli('ccl-timm', 'data', 'check', root)[0] == 1
    assert list(check.check_folder(root).problems)[0] == kind


def test_check_of_a_good_folder(folder, tmp_path, run_cli):
    before = tree(folder)
    code, out, err = run_cli('ccl-timm', 'data', 'check', folder)
    assert code == 0 and out.endswith('no problem found\n') and 'validation  12      3        4 to 4 (1 : 1.0)' in out
    code, out, err = run_cli('ccl-timm', 'data', 'check', folder / 'train')
    assert code == 0 and 'all    24      3' in out
    assert tree(folder) == before
    assert run_cli('ccl-timm', 'data', 'check', tmp_path)[0] == 2
    assert run_cli('ccl-timm', 'data', 'check', tmp_path / 'nowhere')[0] == 2


def test_notes_are_not_broken(folder, tmp_path, run_cli):
    root = shutil.copytree(folder, tmp_path / 'copy')
    shutil.copy(root / 'train/ant/0.png', root / 'validation/ant/leak.png')
    code, out, err = run_cli('ccl-timm', 'data', 'check', root)
    assert code == 0 and 'note: 1 same file in several splits' in out


def test_hold_out_does_not_depend_on_the_order_of_files():
    files, targets = [f'{number:03d}' for number in range(60)], [number % 3 for number in range(60)]
    held = {files[index] for index in datasets.stratified_holdout(files, targets, 0.2, 42)}
    order = np.random.default_rng(0).permutation(60)
    again = datasets.stratified_holdout([files[i] for i in order], [targets[i] for i in order], 0.2, 42)
    assert len(held) == 12 and {files[order[index]] for index in again} == held
