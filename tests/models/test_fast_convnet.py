"""The small network for small images, and its stem."""

import pytest
import timm
import torch

import ccl_timm
from ccl_timm.models.fast_convnet import FastConvNet, WhiteningStem, patch_basis


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_the_basis_is_orthonormal(channels):
    basis = patch_basis(channels).double().flatten(1)
    assert basis.shape == (4 * channels, 4 * channels)
    assert torch.allclose(basis @ basis.T, torch.eye(4 * channels, dtype=torch.float64), atol=1e-6)


def test_the_stem_whitens_patches_of_smooth_images():
    torch.manual_seed(0)
    shades = torch.randn(64, 1, 9, 9) + 0.3 * torch.randn(64, 3, 9, 9)  # colours that vary together
    images = torch.nn.functional.interpolate(shades, size=33, mode='bilinear', align_corners=True)
    stem = WhiteningStem(3)
    coordinates = stem.norm(torch.nn.functional.conv2d(images, stem.basis)).transpose(0, 1).flatten(1)
    pixels = torch.nn.functional.unfold(images, 2).transpose(0, 1).flatten(1)
    assert torch.allclose(coordinates.std(1), torch.ones(12), atol=0.02)
    assert between(coordinates) < 0.05 < 0.5 < between(pixels)


def between(rows):
    """Mean absolute correlation between different rows."""
    correlations = torch.corrcoef(rows).abs()
    return float((correlations.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def test_the_stem_gives_both_signs():
    out = WhiteningStem(1)(torch.randn(4, 1, 8, 8))
    assert out.shape == (4, 8, 7, 7)
    plus, minus = out.chunk(2, 1)
    whitened = plus - minus  # gelu(x) - gelu(-x) = x
    assert torch.allclose(whitened.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(whitened.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-3)


def test_it_is_a_timm_model():
    model = timm.create_model('fast_convnet', num_classes=5, in_chans=1)
    images = torch.randn(2, 1, 28, 28)
    assert model(images).shape == (2, 5)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)) / 8)
    model.reset_classifier(0, 'avg')
    model.eval()
    assert torch.equal(model(images), model.forward_features(images).mean((2, 3)) / 8)
    whole = timm.create_model('fast_convnet')
    assert whole.forward_features(torch.randn(1, 3, 32, 32)).shape[2:] == whole.default_cfg['pool_size']
    levels = timm.create_model('fast_convnet', features_only=True)
    maps = levels(torch.randn(2, 3, 32, 32))
    assert [tuple(map.shape[1:]) for map in maps] == [(64, 15, 15), (128, 7, 7), (256, 3, 3)]
    assert levels.feature_info.reduction() == [2, 4, 8]


@pytest.mark.parametrize('name', ['fast_convnet', 'fast_convnet_cam'])
def test_poolings(name):
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name, num_classes=5, global_pool='catavgmax')
    assert model(images).shape == (2, 5) and model.head_hidden_size == 512
    model.reset_classifier(0)
    assert model(images).shape == (2, 512)
    model.reset_classifier(0, '')
    assert model(images).shape == (2, 256, 7, 7)
    model.reset_classifier(3, 'avg')
    assert model(images).shape == (2, 3) and model.head_hidden_size == 256


def test_widths():
    model = ccl_timm.create_model('fast_convnet_cam', num_classes=4, widths=(8, 16, 24))
    assert isinstance(model, FastConvNet) and model.head_hidden_size == 24
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_two_widths_are_refused():
    with pytest.raises(ValueError, match=r'widths=\(64, 256\): give three'):
        timm.create_model('fast_convnet', widths=(64, 256))
