"""Images in memory: the same values as timm's loader, the same augmentations by other means, and when it is chosen."""

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from torchvision import transforms

from ccl_timm.data.datasets import Digits
from ccl_timm.data.in_memory import Augment, InMemoryLoader, decode, random_boxes, random_crops, resized_crops
from ccl_timm.data.loaders import evaluation_loader
from ccl_timm.errors import UserError

CPU = torch.device('cpu')


class Noise(Dataset):
    """Noise images, of one size or several."""

    def __init__(self, *sizes):
        random = np.random.default_rng(0)
        self.images = [random.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes]
        self.labels = list(range(len(sizes)))
        self.transform = None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


@pytest.mark.parametrize('size', [(40, 52), (20, 17)], ids=['shrunk', 'enlarged'])
def test_evaluation_is_timms_bit_for_bit(size):
    config = {'input_size': (3, 32, 32), 'mean': (0.48, 0.45, 0.4), 'std': (0.2, 0.21, 0.19), 'batch_size': 3}
    config |= {'interpolation': 'bicubic', 'crop_pct': 0.9, 'crop_mode': 'center'}
    theirs = timm.data.create_loader(Noise(*[size] * 7), is_training=False, num_workers=0, device=CPU, **config)
    ours = evaluation_loader(Noise(*[size] * 7), config, CPU, workers=0, place='memory')
    assert len(ours) == len(theirs) == 3
    for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_random_crops_are_windows_of_the_padded_image_and_all_come_up():
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.int16).view(2, 3, 6, 6)
    crops = random_crops(images, torch.tensor([1, 0] * 100), (4, 4))
    windows = {
        (n, top, left): images[n, :, top : top + 4, left : left + 4]
        for n in range(2) for top in range(3) for left in range(3)
    }  # fmt: skip
    found = set()
    for crop, n in zip(crops, [1, 0] * 100, strict=True):
        (key,) = [key for key, window in windows.items() if key[0] == n and torch.equal(crop, window)]
        found.add(key)
    assert found == set(windows)


def test_random_crops_on_an_accelerator_go_another_way_to_the_same_place(monkeypatch):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    first = random_crops(images, torch.arange(5), (6, 6))
    torch.manual_seed(0)
    fake = type('Device', (), {'type': 'elsewhere'})()
    monkeypatch.setattr(torch.Tensor, 'device', fake, raising=False)
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, *_, **__: self)
    assert torch.equal(first, random_crops(images, torch.arange(5), (6, 6)))


def test_mirror_images_come_as_often_as_asked():
    images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    augment = Augment(images, (3, 4), hflip=0.25)
    drawn = augment(torch.zeros(4000, dtype=torch.int64))
    mirrored = (drawn == images.flip(-1)).flatten(1).all(1)
    assert ((drawn == images).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean() == pytest.approx(0.25, abs=0.03)
    upside_down = Augment(images, (3, 4), vflip=1.0)(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(upside_down, images.flip(-2).expand(2, -1, -1, -1))


def test_resized_crops_cut_first_and_enlarge_then():
    images = torch.rand(3, 2, 9, 11, dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 9, 11], [2, 3, 4, 5], [8, 10, 1, 1]], dtype=torch.float64)
    out = resized_crops(images, boxes, (12, 13))
    for image, (top, left, height, width), result in zip(images, boxes.int().tolist(), out, strict=True):
        cut = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(cut, (12, 13), mode='bilinear', align_corners=False)[0]
        assert torch.allclose(result, expected, atol=1e-12)


def test_resized_crops_are_pillows_to_one_grey_level():
    digit = Digits('train', 'L')[3][0]
    cut = transforms.functional.resized_crop(digit, 1, 0, 6, 7, (32, 32))
    image = transforms.functional.pil_to_tensor(digit)[None].float()
    ours = resized_crops(image, torch.tensor([[1.0, 0, 6, 7]]), (32, 32))
    assert (ours - transforms.functional.pil_to_tensor(cut)).abs().max() <= 1.0


