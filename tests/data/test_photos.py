"""Photographs: decoded as Pillow decodes, kept on disk once, and cropped at random as timm crops."""

import io
import os
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import ExifTags, Image
from torchvision import transforms

from ccl_timm.data import image_cache
from ccl_timm.data import photos as decoding
from ccl_timm.data.config import LoaderConfig
from ccl_timm.data.datasets import create_splits
from ccl_timm.data.image_cache import ImageCache, cached_images
from ccl_timm.data.in_memory import random_boxes
from ccl_timm.data.loaders import evaluation_loader, make_loaders
from ccl_timm.data.photos import RandomPhotos, decode_resized, resized, shrunk_size
from ccl_timm.data.threads import image_threads

CPU = torch.device('cpu')
UNCHANGED = {'mean': (0.0,) * 3, 'std': (1 / 255,) * 3}  # normalised values are those of the pixels


@pytest.fixture(scope='session')
def photo():
    """A photograph (420, 640), of those in scikit-learn."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image('china.jpg')).crop((0, 0, 640, 420))


@pytest.fixture(scope='session')
def photos(tmp_path_factory, photo):
    """A folder of two classes, with photographs of several sizes. Do not change it."""
    root = tmp_path_factory.mktemp('photos')
    draw = np.random.default_rng(0)
    for split, count in (('train', 12), ('validation', 4)):
        for number in range(count):
            left, top, width, height = draw.integers((0, 0, 90, 90), (300, 200, 300, 200))
            path = root / split / ('left' if left < 150 else 'right') / f'{number}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((left, top, left + width, top + height)).save(path, quality=90)
    return root


def pixels_of(image):
    return transforms.functional.pil_to_tensor(image)


def cache_of(*images):
    """A cache in memory of images (C, H, W)."""
    shapes = np.array([(*image.shape[1:], len(image)) for image in images])
    pixels = torch.cat([image.permute(1, 2, 0).flatten() for image in images])
    return ImageCache(pixels.numpy(), shapes, np.arange(len(images)))


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('bicubic', [False, True], ids=['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [(100, 77), (500, 700)], ids=['shrunk', 'enlarged'])
def test_resized_equals_pillow_within_one_level(photo, size, bicubic, mode):
    image = photo.convert(mode)
    theirs = image.resize(size[::-1], Image.BICUBIC if bicubic else Image.BILINEAR)
    ours = resized(pixels_of(image), size, bicubic)
    assert ours.dtype == torch.uint8
    difference = (ours.int() - pixels_of(theirs).int()).abs()
    assert difference.max() <= 2 and (difference > 1).double().mean() < 1e-5


FILES = {
    'jpeg': ('RGB', {'format': 'JPEG', 'quality': 90}, 'RGB'),
    'progressive jpeg': ('RGB', {'format': 'JPEG', 'progressive': True}, 'RGB'),
    'grey jpeg': ('L', {'format': 'JPEG'}, 'RGB'),
    'grey from colour': ('RGB', {'format': 'JPEG'}, 'L'),
    'cmyk jpeg': ('CMYK', {'format': 'JPEG'}, 'RGB'),
    'png': ('RGB', {'format': 'PNG'}, 'RGB'),
    'palette': ('P', {'format': 'PNG'}, 'RGB'),
}


@pytest.mark.parametrize('case', FILES)
def test_decoded_pixels_are_pillows(case, photo):
    kept, options, mode = FILES[case]
    file = encoded(photo.convert(kept), **options)
    theirs = pixels_of(Image.open(io.BytesIO(file.getvalue())).convert(mode))
    assert torch.equal(decode_resized(file, mode, lambda size: size), theirs)
    assert file.closed


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_not_heeded_as_elsewhere(orientation, photo):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = encoded(photo, format='JPEG', exif=exif)
    theirs = pixels_of(Image.open(io.BytesIO(file.getvalue())))
    assert torch.equal(decode_resized(file, 'RGB', lambda size: size), theirs)


@pytest.mark.parametrize('size', [(420, 640), (40, 60)])
def test_without_torchcodec_pixels_are_the_same(photo, size, monkeypatch):
    file = encoded(photo, format='JPEG')
    with_it = decode_resized(io.BytesIO(file.getvalue()), 'RGB', lambda _: size)
    assert decoding._torchcodec() is not None
    decoding._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, 'torchcodec.decoders', None)
    try:
        assert decoding._torchcodec() is None
        assert torch.equal(decode_resized(file, 'RGB', lambda _: size), with_it)
    finally:
        decoding._torchcodec.cache_clear()


def test_what_torchcodec_does_not_decode_pillow_does(photo, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('12 bits are not supported')

    monkeypatch.setattr(decoding, '_torchcodec', lambda: fail)
    file = encoded(photo, format='JPEG')
    expected = pixels_of(Image.open(io.BytesIO(file.getvalue())))
    assert torch.equal(decode_resized(file, 'RGB', lambda size: size), expected)


def test_threads_for_images_compute_alone_and_others_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with image_threads(2) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
            assert torch.get_num_threads() == 2
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_large_jpegs_are_decoded_small(photo):
    file = encoded(photo, format='JPEG', quality=95)
    theirs = resized(pixels_of(Image.open(io.BytesIO(file.getvalue()))), (42, 64))
    ours = decode_resized(file, 'RGB', lambda size: (42, 64))
    difference = (ours.float() - theirs.float()).abs()
    assert 0 < difference.mean() < 5  # of 255 levels: another filter, the same picture


def test_sizes_shrink_where_that_saves():
    assert shrunk_size((480, 704), 448) == (480, 704)
    assert shrunk_size((704, 480), 192) == (281, 192)
    assert shrunk_size((100, 300), 192) == (100, 300)


def test_boxes_of_images_of_several_sizes_are_distributed_as_timms():
    torch.manual_seed(0)
    random.seed(0)
    sizes = torch.tensor([[40, 90], [90, 30]])
    height, width = sizes.repeat(4000, 1).unsqueeze(-1).unbind(1)
    boxes = random_boxes(height, width, (0.08, 1.0), (3 / 4, 4 / 3)).double()
    for start, (h, w) in enumerate(sizes.tolist()):
        blank = Image.new('L', (w, h))
        draw = timm.data.transforms.RandomResizedCropAndInterpolation.get_params
        theirs = torch.tensor([draw(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]).double()
        ours = boxes[start::2]
        assert torch.allclose(ours.mean(0), theirs.mean(0), rtol=0.06)
        assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.06)


@pytest.mark.parametrize('interpolation', RandomPhotos.interpolations)
def test_random_crops_have_the_moments_of_timms(photo, interpolation):
    torch.manual_seed(0)
    random.seed(0)
    theirs = timm.data.create_transform(
        32, is_training=True, use_prefetcher=True, color_jitter=0.0, interpolation=interpolation
    )
    expected = torch.stack([torch.as_tensor(theirs(photo)) for _ in range(1500)]).double()
    images = RandomPhotos(cache_of(pixels_of(photo)), (32, 32), interpolation=interpolation, workers=2, **UNCHANGED)
    ours = images(torch.zeros(1500, dtype=torch.int64)).double()
    assert ours.shape == (1500, 3, 32, 32)
    for name in ('mean', 'std'):
        found, wanted = getattr(ours, name)(0), getattr(expected, name)(0)
        assert (found - wanted).abs().mean() < 3.0  # of 255 levels
    assert (ours.mean((2, 3)).std(0) - expected.mean((2, 3)).std(0)).abs().max() < 2.0


def test_padded_crops_are_windows_of_the_padded_image_and_all_come_up():
    small = torch.arange(1, 1 + 3 * 5 * 6, dtype=torch.uint8).view(3, 5, 6)
    images = RandomPhotos(cache_of(small * 0, small), (5, 4), pad_crop=2, hflip=0.0, **UNCHANGED)
    padded = torch.nn.functional.pad(small, (2,) * 4)
    windows = {(t, x): padded[:, t : t + 5, x : x + 4].float() for t in range(5) for x in range(7)}
    found = set()
    for crop in images(torch.ones(600, dtype=torch.int64)).round():
        found |= {key for key, window in windows.items() if torch.equal(crop, window)}
    assert found == set(windows)


def test_flips_have_their_chances():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, 0, 0] = 255
    options = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'hflip': 0.25, 'vflip': 0.75}
    drawn = RandomPhotos(cache_of(image), (8, 8), **options, **UNCHANGED)(torch.zeros(2000, dtype=torch.int64))
    shares = [(drawn[:, 0, row, column] > 128).double().mean() for row in (0, -1) for column in (0, -1)]
    assert torch.allclose(torch.stack(shares), torch.tensor([3, 1, 9, 3]).double() / 16, atol=0.04)


def test_threads_do_not_change_what_is_drawn(photo):
    drawn = []
    for workers in (0, 3):
        torch.manual_seed(5)
        images = RandomPhotos(cache_of(pixels_of(photo)), (16, 16), workers=workers, **UNCHANGED)
        drawn.append(images(torch.zeros(9, dtype=torch.int64)))
    assert torch.equal(*drawn)


def read_small(number):
    return torch.full((3, 2 + number, 4), number, dtype=torch.uint8), 2 * number


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('CCL_TIMM_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'images'


def test_cache_is_written_once(cache_folder):
    calls = []
    for _ in range(2):
        cache = cached_images(lambda number: calls.append(number) or read_small(number), 100, {'data': 'a'}, workers=2)
    assert sorted(calls) == list(range(100))
    assert all(torch.equal(cache[number], read_small(number)[0]) for number in (0, 57, 99))
    assert cache.labels.tolist() == list(range(0, 200, 2)) and cache.readable.tolist() == list(range(100))
    assert len(os.listdir(cache_folder)) == 2
    cached_images(read_small, 100, {'data': 'b'}, workers=0)
    assert len(os.listdir(cache_folder)) == 4


def test_another_process_opens_the_cache_itself(cache_folder):
    cache = cached_images(read_small, 100, {}, workers=1)
    sent = pickle.dumps(cache)
    assert len(sent) < 300 < cache.pixels.size
    assert torch.equal(pickle.loads(sent)[57], cache[57])


def test_a_damaged_cache_is_written_anew(cache_folder):
    cached_images(read_small, 9, {}, workers=1)
    (pixels,) = cache_folder.glob('*.pixels')
    os.truncate(pixels, 50)
    assert torch.equal(cached_images(read_small, 9, {}, workers=1)[8], read_small(8)[0])
    (index,) = cache_folder.glob('*.index.npz')
    for size in (0, index.stat().st_size // 2):
        os.truncate(index, size)
        assert torch.equal(cached_images(read_small, 9, {}, workers=1)[8], read_small(8)[0])


def test_unreadable_images_are_tried_again(cache_folder):
    calls = []

    def read_but_four(number):
        calls.append(number)
        return read_small(number)[0], -(number == 4)

    for _ in range(2):
        cache = cached_images(read_but_four, 9, {}, workers=1)
        assert cache.readable.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert sorted(calls) == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert len(cached_images(read_small, 9, {}, workers=1).readable) == 9


def test_a_failure_leaves_nothing_behind(cache_folder):
    with pytest.raises(ZeroDivisionError):
        cached_images(lambda number: 1 / 0, 9, {}, workers=1)
    assert os.listdir(cache_folder) == []


def test_without_a_place_to_write_there_is_no_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('CCL_TIMM_CACHE', str(tmp_path / 'file'))
    assert cached_images(read_small, 9, {}, workers=1) is None
    assert 'cannot be kept' in capsys.readouterr().err


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_evaluation_from_disk_is_timms_bit_for_bit(photos, cache_folder, interpolation):
    config = {'input_size': (3, 48, 48), 'mean': (0.48, 0.45, 0.4), 'std': (0.2, 0.21, 0.19), 'batch_size': 3}
    config |= {'interpolation': interpolation, 'crop_pct': 0.9, 'crop_mode': 'center'}
    batches = []
    for place in ('files', 'disk'):
        dataset = create_splits(LoaderConfig(data_dir=str(photos)), 3).validation
        batches.append(list(evaluation_loader(dataset, config, CPU, workers=0, place=place)))
    assert len(batches[0]) == len(batches[1]) == 2
    for (images, labels), (expected, expected_labels) in zip(*batches, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_unreadable_photos_are_left_out(photos, cache_folder, tmp_path, capsys):
    folder = tmp_path / 'train' / 'all'
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((photos / 'train').glob('*/*.jpg'))):
        content = path.read_bytes()
        (folder / f'{number}.jpg').write_bytes(content[: len(content) // 2] if number == 3 else content)
    config = LoaderConfig(data_dir=str(tmp_path), val_split='', in_memory='disk', color_jitter=0.0, batch_size=11)
    data = {'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'crop_pct': 1.0, 'crop_mode': 'center'}
    loader, _ = make_loaders(config, 1, CPU, data | UNCHANGED, create_splits(config, 3))
    err = capsys.readouterr().err
    assert (
        "'all/3.jpg' cannot be read" in err and 'later runs use it, and try the 1 again that could not be read' in err
    )
    ((images, labels),) = loader
    assert len(images) == 11 and not labels.any()
    for path in folder.iterdir():
        path.write_bytes(b'no image')
    dataset = create_splits(config, 3).train
    none = evaluation_loader(dataset, {**data, **UNCHANGED, 'batch_size': 11}, CPU, 0, 'disk')
    assert all((target == -1).all() for _, target in none)


# what is said at the start of a run on photographs, and options
CHOICES = {
    'by itself': ([], '12 images decoded into'),
    'asked for': (['--in-memory', 'disk'], '12 images decoded into'),
    'one at a time': (['--aa', 'rand-m3'], '12 images decoded into'),
    'colour': (['--color-jitter', '0.4', '--train-interpolation', 'random'], '12 images decoded into'),
    'other filter': (['--train-interpolation', 'lanczos'], '12 images decoded into'),
    'no augmentation': (['--no-aug', '--in-memory', 'disk'], '12 images decoded into'),
    'pad-crop': (['--pad-crop', '4', '--in-memory', 'disk'], '12 images decoded into'),
    'pad-crop and policy': (['--pad-crop', '4', '--aa', 'rand-m3'], '12 images decoded into'),
    'mixup and erasing': (['--mixup', '0.2', '--reprob', '0.5', '--smoothing', '0'], '12 images decoded into'),
    'a share': (['--val-fraction', '0.25', '--train-fraction', '0.9'], 'images decoded into'),
    'off': (['--in-memory', 'off'], 'read by 0 workers'),
    'smaller than the input': (['--img-size', '320'], '12 images decoded into'),
}


@pytest.mark.parametrize('case', CHOICES)
def test_choice_is_logged_and_trains(case, run_cli, photos, workdir, cache_folder):
    argv, said = CHOICES[case]
    fast = ['--model', 'test_resnet', '--loss', 'ce', '--epochs', '1', '-b', '4', '-j', '0', '--img-size', '32']
    code, out, err = run_cli('timm', 'train.py', '--data-dir', photos, *fast, '--color-jitter', '0', *argv)
    assert code == 0, err
    assert said in err


def test_a_later_run_uses_the_cache_and_is_the_same(run_cli, photos, workdir, cache_folder):
    fast = ['--model', 'test_resnet', '--loss', 'ce', '--epochs', '2', '-b', '4', '-j', '0', '--img-size', '32']
    runs = [run_cli('timm', 'train.py', '--data-dir', photos, *fast, '--color-jitter', '0') for _ in range(2)]
    assert [('decoded into' in err) for _, _, err in runs] == [True, False]
    first, second = (summary_of(workdir, number) for number in (0, 1))
    assert first == second


def summary_of(workdir, number):
    """Losses and accuracies of a run's epochs."""
    folder = sorted((workdir / 'output' / 'train').iterdir(), key=lambda path: path.stat().st_mtime)[number]
    lines = (folder / 'summary.csv').read_text().splitlines()
    names = lines[0].split(',')
    kept = [names.index(name) for name in names if 'loss' in name or 'top1' in name]
    return [[line.split(',')[place] for place in kept] for line in lines[1:]]


