"""Every registered model of ours: timm's model API, weights in and out, and what must not happen to them."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

import ccl_timm
from ccl_timm.errors import UserError
from ccl_timm.heads import head_class, list_heads
from ccl_timm.models import MODELS
from ccl_timm.models.cost import cost
from ccl_timm.testing import check_model, model_checks


def small(name):
    """What makes an architecture small enough for a test, at 32 px."""
    if name.startswith('swin'):
        return {'depths': (1, 1, 1, 1), 'patch_size': 2, 'window_size': 4}
    return {'depth': 3} if name.startswith('vit') else {}


# every named model; by default large backbones with one head each, since all heads are tried on the smaller ones
LARGE = ('densenet121', 'resnet50', 'swin', 'vgg16', 'vit_base', 'vit_small')
TRIED = ('resnet50_cam', 'vgg16_cam', 'swin_base_patch4_window7_224_cam')  # of those, by default
NAMED = [
    pytest.param(name, marks=[pytest.mark.slow] if name.startswith(LARGE) and name not in TRIED else [])
    for name in sorted(MODELS)
]
# what the backbone decides, whatever its head: checked with one head of each, and with every head of a ResNet-18
OF_THE_BACKBONE = (model_checks.memory_formats_agree, model_checks.checkpointing_is_exact)


@pytest.mark.parametrize('name', NAMED)
def test_model(name):
    again = not name.endswith('_cam') and not name.startswith('resnet18')
    checks = [check for check in model_checks.MODEL_CHECKS if not again or check not in OF_THE_BACKBONE]
    check_model(name, img_size=32, checks=checks, **small(name))


@pytest.mark.parametrize('name', NAMED)
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


@pytest.mark.parametrize('name', NAMED)
def test_imagenet_weights_of_every_family_fit(name):
    """timm's own keys, at 1000 classes and a width equal to the backbone's, so that a wrong tensor would fit."""
    backbone, _, head = name.rpartition('_')
    options = {**small(name), **({'img_size': 32} if name.startswith(('swin', 'vit')) else {})}
    torch.manual_seed(1)
    state = timm.create_model(backbone, **options).state_dict()
    width = {'cam': 'hidden_features', 'pedcc': 'feature_dim'}.get(head)
    cfg = timm.get_pretrained_cfg(backbone)
    path = cfg.classifier
    if width:
        options[width] = 1000
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': state}, **options)
    own = model.state_dict()
    shared = [key for key in state if not key.startswith((f'{path}.', 'pre_logits.'))]
    assert all(torch.equal(own[key], state[key]) for key in shared if 'relative_position_index' not in key)
    assert not any(torch.equal(value, state[f'{path}.weight']) for key, value in own.items() if key.startswith(path))
    assert 'state_dict' not in model.pretrained_cfg


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize('head', list_heads())
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


@pytest.mark.parametrize(
    'backbone, places', [('resnet18', 4), ('resnet50', 4), ('densenet121', 4), ('mobilenetv2_100', 2), ('vgg16_bn', 2)]
)
def test_small_input_keeps_the_resolution(backbone, places):
    model = timm.create_model(f'{backbone}_cam', num_classes=5, small_input=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert model.forward_features(x).shape[2:] == (places, places)
    assert model(x).shape == (1, 5)


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


def test_a_pedcc_checkpoint_takes_more_classes_than_its_width_was_chosen_for(tmp_path):
    source = timm.create_model('test_resnet_pedcc', num_classes=10)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=300)
    assert other.fc.weight.shape == (300, 512) and torch.equal(other.fc.linear.weight, source.fc.linear.weight)
    timm.models.save_for_hf(other, str(tmp_path / 'again'), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True, num_classes=10)
    assert again.fc.weight.shape == (10, 512)


def test_a_missing_embedding_is_refused_with_other_classes_too(tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet_cosine', num_classes=9), tmp_path, safe_serialization=True)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5).fc.scale == 30
    with pytest.raises(ccl_timm.UserError, match='does not fit .*missing .*fc.embedding.0.weight'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5, feature_dim=7)


@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_weights_say_how_wide_their_embedding_is(head, tmp_path):
    source = timm.create_model(f'test_resnet_{head}', num_classes=9, feature_dim=7)
    save_file(source.state_dict(), tmp_path / 'weights.safetensors')
    overlay = {'file': str(tmp_path / 'weights.safetensors'), 'num_classes': 9}
    for classes in (9, 5):
        model = timm.create_model(
            f'test_resnet_{head}', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
        )
        own, theirs = (m.fc.embedding[0] if head == 'cosine' else m.fc.hidden for m in (model, source))
        assert torch.equal(own.weight, theirs.weight) and model.num_classes == classes


@pytest.mark.parametrize('name', ['test_resnet_linear', 'test_vit_linear'])
def test_no_classes_without_pooling(name):
    model = timm.create_model(name, num_classes=9)
    model.reset_classifier(0, '')
    with pytest.raises(ccl_timm.UserError, match="global_pool='' works with num_classes=0 only"):
        model.reset_classifier(5)
    model.reset_classifier(5, 'avg')
    assert model(torch.randn(1, *model.pretrained_cfg['input_size'])).shape == (1, 5)


def test_copies_of_a_compiled_model_have_weights_of_their_own():
    model = timm.create_model('test_resnet_cam', num_classes=5).eval()
    model.compile(backend='eager')
    twin = pickle.loads(pickle.dumps(model))
    for copied in (copy.deepcopy(model), twin):
        torch.nn.init.zeros_(copied.fc.out.weight)
        torch.nn.init.zeros_(copied.fc.out.bias)
        assert not copied(torch.randn(2, 3, 32, 32)).any()
    assert model(torch.randn(2, 3, 32, 32)).any()


def test_weights_that_an_overlay_names_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    source = timm.create_model('test_resnet_cam', num_classes=7)
    torch.save(source.state_dict(), tmp_path / 'own.pth')
    for overlay in ({'file': str(tmp_path / 'own.pth')}, {'url': (tmp_path / 'own.pth').as_uri()}):
        overlay = {**overlay, 'num_classes': 7}
        model = timm.create_model('test_resnet_cam', pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.fc.out.weight, source.fc.out.weight)


@pytest.mark.parametrize('options', [{}, {'small_input': True}])
def test_features_of_a_vgg_have_all_its_levels(options):
    assert len(timm.create_model('vgg11_cam', features_only=True, **options)(torch.randn(1, 3, 64, 64))) == 6


def test_options_of_a_backbone_that_variants_set_may_be_given():
    assert timm.create_model('vgg11_cam', num_classes=3, mlp_ratio=0.5).num_classes == 3


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


@pytest.mark.parametrize('name', [name for name in NAMED if not name.values[0].endswith('_mc')])
def test_features_only_is_the_backbones(name):
    features, plain = (
        timm.create_model(each, features_only=True, device='meta', **small(name))
        for each in (name, name.rpartition('_')[0])
    )
    assert {key: value.shape for key, value in features.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert features.feature_info.channels() == plain.feature_info.channels()


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


def test_on_demand_variants_load_from_a_folder(tmp_path):
    source = ccl_timm.create_model('test_resnet_pedcc', num_classes=4).eval()
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    code = f"""
import ccl_timm, timm
for package in (timm, ccl_timm):
    m = package.create_model('local-dir:{tmp_path}', pretrained=True)
    print(m.pretrained_cfg['architecture'], m.num_classes)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.split() == ['test_resnet_pedcc', '4'] * 2, result.stderr
    with pytest.raises(ccl_timm.UserError, match='holds no model of timm'):
        ccl_timm.create_model(f'local-dir:{tmp_path / "nothing"}')