def test_boxes_are_distributed_as_timms():
    torch.manual_seed(0)
    side = torch.full((4000, 1), 32)
    boxes = random_boxes(side, side, (0.3, 1.0), (0.75, 4 / 3))
    transform = create_transform(32, is_training=True, scale=(0.3, 1.0), ratio=(0.75, 4 / 3)).transforms[0]
    blank = Image.new('L', (32, 32))
    theirs = torch.tensor([transform.get_params(blank, transform.scale, transform.ratio) for _ in range(4000)])
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        ours, expected = quantity(boxes.double()), quantity(theirs.double())
        assert ours.mean() == pytest.approx(expected.mean().item(), rel=0.08)
        assert ours.std() == pytest.approx(expected.std().item(), rel=0.1)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 32).all() and (boxes[:, 2:] >= 1).all()


def test_boxes_of_an_impossible_ratio_are_central():
    boxes = random_boxes(torch.full((3, 1), 10), torch.full((3, 1), 40), (1.0, 1.0), (1.0, 1.0))
    assert boxes.tolist() == [[0, 15, 10, 10]] * 3


def test_decode_reads_all_or_finds_that_sizes_differ():
    images, labels = decode(Noise((5, 6), (5, 6)), transforms.PILToTensor())
    assert images.shape == (2, 3, 5, 6) and images.dtype == torch.uint8 and labels.tolist() == [0, 1]
    assert decode(Noise((5, 6), (5, 7)), transforms.PILToTensor()) is None


def test_decode_by_processes_takes_few_file_descriptors():
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        images, labels = decode(Noise(*[(5, 6)] * 600), transforms.PILToTensor(), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert images.shape == (600, 3, 5, 6) and labels.tolist() == list(range(600))


def test_decode_without_a_readable_image():
    noise = Noise((1, 1))
    noise.labels = [-1]
    with pytest.raises(UserError, match='Not one image'):
        decode(noise, transforms.PILToTensor())


def test_last_batch_is_kept_or_dropped():
    augment = Augment(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), (2, 2))
    labels = torch.arange(5)
    for drop_last, sizes in ((False, [2, 2, 1]), (True, [2, 2])):
        loader = InMemoryLoader(augment, labels, SequentialSampler(labels), 2, (0.5,), (0.5,), CPU, drop_last)
        assert [len(target) for _, target in loader] == sizes and len(loader) == len(sizes)


# what is said at the start of a run on images of 12 x 12, by name
CHOICES = {
    'small and enlarged': ([], '24 training images in memory'),
    'random interpolation': (['--train-interpolation', 'random'], 'random is not bilinear'),
    'large images': (['--img-size', '8'], 'its images (12 x 12) are larger than the input'),
    'colour': (['--color-jitter', '0.4'], '--color-jitter work on one image at a time'),
    'off': (['--in-memory', 'off'], 'read by 0 workers'),
    'no augmentation': (['--no-aug'], '24 training images in memory'),
    'pad-crop': (['--pad-crop', '4', '--hflip', '0.5'], '24 training images in memory'),
    'mixup and erasing': (['--mixup', '0.2', '--reprob', '0.5', '--smoothing', '0'], '24 training images in memory'),
    'balanced': (['--samples-per-class', '4'], '24 training images in memory'),
    'balanced, from files': (['--samples-per-class', '4', '--in-memory', 'off'], 'read by 0 workers'),
    'kept a little larger': (['--img-size', '8', '--in-memory', 'on', '--val-split', ''], 'images are kept at 9 x 9'),
}


@pytest.mark.parametrize('case', CHOICES)
def test_choice_is_logged_and_trains(case, run_cli, folder, workdir):
    argv, said = CHOICES[case]
    fast = ['--model', 'test_resnet', '--loss', 'ce', '--epochs', '1', '-b', '8', '-j', '0', '--img-size', '32']
    plain = ['--train-interpolation', 'bilinear', '--color-jitter', '0']
    code, out, err = run_cli('timm', 'train.py', '--data-dir', folder, *fast, *plain, *argv)
    assert code == 0, err
    assert said in err


def test_in_memory_on_is_refused_where_it_cannot_be(run_cli, workdir):
    code, out, err = run_cli('timm', 'train.py', '--in-memory', 'on', '--color-jitter', '0.4')
    assert code == 2 and '--in-memory on does not work here: --color-jitter' in err
