"""Options out of range, guards at the edges, and what single losses do with classes that are not there."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccl_timm import losses
from ccl_timm.errors import UserError
from ccl_timm.losses import channel_correlation
from ccl_timm.testing import make_outputs, make_target

from ..references import REFERENCES
from .test_losses import build, ce_of_norm_times_cosine, simplex

OUT_OF_RANGE = {
    'focal': [{'alpha': [-1.0, 1.0]}, {'gamma': -1.0}],
    'asoftmax': [{'margin': 0}, {'margin': 2.5}, {'lambda_min': -1.0}],
    'mc': [{'num_channels': 4}, {'diversity_weight': -1.0}],
    'ical': [{'weight': -1.0}],
    'fical': [
        {'weight': -1.0},
        {'exponent': 0.0},
        {'eps': 0.0},
        {'confusion': 'x'},
        {'normalize': 'x'},
        {'momentum': 1.0},
    ],
    'cc': [{'weight': -1.0}, {'eps': 0.0}, {'smoothing': 1.0}],
    'center': [{'weight': -1.0}, {'alpha': 1.5}, {'reduction': 'x'}, {'smoothing': -0.1}],
    'amsoftmax': [{'scale': 0.0}],
    'arcface': [{'scale': 0.0}, {'margin': math.pi}, {'margin': -0.1}],
    'cm': [{'m1': 0.0}, {'m2': math.pi}],
    'cot': [{'mode': 'x'}, {'divisor': 'x'}, {'smoothing': 1.0}],
    'pedcc': [{'scale': 0.0}, {'root': 0.0}, {'weight': -1.0}, {'reduction': 'x'}],
    'nac': [{'alpha': -1.0}, {'delta': -1.0}, {'denominator': 'x'}, {'norm': 'x'}],
    'pod': [{'weight': -1.0}],
}


@pytest.mark.parametrize(('name', 'options'), [(name, o) for name in OUT_OF_RANGE for o in OUT_OF_RANGE[name]], ids=str)
def test_option_out_of_range_is_refused(name, options):
    with pytest.raises(UserError):
        build(name, **options)


def test_losses_refuse_another_number_of_class_weights():
    with pytest.raises(UserError, match='class_weight has 2 weights for 5 classes: give one for each'):
        build('cc', class_weight=[1.0, 2.0])(make_outputs('cc'), make_target())


def test_focal_refuses_another_number_of_class_weights():
    loss = build('focal', alpha=[1.0, 2.0])
    with pytest.raises(UserError, match='2 class weights for 5 classes'):
        loss(make_outputs('focal'), make_target())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_focal_of_a_certain_sample_is_finite(dtype):
    logits = torch.tensor([[1e3, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    build('focal', num_classes=3, dtype=dtype, gamma=0.5)(SimpleNamespace(logits=logits), torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


def test_pedcc_root_of_zero_distance_is_finite():
    features = 3 * torch.eye(3, dtype=torch.float64)
    features.requires_grad_()
    outputs = SimpleNamespace(features=features, centroids=torch.eye(3, dtype=torch.float64))
    build('pedcc', 3, 3, root=2.0)(outputs, torch.arange(3)).backward()
    assert features.grad.isfinite().all()


def test_cm_whose_margin_never_ends():
    options = {'m1': 0.9, 'm2': 0.1, 'm3': 0.0, 'scale': 8.0}
    own = torch.linspace(-0.9999, 0.9999, 101, dtype=torch.float64)
    cosine = torch.stack([own, own.flip(0) * 0.5, torch.full_like(own, -0.1)], 1).requires_grad_()
    outputs, target = SimpleNamespace(cosine=cosine), torch.zeros(101, dtype=torch.long)
    value = build('cm', num_classes=3, **options)(outputs, target)
    torch.testing.assert_close(value, REFERENCES['cm'](outputs, target, None, **options), rtol=1e-10, atol=1e-12)


def test_class_vectors_of_any_length():
    weight = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    longer = weight * torch.arange(1, 6).double()[:, None]
    torch.testing.assert_close(losses.mean_class_cosine(longer), losses.mean_class_cosine(weight), rtol=1e-12, atol=0)


def test_mc_diversity_of_uneven_classes():
    loss = build('mc', num_classes=3, num_channels=8, discriminality_weight=0.0)
    flat = SimpleNamespace(logits=torch.zeros(2, 3).double(), feature_map=torch.ones(2, 8, 3, 3, dtype=torch.float64))
    expected = math.log(3) + 20 * (1 - (1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert loss(flat, torch.arange(2)).item() == pytest.approx(expected, rel=1e-12)


def test_fical_without_confusion():
    features = 100 * simplex(5, 6)
    outputs = SimpleNamespace(features=features, weight=simplex(5, 6), cosine=simplex(5, 6) @ simplex(5, 6).T)
    value = build('fical', confusion='hard')(outputs, torch.arange(5))
    assert value.item() == pytest.approx(ce_of_norm_times_cosine(outputs, torch.arange(5)).item(), rel=1e-12)


def test_fical_absent_class_keeps_its_rates():
    loss = build('fical', momentum=0.75)
    loss(make_outputs('fical', seed=0), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))
    before = loss.rates.clone()
    loss(make_outputs('fical', seed=1), torch.tensor([1, 2, 1, 2, 1, 2, 1, 2]))
    assert torch.equal(loss.rates[[0, 3, 4]], before[[0, 3, 4]])
    assert before[[0, 3, 4]].abs().sum() > 0
    assert not torch.equal(loss.rates[1], before[1])


def test_cc_of_soft_targets_summing_to_more_than_one():
    """Rounding of the rows must not turn the ratio negative."""
    attention = torch.rand(16, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[1 + 1e-6, 1e-12]]).repeat(16, 1)
    assert channel_correlation(attention, target) >= 0


def test_cot_of_one_class():
    loss = build('cot', num_classes=1)
    loss.set_step(1)
    assert loss(make_outputs('cot', num_classes=1), torch.zeros(8, dtype=torch.long)) == 0


@pytest.mark.parametrize('seed', range(8))
def test_self_correlation_of_uncorrelated_errors_is_not_negative(seed):
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    centroids = F.pad(q, (0, 2))
    assert losses.self_correlation(torch.zeros(3, 5), centroids, torch.arange(3)) >= 0


@pytest.mark.parametrize('name', ['nac', 'pod'])
def test_delta_stays_after_an_epoch_without_samples(name):
    loss = build(name, delta=0.3)
    for epoch in range(3):
        loss.set_epoch(epoch)
        assert loss.delta.item() == pytest.approx(0.3)


def test_nac_epoch_0_resets_delta():
    loss = build('nac', delta=0.3)
    loss.delta.fill_(2.0)
    loss.set_epoch(0)
    assert loss.delta.item() == pytest.approx(0.3)


def test_asoftmax_cosine_beyond_one():
    """Rounding takes a cosine there; the margin is that of 1."""

    def value(c):
        cosine, features = torch.tensor([[c, 0.0]]).double(), torch.tensor([[0.6, 0.8]]).double()
        loss = build('asoftmax', 2, 2, lambda_base=0.0, lambda_min=0.0)
        return loss(SimpleNamespace(cosine=cosine, features=features), torch.tensor([0])).item()

    assert value(1 + 1e-6) == pytest.approx(value(1.0), rel=1e-9, abs=0)


# --- class weights ----------------------------------------------------------------------------------------------------

WEIGHED = {'cc': {'weight': 0.0}, 'center': {'weight': 0.0}, 'cot': {}}


@pytest.mark.parametrize('name', WEIGHED)
def test_a_batch_of_classes_without_weight_has_no_cross_entropy(name):
    loss = build(name, 3, dtype=torch.float32, smoothing=0.1, class_weight=[1.0, 0.0, 1.0], **WEIGHED[name])
    outputs = make_outputs(loss, 2, 3, dtype=torch.float32)
    value = loss(outputs, torch.tensor([1, 1]))
    value.backward()
    assert value == 0
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in outputs.leaves.values())
    outputs.logits = torch.full((2, 3), math.nan)
    assert loss(outputs, torch.tensor([1, 1])).isnan()


@pytest.mark.parametrize('weights', [[1.0, 2.0, 0.5, 0.1, 3.0], [1.0, 0.0, 1.0, 0.0, 0.0]])
def test_class_weights_mean_the_same_for_indices_and_one_hot_rows(weights):
    outputs, target = make_outputs(('logits',)), make_target()
    values, gradients = [], []
    for each in (target, F.one_hot(target, 5).double()):
        value = losses.cross_entropy(outputs.logits, each, class_weight=torch.tensor(weights))
        values.append(value)
        gradients.append(torch.autograd.grad(value, outputs.leaves['logits'])[0])
    expected = F.cross_entropy(outputs.logits, target, torch.tensor(weights).double())
    torch.testing.assert_close(values, [expected, expected], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-15)


def test_class_weights_of_mixed_targets_are_those_of_their_classes():
    """Equal to indices where every sample stands once for each class, with its share as its weight."""
    outputs, soft = make_outputs(('logits',)), make_target(soft=True)
    weights = torch.tensor([1.0, 2.0, 0.5, 0.1, 3.0]).double()
    shares = soft * weights
    expected = -(shares * outputs.logits.log_softmax(1)).sum() / shares.sum()
    torch.testing.assert_close(losses.cross_entropy(outputs.logits, soft, class_weight=weights), expected)


# --- overflow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [1e15, 1e20, 1e30])
@pytest.mark.parametrize('name', ['asoftmax', 'ical', 'fical'])
def test_features_whose_square_overflows_are_finite(name, size):
    drawn = make_outputs(name, dtype=torch.float32, change=lambda drawn: drawn['features'].mul_(size))
    cosine = F.normalize(drawn.features.detach().double(), dim=1).float() @ drawn.weight.detach().T
    features = drawn.features.detach().requires_grad_()
    outputs = SimpleNamespace(features=features, cosine=cosine, weight=drawn.weight)
    exact = SimpleNamespace(features=features.detach().double(), cosine=cosine.double(), weight=drawn.weight.double())
    value = build(name, dtype=torch.float32)(outputs, make_target())
    value.backward()
    assert value.item() == pytest.approx(build(name)(exact, make_target()).item(), rel=1e-4)
    assert features.grad.isfinite().all()


def test_complement_of_huge_logits_is_finite():
    logits = (torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 1e36).requires_grad_()
    value = losses.complement_entropy(logits, torch.arange(4))
    value.backward()
    assert value == 0 and logits.grad.isfinite().all()


BAD = {'huge': 1e25, 'inf': math.inf, 'nan': math.nan}


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize(
    ('name', 'options'),
    [('nac', {}), ('nac', {'norm': 'logits'}), ('pod', {}), ('center', {}), ('fical', {'momentum': 0.9})],
    ids=str,
)
def test_an_overflowing_batch_leaves_a_finite_state(name, options, bad):
    """Such batches come with float16: the optimizer skips them, and so must the state."""
    loss = build(name, dtype=torch.float32, **options)
    for factor in (1.0, BAD[bad], 1.0):
        outputs = make_outputs(loss, dtype=torch.float32)
        read = {key: getattr(outputs, key).detach().clone() for key in loss.requires}
        for key in read.keys() & {'features', 'logits'}:
            read[key] *= factor
        value = loss(SimpleNamespace(**{k: v.requires_grad_() for k, v in read.items()}), make_target())
        if math.isnan(factor):
            assert value.isnan()
        assert all(tensor.isfinite().all() for tensor in loss.state_dict().values())
    loss.set_epoch(1)
    assert all(tensor.isfinite().all() for tensor in loss.state_dict().values())


# --- margins by the number of classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'num_classes', 'scale'),
    [('arcface', 10, 16), ('arcface', 196, 24), ('cm', 1000, 32), ('amsoftmax', 20, 16), ('arcface', 10_000, None)],
)
def test_margin_losses_suggest_options_for_few_classes(name, num_classes, scale):
    options = losses.loss_class(name).options_for(num_classes)
    assert options.get('scale') == scale
    assert build(name, num_classes, **options).caution(num_classes) is None


def test_a_scale_for_thousands_of_classes_is_a_caution():
    assert build('arcface').caution(10) == (
        'scale=64 was tuned for more than 10,000 classes; for 10 classes try scale=16 margin=0.3.'
    )
    assert build('arcface').caution(20_000) is build('arcface', scale=30.0).caution(10) is build('cc').caution(10)


@pytest.mark.parametrize(
    ('name', 'words'), [('cc', 'batch of a single class'), ('cot', 'half the updates'), ('mc', 'the network')]
)
def test_known_deviations_are_among_the_declared_assumptions(name, words):
    assert words in losses.loss_class(name).assumptions


@pytest.mark.parametrize('index', [5, -1])
@pytest.mark.parametrize('loss', REFERENCES)
def test_an_index_that_is_no_class_is_named(loss, index):
    target = make_target()
    target[0] = index
    with pytest.raises(UserError, match=f'got the class index {index}, and there are 5 classes: number them from 0'):
        build(loss)(make_outputs(loss), target)


def test_a_criterion_may_ignore_an_index_and_must_give_a_mean():
    logits, target = torch.randn(4, 3), torch.tensor([0, -100, 2, 1])
    outputs = SimpleNamespace(logits=logits)
    expected = F.cross_entropy(logits, target)
    assert torch.equal(losses.LogitsLoss(nn.CrossEntropyLoss())(outputs, target), expected)
    with pytest.raises(UserError, match=r"term 'criterion' has the shape \(4,\): take its mean, a scalar"):
        losses.LogitsLoss(nn.CrossEntropyLoss(reduction='none'))(outputs, target)


def test_a_loss_made_for_other_classes_says_so():
    target = torch.tensor([0, 1])
    logits, features, weight = torch.randn(2, 4), torch.randn(2, 5), torch.randn(4, 5)
    outputs = SimpleNamespace(logits=logits, cosine=logits.tanh(), features=features, weight=weight)
    for made in (
        losses.create_loss('center', num_classes=3, num_features=5),
        losses.create_loss('fical', num_classes=3, momentum=0.9),
    ):
        with pytest.raises(UserError, match='3 .* 4.*: make the loss anew'):
            made(outputs, target)
    with pytest.raises(UserError, match='made for 6 channels, and the feature map has 8'):
        made = losses.create_loss('mc', num_classes=2, num_channels=6)
        made(SimpleNamespace(logits=torch.randn(2, 2), feature_map=torch.rand(2, 8, 4, 4)), target)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_formulas_take_indices_of_any_integer_type(dtype):
    x, target = F.normalize(torch.randn(4, 5)), torch.tensor([0, 1, 2, 1])
    for formula in (losses.focal_loss, lambda x, y: losses.additive_margin(x, y, 16.0, 0.2), channel_correlation):
        assert torch.equal(formula(x, target.to(dtype)), formula(x, target))
    with pytest.raises(UserError, match='focal_loss takes floating-point tensors'):
        losses.focal_loss(target[:, None], target)


def test_nested_class_weights_of_focal_are_those_of_a_list():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    outputs = SimpleNamespace(logits=logits)
    flat, nested = (losses.create_loss('focal', alpha=alpha)(outputs, target) for alpha in ([1, 2, 3], [[1, 2, 3]]))
    assert torch.equal(flat, nested)