REGISTRY = """
import warnings, ccl_timm, timm
from torch import nn
before = set(timm.list_models())
assert timm.is_model('test_convnext_cam') and timm.get_pretrained_cfg('test_convnext_cam').classifier == 'head.fc.out'
assert timm.get_pretrained_cfg('test_vit_cam').classifier == 'head.out' and timm.is_model('test_vit_cam')
assert timm.models.model_entrypoint('test_vit2_cam').__name__ == 'test_vit2_cam'
assert timm.create_model('test_vit3_cam', num_classes=3).num_classes == 3
assert set(timm.list_models()) - before == {'test_convnext_cam', 'test_vit_cam', 'test_vit2_cam', 'test_vit3_cam'}

def test_mambaout_cam(pretrained=False, **kwargs):
    return nn.Identity()

warnings.simplefilter('error')
timm.models.register_model(test_mambaout_cam)  # somebody's own of this name is not in conflict with a variant
assert type(timm.create_model('test_mambaout_cam')) is nn.Identity
"""


def test_timms_registry_finds_variants_when_asked_for_them():
    result = subprocess.run([sys.executable, '-c', REGISTRY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    'name', ['nonsense', 'nonsense_cam', 'resnet18_nonsense', 'resnet18_cam_cam', 'crossvit_9_240_cam', '_cam', '']
)
def test_names_without_a_model_stay_unknown_to_timm(name):
    before = timm.list_models()
    assert not timm.is_model(name) and timm.get_pretrained_cfg(name) is None
    with pytest.raises(RuntimeError, match='Unknown model'):
        timm.create_model(name)
    assert timm.list_models() == before


@pytest.mark.parametrize(
    'name',
    [
        'resnet18_cam',
        'vgg16_cosine',
        pytest.param('densenet121_pedcc', marks=pytest.mark.slow),
        'vit_tiny_patch16_224_pedcc',
    ],
)
def test_exported_program_is_equal(name):
    options = {**small(name), **({'img_size': 32} if name.startswith('vit') else {})}
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    more = torch.randn(3, 3, 32, 32)
    assert torch.allclose(program.module()(more), model(more), atol=1e-5)


def test_torchvision_knows_our_models_when_asked():
    torchvision_models = pytest.importorskip('torchvision.models')
    assert ccl_timm.register_torchvision() == ccl_timm.register_torchvision() == list(MODELS)
    model = torchvision_models.get_model('resnet18_cam', num_classes=6)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 6)
    assert set(MODELS) <= set(torchvision_models.list_models())
    assert torchvision_models.get_model('test_convnext_cam', num_classes=6).num_classes == 6
    with pytest.raises(ValueError, match='Unknown model nonsense_cam'):
        torchvision_models.get_model('nonsense_cam')
    with pytest.raises(ccl_timm.UserError, match='has no weights of torchvision'):
        torchvision_models.get_model('resnet18_cam', weights='DEFAULT')


