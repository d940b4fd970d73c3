"""Every registered model of ours: timm's model API, weights in and out, and what must not happen to them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import ccl_timm
from ccl_timm.heads import HEADS
from ccl_timm.models import MODELS, variants
from ccl_timm.testing import check_model


@pytest.mark.parametrize('name', sorted(MODELS))
def test_model(name):
    big = name.startswith('vit_base')
    check_model(name, img_size=32, **({'depth': 2} if big else {}))


@pytest.mark.parametrize('name', sorted(MODELS))
def test_default_cfg_is_like_the_backbones(name):
    backbone = timm.get_pretrained_cfg(name.rsplit('_', 1)[0])
    cfg = timm.get_pretrained_cfg(name)
    for key in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'first_conv', 'fixed_input_size'):
        assert getattr(cfg, key) == getattr(backbone, key)
    assert not cfg.has_weights


def backbone_file(tmp_path, backbone, **kwargs):
    """A file with the keys and shapes of timm's ImageNet weights."""
    torch.manual_seed(1)
    source = timm.create_model(backbone, **kwargs)
    path = tmp_path / 'weights.safetensors'
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, path)
    return path, state


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize('head', sorted(HEADS))
def test_imagenet_weights_reach_the_backbone_and_never_the_head(head, num_classes, tmp_path):
    path, state = backbone_file(tmp_path, 'resnet18')
    model = timm.create_model(
        f'resnet18_{head}', pretrained=True, pretrained_cfg_overlay={'file': str(path)}, num_classes=num_classes
    )
    own = model.state_dict()
    for key, value in state.items():
        if not key.startswith('fc.'):
            assert torch.equal(own[key], value), key
    for key, value in own.items():
        if key.startswith('fc.') and value.shape == state['fc.weight'].shape:
            assert not torch.equal(value, state['fc.weight']), key


def test_vgg_loses_its_large_layers():
    model = timm.create_model('vgg16_cam', num_classes=10)
    assert sum(p.numel() for p in model.parameters()) < 16e6
    assert model.head_hidden_size == 512


@pytest.mark.parametrize('size', [24, 28, 32])
def test_vgg_takes_small_images(size):
    model = timm.create_model('vgg16_cam', num_classes=10, small_input=True, in_chans=1).eval()
    assert model(torch.randn(1, 1, size, size)).shape == (1, 10)


def test_small_input_keeps_the_resolution():
    model = timm.create_model('resnet18_cam', small_input=True)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 512, 4, 4)


def test_small_input_is_refused_where_there_is_no_such_stem():
    with pytest.raises(ccl_timm.UserError, match="small_input=True does not fit 'vit_tiny_patch16_224_cam'"):
        timm.create_model('vit_tiny_patch16_224_cam', small_input=True)


def test_trained_checkpoint_comes_back_and_a_change_of_classes_keeps_the_hidden_layer(tmp_path):
    source = timm.create_model('resnet18_cam', num_classes=10, small_input=True, hidden_features=24).eval()
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    same = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(same(x), source(x))
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5)
    assert other(x).shape == (2, 5)
    assert torch.equal(other.fc.hidden.weight, source.fc.hidden.weight)
    assert torch.equal(other.conv1.weight, source.conv1.weight)


def test_checkpoint_of_other_options_is_refused_in_a_sentence(tmp_path):
    source = timm.create_model('resnet18_cam', num_classes=10, small_input=True)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    with pytest.raises(ccl_timm.UserError, match="does not fit 'resnet18_cam'.*Build the model with the options"):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, small_input=False)


def test_in_chans_of_a_trained_checkpoint_is_adapted(tmp_path):
    source = timm.create_model('resnet18_cam', num_classes=3)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    grey = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1)
    assert torch.allclose(grey.conv1.weight, source.conv1.weight.sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(grey.fc.out.weight, source.fc.out.weight)


def test_vit_position_embedding_of_a_trained_checkpoint_is_resized(tmp_path):
    source = timm.create_model('vit_tiny_patch16_224_cam', num_classes=3, img_size=32, depth=2)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    larger = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=64)
    assert larger.pos_embed.shape[1] == 17
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_features_only_is_timms():
    features = timm.create_model('resnet18_cam', features_only=True)(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == [64, 64, 128, 256, 512]


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(ccl_timm.UnknownNameError, match="Unknown model 'resnet18_can'; did you mean 'resnet18_cam'?"):
        ccl_timm.create_model('resnet18_can')


def test_register_variant_twice_is_the_same():
    first = ccl_timm.register_variant('resnet10t', 'cam')
    assert ccl_timm.register_variant('resnet10t', 'cam') is first
    assert timm.create_model('resnet10t_cam', num_classes=3).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert timm.get_pretrained_cfg('resnet10t_cam').mean == timm.get_pretrained_cfg('resnet10t').mean


@pytest.mark.parametrize(
    'args, message', [(('nonet', 'cam'), 'not a timm architecture'), (('resnet18', 'x'), 'no head')]
)
def test_register_variant_refuses(args, message):
    with pytest.raises(ccl_timm.UserError, match=message):
        ccl_timm.register_variant(*args)


def test_model_with_several_classifiers_is_refused():
    with pytest.raises(ccl_timm.UserError, match='no single classifier'):
        variants.variant_cfg('deit_tiny_distilled_patch16_224', HEADS['cam'])


def test_cam_head_is_the_papers_formula():
    head = HEADS['cam'](6, 3, hidden_features=4, reduction=2).double()
    pooled = torch.randn(5, 6, dtype=torch.float64)
    outputs = head.outputs(pooled)
    gate = head.attention
    squeezed = torch.clamp(pooled @ gate.reduce.weight.T + gate.reduce.bias, min=0)
    attention = 1 / (1 + torch.exp(-(squeezed @ gate.expand.weight.T + gate.expand.bias)))
    product = (pooled @ head.hidden.weight.T + head.hidden.bias) * attention
    features = torch.where(product > 0, product, 0)  # the product comes before the ReLU
    assert torch.allclose(outputs.attention, attention)
    assert torch.allclose(outputs.features, features)
    assert torch.allclose(outputs.logits, features @ head.out.weight.T + head.out.bias)
    assert torch.equal(head(pooled), outputs.logits)
