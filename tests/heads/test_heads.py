"""Every head: traced, compiled, in low precision; and the centroids of the head ``pedcc`` where they are exact."""

import math
from functools import partial

import pytest
import timm
import torch

import ccl_timm
from ccl_timm.heads import CosineHead, head_class, list_heads, output_names


def head_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return head_class(name)(16, 5, dtype=dtype).eval()


@pytest.mark.parametrize('name', list_heads())
def test_torch_fx_traces_every_head_and_ends_in_the_logits(name):
    head, pooled = head_of(name), torch.randn(3, head_of(name).out.in_features if name == 'mc' else 16)
    traced = torch.fx.symbolic_trace(head)
    assert torch.equal(traced(pooled), head(pooled))
    *_, last, output = traced.graph.nodes
    assert output.args == (last,)


@pytest.mark.parametrize('name', list_heads())
def test_torchvision_extracts_features_of_every_head(name):
    extraction = pytest.importorskip('torchvision.models.feature_extraction')
    model = timm.create_model(f'resnet18_{name}', num_classes=5, small_input=True).eval()
    last = extraction.get_graph_node_names(model)[1][-1]
    images = torch.randn(1, 3, 32, 32)
    outputs = extraction.create_feature_extractor(model, {'layer2': 'map', last: 'logits'})(images)
    assert outputs['map'].shape == (1, 128, 16, 16)
    assert torch.allclose(outputs['logits'], model(images), atol=1e-6)


def test_the_embedding_of_the_cosine_head_takes_off_what_features_have_in_common():
    torch.manual_seed(0)
    head, pooled = head_class('cosine')(16, 5, feature_dim=8), torch.randn(64, 16) + 10
    outputs = head.outputs(pooled)
    assert torch.allclose(outputs.features.mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(outputs.features.std(0, correction=0), torch.ones(8), atol=1e-3)
    expected = torch.cosine_similarity(outputs.features[:, None], head.weight, dim=-1)
    assert torch.allclose(outputs.cosine, expected, atol=1e-6)
    assert {name for name, _ in head.named_parameters()} == {'embedding.0.weight', 'weight'}
    torch.fx.symbolic_trace(head.eval())
    embedding = head.embedding
    head.reset(7)
    assert head.weight.shape == (7, 8) and head.embedding is embedding and head(pooled).shape == (64, 7)


def test_class_vectors_of_one_direction_are_warned_of():
    head = head_of('cosine')
    assert head.caution() is None
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, 16) + 0.2 * torch.randn(5, 16))
    cosines = torch.cosine_similarity(head.weight.detach()[:, None], head.weight.detach(), dim=-1)
    assert (mean := float((cosines.sum() - 5) / 20)) > 0.9
    assert f'point in nearly one direction, with a mean cosine of {mean:.2f} to each other' in head.caution()
    assert head_class('cosine')(16, 1).caution() is None


def test_attention_is_computed_in_float32_under_autocast():
    head, pooled = head_of('cam'), 0.01 * torch.randn(64, 16) + 1  # attention differs little between samples
    exact = head.outputs(pooled.bfloat16().float()).attention
    compiled = torch.compile(head.outputs, backend='eager', fullgraph=True)
    for outputs_of in (head.outputs, compiled):
        with torch.autocast('cpu', torch.bfloat16):
            outputs = outputs_of(pooled.bfloat16())
        assert outputs.attention.dtype == torch.float32 and outputs.logits.dtype == torch.bfloat16
        assert torch.allclose(outputs.attention, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_attention_of_models_in_other_precisions(dtype):
    outputs = head_of('cam', dtype).outputs(torch.randn(3, 16, dtype=dtype))
    assert outputs.attention.dtype == torch.promote_types(dtype, torch.float32)
    assert outputs.logits.dtype == outputs.features.dtype == dtype


@pytest.mark.parametrize('classes', [5, 200, 1000])
def test_centroids_in_the_plane_are_the_regular_polygon(classes):
    centroids = ccl_timm.pedcc_centroids(classes, 2, seed=1)
    angles = torch.atan2(*centroids.T).sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]])
    assert torch.allclose(gaps, torch.full_like(gaps, 2 * math.pi / classes), rtol=1e-9)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(classes, dtype=torch.float64))
    assert not torch.allclose(centroids, ccl_timm.pedcc_centroids(classes, 2, seed=2))


@pytest.mark.parametrize('classes, dim, neighbours', [(24, 4, 8), (240, 8, 56)])
def test_centroids_are_root_systems_where_these_are_known(classes, dim, neighbours):
    cosines = (rows := ccl_timm.pedcc_centroids(classes, dim)) @ rows.T
    assert ccl_timm.max_cosine(rows) == pytest.approx(0.5, abs=1e-12)
    assert ((cosines - 0.5).abs() < 1e-9).sum(1).eq(neighbours).all()


@pytest.mark.parametrize('classes, best', [(7, 0.2101), (8, 0.2612), (9, 1 / 3), (10, 0.4044), (12, 5**-0.5)])
def test_centroids_by_energy_are_near_the_best_known_in_three_dimensions(classes, best):
    assert best - 1e-4 < ccl_timm.max_cosine(ccl_timm.pedcc_centroids(classes, 3)) < best + 2e-3


@pytest.mark.parametrize('context', [torch.inference_mode, partial(torch.autocast, 'cpu', torch.bfloat16)])
def test_centroids_are_the_same_wherever_they_are_made(context):
    expected = ccl_timm.pedcc_centroids(9, 3)
    with context():
        assert torch.equal(ccl_timm.pedcc_centroids(9, 3), expected)


@pytest.mark.parametrize('name', ['cosine', 'pedcc'])
def test_timms_initialisation_of_buffers_keeps_what_was_loaded(name):
    model = ccl_timm.create_model(f'test_resnet_{name}', num_classes=5).eval()
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(head.weight.flip(0))
    logits = model(images := torch.randn(2, 3, 32, 32))
    timm.models._manipulate.reinit_non_persistent_buffers(model)
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize(
    'head, options',
    [
        ('cam', {'reduction': 0}), ('cam', {'hidden_features': -1}), ('cosine', {'scale': 0.0}),
        ('pedcc', {'scale': -5.0}), ('linear', {'feature_dim': -2}), ('mlp', {'hidden_features': -2}),
    ],
)  # fmt: skip
def test_options_are_above_0(head, options):
    (name, value), *_ = options.items()
    with pytest.raises(ccl_timm.UserError, match=f'{name}={value}: it must be above 0.'):
        head_class(head)(8, 3, **options)


def test_centroids_are_in_the_models_precision_but_no_less_than_float32():
    for dtypes in ((torch.float64, torch.float32), (torch.float16,), (torch.bfloat16, torch.float32)):
        model = head_class('pedcc')(8, 3)
        for dtype in dtypes:
            model = model.to(dtype)
        assert model.weight.dtype == torch.float32


def test_outputs_of_a_head_with_batch_norm_are_listed():
    assert 'cosine' in output_names(CosineHead(8, 3, feature_dim=4))