def test_cam_head_is_the_papers_formula():
    head = head_class('cam')(6, 3, hidden_features=4, reduction=2).double()
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


def test_mlp_head_is_the_papers_baseline():
    head = head_class('mlp')(6, 3, hidden_features=4).double()
    pooled = torch.randn(5, 6, dtype=torch.float64)
    outputs = head.outputs(pooled)
    (w1, b1, w2, b2) = head.parameters()
    features = torch.clamp(pooled @ w1.T + b1, min=0)
    assert torch.allclose(outputs.features, features)
    assert torch.allclose(outputs.logits, features @ w2.T + b2)
    assert torch.equal(head(pooled), outputs.logits) and outputs.attention is None
    assert head_class('mlp')(6, 3).out.in_features == 6


def test_linear_head_has_a_narrow_layer_where_it_is_asked_for(tmp_path):
    model = ccl_timm.create_model('test_resnet_linear', num_classes=10, feature_dim=2).eval()
    pooled = torch.randn(3, model.num_features)
    head = model.get_classifier()
    outputs = head.outputs(pooled)
    features = pooled @ head.hidden.weight.T + head.hidden.bias
    assert torch.allclose(outputs.features, features) and outputs.features.shape == (3, 2)
    assert torch.allclose(outputs.logits, features @ head.out.weight.T + head.out.bias)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4)
    assert torch.equal(other.get_classifier().hidden.weight, head.hidden.weight)
    plain = ccl_timm.create_model('test_resnet_linear', num_classes=10)
    assert set(plain.get_classifier().state_dict()) == {'out.weight', 'out.bias'}


