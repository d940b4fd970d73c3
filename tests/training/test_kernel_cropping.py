"""Convolutions without the taps that only meet padding: same results, same gradients, same names."""

import copy

import pytest
import timm
import torch
from torch import nn

from ccl_timm.training.kernel_cropping import crop_kernels

SHAPES = [  # kernel, stride, padding, groups, size of the image
    (3, 1, 1, 1, (1, 1)),
    (3, 2, 1, 1, (1, 1)),
    (3, 2, 1, 1, (2, 2)),
    (3, 2, 1, 1, (2, 5)),
    (3, 1, 1, 4, (1, 3)),
    (5, 1, 2, 1, (1, 1)),
    (5, 4, 2, 2, (3, 4)),
    (7, 2, 3, 1, (2, 1)),
    ((1, 3), 1, (0, 1), 1, (1, 1)),
    (3, 1, 1, 1, (6, 6)),
    (3, 3, 1, 1, (3, 3)),
]


@pytest.mark.parametrize('kernel, stride, padding, groups, size', SHAPES)
def test_values_and_gradients_are_those_of_the_whole_kernel(kernel, stride, padding, groups, size):
    torch.manual_seed(0)
    whole = nn.Conv2d(4, 8, kernel, stride, padding, groups=groups).double()
    cropped = copy.deepcopy(whole)
    assert crop_kernels(cropped) == 1
    x = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    expected, actual = whole(x), cropped(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((y**2).sum(), [x, *c.parameters()]) for y, c in
                 ((actual, cropped), (expected, whole))]  # fmt: skip
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size, places', [((1, 1), 1), ((2, 2), 4)])
def test_the_padding_is_really_left_out(size, places, monkeypatch):
    taps = []
    conv2d = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, 'conv2d', lambda x, w, *args: taps.append(w[0, 0].numel()) or conv2d(x, w, *args)
    )
    convolution = nn.Conv2d(2, 2, 3, stride=2 if places == 4 else 1, padding=1)
    crop_kernels(convolution)
    convolution(torch.randn(1, 2, *size))
    assert taps == [places]


def test_one_image_without_a_batch():
    whole = nn.Conv2d(2, 3, 3, padding=1)
    cropped = copy.deepcopy(whole)
    crop_kernels(cropped)
    for size in ((1, 1), (4, 4), (1, 4)):
        x = torch.randn(2, *size)
        torch.testing.assert_close(cropped(x), whole(x))


def test_what_torch_refuses_is_refused():
    convolution = nn.Conv2d(1, 1, 4, padding=1)
    crop_kernels(convolution)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        convolution(torch.randn(1, 1, 1, 1))


def test_what_cannot_be_cropped_stays_as_it_is():
    convolutions = [
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 3, padding='same'),
        nn.Conv2d(2, 2, 3, padding=2, dilation=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(2, 2, 1, padding=1),
    ]
    assert crop_kernels(nn.Sequential(*convolutions)) == 0


def test_model_keeps_its_weights_and_copies():
    model = timm.create_model('resnet18', num_classes=3, in_chans=1).double().eval()
    names = list(model.state_dict())
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    expected = model(x)
    assert crop_kernels(model) > 0
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-10, atol=1e-10)