def test_too_large_for_the_disk(run_cli, photos, workdir, monkeypatch):
    monkeypatch.setattr(image_cache.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1))
    fast = ['--model', 'test_resnet', '--loss', 'ce', '--epochs', '1', '-b', '4', '-j', '0', '--img-size', '32']
    code, _, err = run_cli('timm', 'train.py', '--data-dir', photos, *fast)
    assert code == 0 and 'GiB, and 0.0 are free' in err
    code, _, err = run_cli('timm', 'train.py', '--data-dir', photos, *fast, '--in-memory', 'disk')
    assert code == 2 and '--in-memory disk does not work here: it would take' in err


def test_what_is_on_disk_already_needs_no_room(run_cli, photos, workdir, cache_folder, monkeypatch):
    fast = ['--model', 'test_resnet', '--loss', 'ce', '--epochs', '1', '-b', '4', '-j', '0', '--img-size', '32']
    assert 'images decoded into' in run_cli('timm', 'train.py', '--data-dir', photos, *fast, '--color-jitter', '0')[2]
    monkeypatch.setattr(image_cache.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1))
    code, _, err = run_cli('timm', 'train.py', '--data-dir', photos, *fast, '--color-jitter', '0')
    assert code == 0 and 'are free' not in err


def test_processes_that_wait_hear_of_one_that_decodes(cache_folder, monkeypatch):
    said = []
    monkeypatch.setattr(image_cache, '_SIGN_OF_LIFE', -1)
    monkeypatch.setattr(image_cache, 'on_all_processes', lambda done: said.append(done) or done)
    assert len(cached_images(lambda number: (torch.zeros(3, 2, 2, dtype=torch.uint8), 0), 3, {}, 1)) == 3
    assert said == [False, False, False, True, True]


def test_disk_is_refused_for_images_that_are_no_files(run_cli, workdir):
    code, _, err = run_cli('timm', 'train.py', '--in-memory', 'disk')
    assert code == 2 and '--in-memory disk does not work here: the images are not files' in err