@pytest.mark.parametrize(
    'name, options',
    [
        ('resnet18_mc', {}),
        ('vgg16_mc', {}),
        ('vgg16_mc', {'small_input': True}),
        ('test_resnet_mc', {'output_stride': 16}),  # an AvgPool2dSame, whose kernel size is a tuple
        ('resnet18_cam', {'small_input': True}),
        pytest.param('densenet121_cam', {'small_input': True}, marks=pytest.mark.slow),
        ('mobilenetv2_100_cam', {'small_input': True}),
    ],
)
def test_feature_info_is_what_the_model_computes(name, options):
    model = ccl_timm.create_model(name, num_classes=5, **options).eval()
    for classes in (5, 0, 3):
        model.reset_classifier(classes)
        _, maps = model.forward_intermediates(torch.randn(1, 3, 64, 64))
        said = [(info['num_chs'], info['reduction']) for info in model.feature_info]
        assert said == [(x.shape[1], 64 // x.shape[2]) for x in maps]


@pytest.mark.parametrize('name', ['resnet18_mc', 'vgg16_mc', 'test_resnet_mc'])
def test_default_cfg_of_mc_names_the_size_of_its_map(name):
    model = ccl_timm.create_model(name, num_classes=5).eval()
    size = model.default_cfg['input_size']
    assert model.forward_features(torch.randn(1, *size)).shape[2:] == model.default_cfg['pool_size']


@pytest.mark.parametrize('name, options', [('test_resnet_mc', {}), ('resnet18_cam', {'small_input': True})])
def test_features_of_the_whole_model_are_those_of_timms_getter(name, options):
    maps = timm.create_model(name, features_only=True, feature_cls='getter', **options)(torch.randn(1, 3, 64, 64))
    assert len(maps) == 5
    with pytest.raises(ccl_timm.UserError, match="feature_cls='hook' does not work with the feature maps of"):
        timm.create_model(name, features_only=True, feature_cls='hook', **options)


@pytest.mark.parametrize('backbone', ['test_byobnet', 'test_convnext', 'test_mambaout', 'test_resnet', 'test_vit'])
def test_layers_can_be_pruned_together_with_the_head(backbone):
    model = ccl_timm.create_model(f'{backbone}_cam', num_classes=5).eval()
    kept = model.prune_intermediate_layers(1, prune_head=True)
    assert model.num_classes == 0
    images = torch.randn(1, *model.default_cfg['input_size'])
    assert len(model.forward_intermediates(images, indices=kept, intermediates_only=True)) == 1


def export(folder, name, **options):
    torch.manual_seed(1)
    source = ccl_timm.create_model(name, num_classes=5, **options).eval()
    timm.models.save_for_hf(source, str(folder), safe_serialization=True)
    return source


@pytest.mark.parametrize('options', [{}, {'small_input': True}, {'in_chans': 1}], ids=str)
@pytest.mark.parametrize(
    'name',
    ['resnet18_cam', 'resnet18_cosine', 'resnet18_mc', pytest.param('vgg16_pedcc', marks=pytest.mark.slow)],
)
def test_features_of_a_trained_checkpoint_are_those_it_was_trained_to(name, options, tmp_path):
    source = export(tmp_path, name, **options)
    images = torch.randn(1, options.get('in_chans', 3), 64, 64)
    expected = source.forward_intermediates(images, intermediates_only=True)
    for create in (timm.create_model, ccl_timm.create_model):
        features = create(f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=(1, -1)).eval()
        for actual, wanted in zip(features(images), (expected[1], expected[-1]), strict=True):
            assert torch.allclose(actual, wanted, atol=1e-5)


@pytest.mark.parametrize('pool', [None, ''])
@pytest.mark.parametrize('head', list_heads())
def test_embeddings_of_a_trained_checkpoint(head, pool, tmp_path):
    source = export(tmp_path, f'resnet18_{head}')
    model = ccl_timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0, global_pool=pool).eval()
    source.reset_classifier(0, pool)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(model(images), source(images), atol=1e-6)


@pytest.mark.parametrize('new', ['cam', 'cosine', 'linear', 'mc', 'mlp', 'pedcc'])
@pytest.mark.parametrize('old', ['cam', 'cosine', 'linear', 'mc', 'mlp', 'pedcc'])
def test_a_trained_backbone_takes_another_head_with_a_warning(old, new, tmp_path, recwarn):
    source = export(tmp_path, f'test_resnet_{old}')
    overlay = {'file': str(tmp_path / 'model.safetensors'), 'num_classes': -1}
    model = ccl_timm.create_model(f'test_resnet_{new}', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    ours, theirs = model.state_dict(), source.state_dict()
    kept = [key for key in theirs if not key.startswith(('fc.', 'layer4.channels.'))]
    assert all(torch.equal(ours[key], theirs[key]) for key in kept)
    said = [str(warning.message) for warning in recwarn if 'starts anew' in str(warning.message)]
    assert len(said) == (0 if old == new else 1)


@pytest.mark.parametrize(
    ('name', 'macs', 'activations'),
    [('resnet18', 1.82, 2.48), ('mobilenetv2_100', 0.31, 6.68), ('vit_tiny_patch16_224', 1.26, 5.97)],
)
def test_cost_is_that_of_timms_tables(name, macs, activations):
    model = timm.create_model(name)
    found = cost(model, (3, 224, 224))
    assert model.training and found.parameters == sum(p.numel() for p in model.parameters())
    assert abs(found.macs / 1e9 / macs - 1) < 0.04 and abs(found.activations / 1e6 - activations) < 0.01


@pytest.mark.parametrize(
    ('name', 'stock'),
    [
        ('test_resnet_cam', 'test_resnet'),
        ('vgg11_cam', 'vgg11'),
        ('test_vit_cam', 'test_vit'),
        ('test_convnext_cam', 'test_convnext'),
    ],
)
def test_weights_of_another_network_are_refused(name, stock, tmp_path):
    weights, task, junk = (tmp_path / f'{kind}.pth' for kind in ('weights', 'task', 'junk'))
    backbone = timm.create_model(stock, num_classes=7)
    torch.save(backbone.state_dict(), weights)
    torch.save({f'trainable_module.model.{key}': value for key, value in backbone.state_dict().items()}, task)
    torch.save({'a': torch.ones(3)}, junk)

    def build(file):
        return ccl_timm.create_model(name, num_classes=5, pretrained=True, pretrained_cfg_overlay={'file': str(file)})

    state = build(weights).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backbone.named_parameters() if key in state)
    for file in (task, junk):
        with pytest.raises(UserError, match='The weights do not fit|cannot be built'):
            build(file)


@pytest.mark.parametrize(
    ('options', 'why'),
    [
        ({'hiden_features': 8}, "unexpected keyword argument 'hiden_features'"),
        ({'global_pool': 'foo'}, 'Invalid pool type'),
        ({'checkpoint_path': 'nope.pth'}, 'FileNotFoundError'),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options, why):
    with pytest.raises(UserError, match=f"Model 'test_resnet_cam' cannot be built: .*{why}"):
        ccl_timm.create_model('test_resnet_cam', num_classes=5, **options)
