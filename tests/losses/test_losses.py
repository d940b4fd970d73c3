"""Every loss: the shared checks, the options against references written as loops, limit cases, closed values, state.

The first tests run over all names in the registry: a loss registered tomorrow is tested without an edit here.
"""

import copy
import math
import os
import random
import re
import traceback
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccl_timm import losses
from ccl_timm.errors import UserError
from ccl_timm.losses import channel_correlation, list_losses, loss_class
from ccl_timm.testing import LOSS_CHECKS, LossCase, check_loss, make_outputs, make_target
from tests import references
from tests.references import REFERENCES

# 'soft' confusion is held constant on purpose, so that the gradient is not the value's derivative; the reference
# does the same, and 'hard' confusion (in OPTIONS below) passes this check too
NOT_FOR = {'fical': {'gradient_is_the_derivative'}}
VALUE_CHECKS = [check for check in LOSS_CHECKS if check.__name__ in ('equals_reference', 'gradient_is_the_derivative')]
ALL = list_losses()


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower on several threads."""
    torch.set_num_threads(1)


# --- every loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('check', LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('name', ALL)
def test_check(name, check):
    if check.__name__ not in NOT_FOR.get(name, ()):
        check_loss(name, REFERENCES.get(name), checks=[check])


@pytest.mark.slow
@pytest.mark.parametrize('name', ALL)
def test_compiled_by_inductor(name):
    checks = [check for check in LOSS_CHECKS if check.__name__ == 'compiled_is_equal']
    check_loss(name, backend='inductor', checks=checks)


OPTIONS = [
    ('focal', {'gamma': 0.5}),
    ('focal', {'gamma': 3.0, 'alpha': 0.25}),
    ('asoftmax', {'margin': 1}),
    ('asoftmax', {'margin': 2, 'lambda_base': 10.0, 'lambda_gamma': 0.5, 'lambda_power': 2.0, 'lambda_min': 1.0}),
    ('asoftmax', {'margin': 3, 'lambda_base': 2.0, 'lambda_min': 0.0}),
    ('asoftmax', {'margin': 4, 'lambda_base': 2.0, 'lambda_min': 0.0}),
    ('mc', {'discriminality_weight': 0.7, 'diversity_weight': 3.0}),
    ('ical', {'weight': 10.0}),
    ('fical', {'confusion': 'hard'}),
    ('fical', {'weight': 2.0, 'exponent': 2.0, 'normalize': 'classes'}),
    ('cc', {'weight': 2.0, 'eps': 0.1, 'smoothing': 0.1}),
    ('center', {'weight': 0.1, 'alpha': 0.2, 'smoothing': 0.1}),
    ('center', {'weight': 0.1, 'reduction': 'sum'}),
    ('amsoftmax', {'scale': 7.5, 'margin': 0.5}),
    ('arcface', {'scale': 16.0, 'margin': 0.3, 'threshold': False}),
    ('cm', {'m1': 0.9, 'm2': 0.4, 'm3': 0.15}),
    ('cm', {'scale': 16.0, 'm1': 1.1, 'm2': 0.0, 'm3': 0.35}),
    ('cot', {'mode': 'sum', 'smoothing': 0.1}),
    ('cot', {'mode': 'sum', 'divisor': 'code'}),
    ('pedcc', {'scale': 15.0, 'margin': 0.5, 'weight': 0.3}),
    ('pedcc', {'root': 2.0}),
    ('pedcc', {'reduction': 'sum'}),
    ('nac', {'delta': 2.0}),
    ('nac', {'delta': 2.0, 'denominator': 'sum'}),
    ('pod', {'weight': 3.0, 'delta': 2.0}),
]


@pytest.mark.parametrize(('name', 'options'), OPTIONS, ids=lambda value: str(value).replace(' ', ''))
def test_options_against_the_reference(name, options):
    checks = [c for c in VALUE_CHECKS if c.__name__ not in NOT_FOR.get(name, ()) or options.get('confusion') == 'hard']
    check_loss(name, partial(REFERENCES[name], **options), checks=checks, **options)


@pytest.mark.parametrize('step', [1, 7, 1657, 1658, 5000])
@pytest.mark.parametrize(('name', 'options'), [('asoftmax', {}), ('cot', {}), ('cot', {'divisor': 'code'})])
def test_steps_against_the_reference(name, options, step):
    reference = partial(REFERENCES[name], step=step, **options)
    check_loss(name, reference, prepare=lambda loss: loss.set_step(step), checks=VALUE_CHECKS[:1], **options)


WITH_STATE = [
    ('center', {'weight': 1.0, 'alpha': 0.9}),
    ('fical', {'momentum': 0.9}),
    ('nac', {'norm': 'logits', 'denominator': 'sum'}),
]


@pytest.mark.parametrize('check', LOSS_CHECKS[7:13], ids=lambda check: check.__name__)
@pytest.mark.parametrize(('name', 'options'), WITH_STATE, ids=lambda value: str(value).replace(' ', ''))
def test_check_of_options_with_state(name, options, check):
    check_loss(name, checks=[check], **options)


@pytest.mark.parametrize('name', ALL)
def test_docstring_names_the_terms(name):
    outputs, target = make_outputs(name), make_target()
    terms = build(name).loss_dict(outputs, target)
    text = loss_class(name).__doc__
    stated = text.partition('Terms:')[2].partition('\n')[0]
    assert re.findall('``(.*?)``', stated.partition(';')[0]) == list(terms)
    assert 'Shapes:' in text
    assert loss_class(name).paper


@pytest.mark.parametrize('shape', [(7,), (1,), (8, 1), (1, 5), (8, 6)], ids=str)
@pytest.mark.parametrize('name', ALL)
def test_a_target_that_would_be_broadcast_is_refused(name, shape):
    target = torch.zeros(shape, dtype=torch.int64 if len(shape) == 1 else torch.float64)
    with pytest.raises(UserError, match=rf'of shape {re.escape(str(shape))} (for .* agree|but takes class indices)'):
        build(name)(make_outputs(name), target)


# --- helpers ---------------------------------------------------------------------------------------------------------


def build(name, num_classes=5, num_features=6, dtype=torch.float64, **options):
    """A loss in float64 and training mode."""
    return LossCase(name, options).build(dtype, num_classes, num_features)


def gradients(value, outputs):
    found = torch.autograd.grad(value, list(outputs.leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(outputs.leaves.items(), found, strict=True)
    }


def assert_same(first, second, reads, batch=8, target=None, tolerance=1e-10, **sizes):
    """Two functions of (outputs, target) agree in value and gradient."""
    outputs = make_outputs(tuple(reads), batch, **sizes)
    target = make_target(batch, sizes.get('num_classes', 5)) if target is None else target
    values, slopes = [], []
    for function in (first, second):
        torch.manual_seed(0)
        values.append(function(outputs, target))
        slopes.append(gradients(values[-1], outputs))
    torch.testing.assert_close(values[0], values[1], rtol=tolerance, atol=tolerance)
    for name in slopes[0]:
        torch.testing.assert_close(slopes[0][name], slopes[1][name], rtol=tolerance, atol=tolerance)


def ce_of(scale):
    return lambda outputs, target: F.cross_entropy(scale * outputs.cosine, target)


def ce(outputs, target):
    return F.cross_entropy(outputs.logits, target)


def ce_of_norm_times_cosine(outputs, target):
    return F.cross_entropy(outputs.features.norm(dim=1, keepdim=True) * outputs.cosine, target)


def with_cosine(rows, **others):
    return SimpleNamespace(cosine=torch.tensor(rows, dtype=torch.float64), **others)


def simplex(num_classes, dim):
    """Unit rows with pairwise cosine -1 / (K - 1)."""
    centred = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    return F.normalize(F.pad(centred, (0, dim - num_classes)), dim=1)


# --- limit cases -----------------------------------------------------------------------------------------------------

LIMITS = [
    ('focal', {'gamma': 0.0}, ce),
    ('focal', {'gamma': 0.0, 'alpha': 0.25}, lambda o, t: 0.25 * ce(o, t)),
    ('cc', {'weight': 0.0}, ce),
    ('center', {'weight': 0.0}, ce),
    ('mc', {'discriminality_weight': 0.0, 'diversity_weight': 0.0}, ce),
    ('ical', {'weight': 0.0}, ce_of_norm_times_cosine),
    ('fical', {'weight': 0.0}, ce_of_norm_times_cosine),
    ('asoftmax', {'margin': 1}, ce_of_norm_times_cosine),
    ('asoftmax', {'lambda_base': 1e14, 'lambda_gamma': 0.0}, ce_of_norm_times_cosine),
    ('amsoftmax', {'margin': 0.0}, ce_of(30)),
    ('arcface', {'margin': 0.0}, ce_of(64)),
    ('cm', {'m1': 1.0, 'm2': 0.0, 'm3': 0.0}, ce_of(64)),
    ('cot', {}, ce),
]


@pytest.mark.parametrize(
    ('name', 'options', 'expected'), LIMITS, ids=[f'{name}-{options}'[:60] for name, options, _ in LIMITS]
)
def test_limit_is_a_torch_op(name, options, expected):
    # arccos and back costs some digits
    assert_same(build(name, **options), expected, loss_class(name).requires, tolerance=1e-9)


PAIRS = [
    ('cm', {'m1': 1.0, 'm2': 0.0, 'm3': 0.4}, 'amsoftmax', {'scale': 64.0, 'margin': 0.4}),
    ('cm', {'m1': 1.0, 'm2': 0.4, 'm3': 0.0}, 'arcface', {'scale': 64.0, 'margin': 0.4}),
    ('nac', {'delta': 0.0}, 'cosine', {}),
    ('nac', {'delta': 0.0, 'denominator': 'sum'}, 'cosine', {}),
    ('pod', {'weight': 0.0}, 'nac', {}),
    ('pod', {'weight': 0.0, 'delta': 0.0}, 'cosine', {}),
]


@pytest.mark.parametrize(('name', 'options', 'other', 'others'), PAIRS, ids=lambda value: str(value).replace(' ', ''))
def test_limit_is_another_loss(name, options, other, others):
    reads = {*loss_class(name).requires, *loss_class(other).requires}
    assert_same(build(name, **options), build(other, **others), reads, tolerance=1e-9)


def test_pedcc_without_distance_is_amsoftmax():
    loss, am = build('pedcc', weight=0.0), build('amsoftmax', scale=7.5, margin=0.35)
    assert_same(loss, am, {*loss.requires, 'cosine', 'centroids'})


def test_cot_leaves_the_target_logit_alone():
    outputs, target = make_outputs('cot'), make_target()
    loss = build('cot')
    loss.set_step(1)
    slope = gradients(loss(outputs, target), outputs)['logits']
    assert (slope[torch.arange(8), target] == 0).all()
    assert (slope.abs().sum(1) > 0).all()


def test_cot_of_two_classes_has_no_complement():
    loss = build('cot', num_classes=2)
    loss.set_step(1)
    outputs = make_outputs('cot', num_classes=2)
    value = loss(outputs, make_target(8, 2))
    assert value == 0
    assert (gradients(value, outputs)['logits'] == 0).all()


def test_cot_alternates():
    outputs, target = make_outputs('cot'), make_target()
    loss = build('cot')
    values = []
    for step in range(4):
        loss.set_step(step)
        values.append(loss(outputs, target).item())
    assert values[0] == values[2] == pytest.approx(ce(outputs, target).item(), rel=1e-12)
    assert values[1] == values[3] < 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_cot_of_a_sure_sample_is_not_lost(dtype):
    """Where p_y is 1 to the last digit the complement still has its entropy, and a gradient."""
    logits = torch.tensor([[40.0, 0.3, -0.2, 0.9]], dtype=dtype, requires_grad=True)
    loss = build('cot', num_classes=4, dtype=dtype)
    loss.set_step(1)
    value = loss(SimpleNamespace(logits=logits), torch.tensor([0]))
    q = logits.detach()[0, 1:].double().softmax(0)
    assert value.item() == pytest.approx((q * q.log()).sum().item() / 3, rel=1e-6)
    value.backward()
    assert logits.grad[0, 1:].abs().max() > 1e-3


# --- closed values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.0])
def test_focal_of_equal_logits(gamma):
    value = build('focal', gamma=gamma)(SimpleNamespace(logits=torch.zeros(3, 4).double()), torch.arange(3))
    assert value.item() == pytest.approx(0.75**gamma * math.log(4), rel=1e-12)


def test_focal_differentiates_its_factor():
    logits = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    build('focal', num_classes=3)(SimpleNamespace(logits=logits), torch.tensor([0])).backward()
    assert logits.grad[0, 0].item() == pytest.approx(-0.190, abs=5e-4)  # -0.076 with the factor held constant


def test_focal_takes_a_factor_for_each_class():
    alpha = [0.125, 0.5, 1.0, 2.0, 3.0]
    loss = build('focal', alpha=alpha)
    expected = partial(references.focal, loss=None, alpha=alpha)
    assert_same(loss, lambda o, t: expected(o, t), ('logits',), target=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))


MARGINS = [
    ('amsoftmax', {'scale': 8.0}, lambda: math.log1p(4 * math.exp(-8 * 0.65))),
    ('arcface', {'scale': 8.0}, lambda: math.log1p(4 * math.exp(-8 * math.cos(0.5)))),
    ('cm', {'scale': 8.0}, lambda: math.log1p(4 * math.exp(-8 * (math.cos(0.3) - 0.2)))),
]


@pytest.mark.parametrize(('name', 'options', 'expected'), MARGINS, ids=lambda value: str(value)[:9])
def test_margin_of_a_perfect_sample(name, options, expected):
    """The own cosine is 1, the others 0."""
    value = build(name, **options)(with_cosine(torch.eye(5).tolist()), torch.arange(5))
    assert value.item() == pytest.approx(expected(), rel=5e-3, abs=0)  # arcface stays a little below 1


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('arcface', {}),
        ('arcface', {'threshold': False}),
        ('arcface', {'margin': 0.2, 'scale': 8.0}),
        ('cm', {}),
        ('cm', {'m1': 1.0, 'm2': 0.5, 'm3': 0.1, 'scale': 8.0}),
        ('amsoftmax', {}),
    ],
)
def test_margins_over_all_angles(name, options):
    own = torch.linspace(-0.9999, 0.9999, 101, dtype=torch.float64)
    cosine = torch.stack([own, own.flip(0) * 0.5, torch.full_like(own, -0.1)], 1).requires_grad_()
    outputs, target = SimpleNamespace(cosine=cosine), torch.zeros(101, dtype=torch.long)
    value = build(name, num_classes=3, **options)(outputs, target)
    expected = REFERENCES[name](outputs, target, None, **options)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad(v, cosine)[0] for v in (value, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    'margins', [(1.0, 0.3, 0.2), (0.9, 0.4, 0.15), (1.2, 0.4, 0.0), (1.1, 0.0, 0.35), (4.0, 0.3, 0.0)], ids=str
)
def test_cm_is_monotone(margins):
    """Also beyond the angle where cos(m1 theta + m2) would turn round: a better cosine never costs more."""
    loss = build('cm', num_classes=2, scale=1.0, m1=margins[0], m2=margins[1], m3=margins[2])
    target = torch.zeros(1, dtype=torch.long)
    values = [loss(with_cosine([[math.cos(t), 0.0]]), target).item() for t in torch.linspace(0.001, 3.14, 500).tolist()]
    assert all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(('angle', 'expected'), [(0.0, 1.0), (math.pi / 4, -1.0), (math.pi / 2, -3.0), (math.pi, -7.0)])
def test_asoftmax_psi(angle, expected):
    """psi of four times the angle: 1, then two lower on each quarter."""
    loss = build('asoftmax', num_classes=2, num_features=2, lambda_base=0.0, lambda_min=0.0)
    outputs = with_cosine([[math.cos(angle), 0.0]], features=torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    value = loss(outputs, torch.tensor([0]))
    assert value.item() == pytest.approx(math.log1p(math.exp(-expected)), rel=1e-9)


def test_asoftmax_lambda():
    """892.857 at the first iteration, 5.001 at the 1658th, 5 from the 1659th on."""
    assert references.annealing(1) == pytest.approx(892.857, abs=1e-3)
    assert references.annealing(1658) > 5 == references.annealing(1659) == references.annealing(10**6)
    outputs, target = make_outputs('asoftmax'), make_target()
    loss = build('asoftmax')
    for step, lowest in ((0, 1000 / 1.12), (1657, references.annealing(1658)), (1658, 5.0), (10**6, 5.0)):
        loss.set_step(step)
        constant = build('asoftmax', lambda_base=lowest, lambda_gamma=0.0, lambda_min=0.0)
        assert loss(outputs, target).item() == pytest.approx(constant(outputs, target).item(), rel=1e-9)


def test_asoftmax_advances_with_the_step_only():
    outputs, target = make_outputs('asoftmax'), make_target()
    loss = build('asoftmax')
    first = loss(outputs, target).item()
    assert loss(outputs, target).item() == first
    loss.set_step(100)
    assert loss(outputs, target).item() != first


def test_ical_of_a_simplex_and_of_equal_vectors():
    features = torch.randn(4, 6, dtype=torch.float64)
    for weight, expected in ((simplex(5, 6), 0.0), (simplex(5, 6)[:1].expand(5, 6), 5.0)):
        outputs = SimpleNamespace(features=features, weight=weight, cosine=F.normalize(features, dim=1) @ weight.T)
        value = build('ical')(outputs, torch.arange(4)) - ce_of_norm_times_cosine(outputs, torch.arange(4))
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_fical_of_a_simplex():
    """All cosines are -1/4, so their weighted mean is."""
    features = torch.randn(4, 6, dtype=torch.float64)
    outputs = SimpleNamespace(features=features, weight=simplex(5, 6))
    outputs.cosine = F.normalize(features, dim=1) @ outputs.weight.T
    value = build('fical')(outputs, torch.arange(4)) - ce_of_norm_times_cosine(outputs, torch.arange(4))
    assert value.item() == pytest.approx(-5 / 4, rel=1e-6)


def test_fical_momentum():
    """A class in the batch keeps a share of its former rates, an absent one all of them."""
    loss, rates, kept = build('fical', momentum=0.75), [[0.0] * 5 for _ in range(5)], 0.75
    plain = build('fical', weight=0.0)
    for seed in range(3):
        outputs, target = make_outputs('fical', seed=seed), make_target(seed=seed)
        logits = (outputs.features.norm(dim=1, keepdim=True) * outputs.cosine).tolist()
        now = references.confusion_rates(logits, references.weights(target, 5), 'soft')
        for i in set(target.tolist()):
            rates[i] = [kept * a + (1 - kept) * b for a, b in zip(rates[i], now[i], strict=True)]
        shares = torch.tensor(rates, dtype=torch.float64)
        shares = ((shares + shares.T) / 2).fill_diagonal_(0.0)
        expected = 5 * (shares * (outputs.weight @ outputs.weight.T)).sum() / shares.sum()
        value = loss(outputs, target) - plain(outputs, target)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_fical_holds_confusion_constant():
    """The second term moves class vectors, not samples."""
    outputs, target = make_outputs('fical'), make_target()
    fixed = SimpleNamespace(
        cosine=outputs.cosine.detach(), features=outputs.features.detach().requires_grad_(), weight=outputs.weight
    )
    term = build('fical')(fixed, target) - build('fical', weight=0.0)(fixed, target)
    slope = torch.autograd.grad(term, fixed.features)[0]
    assert slope.abs().max() < 1e-12


def test_center_of_features_at_their_centres():
    loss = build('center', weight=2.0)
    loss.centers.copy_(torch.randn(5, 6, dtype=torch.float64))
    target, logits = make_target(), make_outputs(('logits',)).logits
    there = SimpleNamespace(features=loss.centers[target].clone(), logits=logits)
    assert copy.deepcopy(loss)(there, target).item() == pytest.approx(ce(there, target).item(), rel=1e-12)
    away = SimpleNamespace(features=there.features + 1, logits=logits)
    assert loss(away, target).item() == pytest.approx(ce(away, target).item() + 6.0, rel=1e-12)


def test_cosine_losses_of_exact_angles():
    centroids = torch.eye(3, dtype=torch.float64)
    features = 5 * torch.tensor([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, -1]], dtype=torch.float64)
    outputs = SimpleNamespace(features=features, centroids=centroids, cosine=F.normalize(features, dim=1) @ centroids.T)
    target = torch.zeros(4, dtype=torch.long)
    sizes = {'num_classes': 3, 'num_features': 3}
    assert build('cosine', **sizes)(outputs, target).item() == pytest.approx((0 + 1 + 4 + 1) / 4, rel=1e-12)
    for denominator, best in (('root', math.sqrt(0.5)), ('sum', 0.5)):
        value = build('nac', delta=5.0, denominator=denominator, **sizes)(outputs, target)
        expected = ((1 - best) ** 2 + 1 + (1 + best) ** 2 + 1) / 4
        assert value.item() == pytest.approx(expected, rel=1e-12)
    distance = build('pedcc', **sizes)(outputs, target) - build('pedcc', weight=0.0, **sizes)(outputs, target)
    assert distance.item() == pytest.approx((0 + 2 + 4 + 2) / 4, rel=1e-9)


def test_cot_of_equal_logits():
    outputs, target = SimpleNamespace(logits=torch.zeros(4, 5).double()), torch.arange(4)
    for divisor, by in (('paper', 4), ('code', 5)):
        loss = build('cot', divisor=divisor)
        loss.set_step(1)
        assert loss(outputs, target).item() == pytest.approx(-math.log(4) / by, rel=1e-12)


def test_cc_of_four_points_on_a_line():
    """Class 0 at 0 and 1, class 1 at 3 and 5: intra 1 + 4, inter 9 + 25 + 4 + 16."""
    attention = torch.tensor([[0.0], [1.0], [3.0], [5.0]], dtype=torch.float64)
    value = channel_correlation(attention, torch.tensor([0, 0, 1, 1]))
    assert value.item() == pytest.approx(5 / 54, rel=1e-9)


FUNCTIONS = {
    'amsoftmax': lambda o, t: losses.additive_margin(o.cosine, t, 30.0, 0.35),
    'arcface': lambda o, t: losses.combined_margin(o.cosine, t, 64.0, 1.0, 0.5, 0.0),
    'asoftmax': lambda o, t: losses.angular_margin(o.features, o.cosine, t, 4, 1000 / 1.12),
    'cc': lambda o, t: ce(o, t) + losses.channel_correlation(o.attention, t),
    'cm': lambda o, t: losses.combined_margin(o.cosine, t, 64.0, 1.0, 0.3, 0.2),
    'cosine': lambda o, t: losses.cosine_loss(o.features, o.centroids, t),
    'focal': lambda o, t: losses.focal_loss(o.logits, t),
    'nac': lambda o, t: losses.norm_adaptive_cosine(o.features, o.centroids, t, 0.05),
    'pod': lambda o, t: FUNCTIONS['nac'](o, t) + losses.self_correlation(o.features, o.centroids, t),
}


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_function_is_module(name, dtype):
    """The public functions compute what the modules do, also of half precision, in float32."""
    outputs, target = make_outputs(name), make_target()
    read = {key: getattr(outputs, key).detach().to(dtype) for key in loss_class(name).requires}
    loss = build(name, dtype=torch.promote_types(dtype, torch.float32))
    value = FUNCTIONS[name](SimpleNamespace(**read), target)
    expected = loss(SimpleNamespace(**read), target)
    if name == 'cc' and dtype == torch.bfloat16:
        return  # its cross-entropy is torch's here, in half precision
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


# --- MC-Loss ---------------------------------------------------------------------------------------------------------


def mc_outputs(num_classes, num_channels, batch=3, seed=0):
    return make_outputs(('logits', 'feature_map'), batch, num_classes, num_channels=num_channels, seed=seed)


@pytest.mark.parametrize('per_class', [1, 2, 4])
def test_mc_is_one_of_its_masks(per_class):
    loss = build('mc', num_classes=3, num_channels=3 * per_class)
    target = make_target(3, 3)
    for seed in range(4):
        outputs = mc_outputs(3, 3 * per_class, seed=seed)
        torch.manual_seed(seed)
        value = loss(outputs, target)
        torch.manual_seed(seed)
        expected = references.mc(outputs, target, loss)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        slopes = [gradients(v, outputs)['feature_map'] for v in (value, expected)]
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-11)


def test_mc_draws_every_mask():
    """Two classes of two channels: four masks, each about as often."""
    loss, outputs, target = build('mc', num_classes=2, num_channels=4), mc_outputs(2, 4), make_target(3, 2)
    torch.manual_seed(0)
    values = [round(loss(outputs, target).item(), 9) for _ in range(200)]
    counts = [values.count(value) for value in set(values)]
    assert len(counts) == 4
    assert min(counts) > 25


def test_mc_masks_signed_maps_out():
    """A masked channel never wins, even where all others are negative."""
    loss = build('mc', num_classes=2, num_channels=4, diversity_weight=0.0)
    outputs, target = mc_outputs(2, 4), make_target(3, 2)
    outputs.feature_map = -outputs.feature_map
    torch.manual_seed(3)
    value = loss(outputs, target)
    torch.manual_seed(3)
    torch.testing.assert_close(value, references.mc(outputs, target, loss, diversity_weight=0.0), rtol=1e-10, atol=0)


def test_mc_of_flat_and_of_disjoint_maps():
    """Diversity is 1 where the channels of a class agree, and its number of channels where they do not overlap."""
    logits = torch.zeros(2, 2, dtype=torch.float64)
    loss = build('mc', num_classes=2, num_channels=6, discriminality_weight=0.0)
    flat = SimpleNamespace(logits=logits, feature_map=torch.ones(2, 6, 3, 3, dtype=torch.float64))
    assert loss(flat, torch.arange(2)).item() == pytest.approx(math.log(2) + 20 * (1 - 1 / 3), rel=1e-12)
    peaks = torch.zeros(2, 6, 9, dtype=torch.float64)
    peaks[:, torch.arange(6), torch.arange(6)] = 1e3
    apart = SimpleNamespace(logits=logits, feature_map=peaks.view(2, 6, 3, 3))
    assert loss(apart, torch.arange(2)).item() == pytest.approx(math.log(2), rel=1e-12)


def test_mc_splits_channels_unevenly():
    """Eight channels for three classes: every channel belongs to one, as its gradient over many masks shows."""
    loss = build('mc', num_classes=3, num_channels=8)
    outputs, target = mc_outputs(3, 8), make_target(3, 3)
    total = sum(gradients(loss(outputs, target), outputs)['feature_map'].abs() for _ in range(30))
    assert (total.sum((0, 2, 3)) > 0).all()
    assert loss(outputs, target).isfinite()


def test_mc_refuses_maps_of_one_pixel():
    outputs = SimpleNamespace(logits=torch.randn(2, 3), feature_map=torch.rand(2, 9, 1, 1))
    with pytest.raises(UserError, match='1'):
        build('mc', num_classes=3, num_channels=9, dtype=torch.float32)(outputs, torch.arange(2))


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, {'alpha': 0.1, 'weight': 0.3}])
def test_center_moves_as_in_the_paper(options):
    loss = build('center', **options)
    for seed in range(3):
        outputs, target = make_outputs('center', seed=seed), make_target(seed=seed)
        before = loss.centers.clone()
        loss(outputs, target)
        moved = references.moved_centers(before, outputs.features.detach(), target, options.get('alpha', 0.5))
        torch.testing.assert_close(loss.centers, moved, rtol=1e-12, atol=1e-14)
    assert torch.equal(loss.centers[4], before[4]), 'the absent class has moved'


@pytest.mark.parametrize('name', ['nac', 'pod'])
@pytest.mark.parametrize('norm', ['features', 'logits'])
def test_delta_follows_the_norms(name, norm):
    """delta is 0.05 in epoch 0, then alpha * epoch * the mean norm over the samples of the epoch before."""
    loss = build(name, alpha=0.1, norm=norm)
    delta, seed = 0.05, 0
    for epoch in range(4):
        loss.set_epoch(epoch)
        norms = []
        for batch in (8, 3):
            seed += 1
            outputs, target = make_outputs(loss, batch, seed=seed), make_target(batch, seed=seed)
            expected = REFERENCES[name](outputs, target, None, delta=delta)
            assert loss(outputs, target).item() == pytest.approx(expected.item(), rel=1e-7), f'epoch {epoch}'
            vectors = outputs.features if norm == 'features' else outputs.features @ outputs.centroids.T
            norms += vectors.detach().norm(dim=1).tolist()
        delta = 0.1 * (epoch + 1) * sum(norms) / len(norms)


def test_delta_does_not_move_without_epochs():
    loss, target = build('nac'), make_target()
    values = [loss(make_outputs(loss), target).item() for _ in range(3)]
    assert len(set(values)) == 1


# --- SC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('batch', 'dim'), [(2, 2), (3, 7), (7, 3), (6, 6), (16, 5), (5, 16)])
def test_self_correlation_both_ways(batch, dim):
    """Against the D x D loop: the package takes the smaller Gram matrix, N x N where N < D."""
    found, wanted = losses.self_correlation, references.self_correlation
    assert_same(
        lambda o, t: found(o.features, o.centroids, t),
        lambda o, t: wanted(o.features, o.centroids, t),
        ('features', 'centroids'),
        batch,
        num_classes=4,
        num_features=dim,
    )


# --- CC-Loss ---------------------------------------------------------------------------------------------------------


def n_by_n(attention, target, eps=1e-8):
    """The paper's matrix form, from differences."""
    same = target[:, None] == target
    upper = torch.triu(torch.ones_like(same), 1)
    distance = (attention[:, None] - attention).square().sum(-1)
    inter = (distance * (upper & ~same)).sum()
    return (distance * (upper & same)).sum() / (inter + eps) if inter > 0 else 0 * inter


CC_TARGETS = {
    'random': torch.tensor([0, 3, 1, 0, 3, 3, 1, 2, 0, 2]),
    'one class': torch.full((10,), 3),
    'all different': torch.arange(10),
    'one sample': torch.tensor([2]),
}


@pytest.mark.parametrize('target', CC_TARGETS.values(), ids=CC_TARGETS)
def test_cc_is_the_matrix_form(target):
    attention = torch.rand(len(target), 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes, values = [], []
    for function in (channel_correlation, n_by_n):
        leaf = attention.clone().requires_grad_()
        values.append(function(leaf, target))
        slopes.append(torch.autograd.grad(values[-1], leaf)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-14)
    if len(target.unique()) in (1, len(target)):
        assert values[0] == 0
        assert (slopes[0] == 0).all()


@pytest.mark.parametrize('soft', [False, True])
def test_cc_of_an_untrained_gate_in_float32(soft):
    """Attention 0.5 +- 1e-3: differences in the fourth digit keep five of their own."""
    generator = torch.Generator().manual_seed(0)
    attention = (0.5 + 1e-3 * torch.randn(64, 128, generator=generator)).float()
    target = make_target(64, 10, soft=soft)
    found, wanted = (
        torch.autograd.grad(channel_correlation(leaf, target), leaf)[0].double()
        for leaf in (attention.clone().requires_grad_(), attention.double().requires_grad_())
    )
    value = channel_correlation(attention, target).item()
    assert value == pytest.approx(channel_correlation(attention.double(), target).item(), rel=1e-5)
    if not soft:
        assert value == pytest.approx(n_by_n(attention.double(), target).item(), rel=1e-5)
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5


def test_cc_of_soft_targets_is_the_double_loop():
    attention = torch.rand(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    target = make_target(9, 5, soft=True)
    value, expected = (
        channel_correlation(attention, target),
        references.pair_ratio(attention, target.tolist(), 1e-8),
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    slopes = [torch.autograd.grad(v, attention)[0] for v in (value, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-11, atol=1e-13)


def test_cc_ignores_shift_and_scale():
    attention, target = torch.rand(12, 5, dtype=torch.float64), make_target(12)
    value = channel_correlation(attention, target, eps=0.0)
    torch.testing.assert_close(channel_correlation(3 * attention + 7, target, eps=0.0), value, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_cc_of_a_million_samples():
    """O(N D): the paper's matrix would have 1e12 entries."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1_000_000, 128, generator=generator).requires_grad_()
    target = torch.arange(1_000_000) % 1000
    value = channel_correlation(attention, target)
    value.backward()
    # without structure: pairs of one class over pairs of two
    assert value.item() == pytest.approx(999 / 999_000, rel=1e-2)
    assert attention.grad.isfinite().all()


# --- the hunt for NaN ------------------------------------------------------------------------------------------------

BATCHES = int(os.environ.get('CCL_TIMM_HUNT', 30))
ROWS = ('plain', 'plain', 'zero', 'copy', 'huge', 'small', 'tiny', 'class', 'minus class', 'constant')


def spoil(row_kinds, target):
    """Make rows degenerate: a function for make_outputs(change=)."""

    def change(drawn):
        vectors = drawn.get('centroids', drawn.get('weight'))
        for name, tensor in drawn.items():
            if name in ('weight', 'centroids'):
                continue
            for i, kind in enumerate(row_kinds):
                if kind == 'copy':
                    tensor[i] = tensor[0].clone()
                elif kind == 'constant':
                    tensor[i] = 1.0
                elif kind.endswith('class') and name == 'features' and vectors is not None:
                    tensor[i] = (-1 if kind.startswith('minus') else 1) * vectors[target[i]]
                else:
                    tensor[i] *= {'zero': 0.0, 'huge': 1e4, 'small': 1e-2, 'tiny': 1e-4}.get(kind, 1.0)

    return change


def random_batch(name, seed):
    """A loss, what it reads as half or single precision leaves, and a target."""
    dice = random.Random(seed)
    batch, num_classes, dim = dice.choice((1, 2, 3, 8, 16)), dice.choice((2, 3, 5, 10)), dice.choice((2, 6, 16))
    kinds = [dice.choice(ROWS) for _ in range(batch)]
    if dice.random() < 0.3:
        kinds = [dice.choice(ROWS)] * batch
    target = torch.tensor([dice.randrange(num_classes) for _ in range(batch)])
    if dice.random() < 0.2:
        target = torch.full((batch,), dice.randrange(num_classes))
    loss = build(name, num_classes, dim, torch.float32)
    outputs = make_outputs(loss, batch, num_classes, dim, torch.float32, seed, change=spoil(kinds, target))
    dtype = dice.choice((torch.float32, torch.float16, torch.bfloat16))
    read = {
        key: getattr(outputs, key).detach().to(torch.float32 if key in ('weight', 'centroids') else dtype)
        for key in loss.requires
    }
    leaves = [read[key].requires_grad_() for key in read if key != 'centroids']
    if loss.soft_targets and dice.random() < 0.3:
        share = torch.rand(batch, 1)
        target = share * F.one_hot(target, num_classes) + (1 - share) * F.one_hot(target.flip(0), num_classes)
    words = f'batch {seed}: {batch} samples, {num_classes} classes, {dim} features, {dtype}, rows {kinds}, {target}'
    return loss, SimpleNamespace(**read), leaves, target, words


def hunt(name, seeds):
    for seed in seeds:
        loss, outputs, leaves, target, words = random_batch(name, seed)
        loss.set_step(seed % 5)
        for epoch in range(2):
            loss.set_epoch(epoch)
            value = loss(outputs, target)
            assert value.isfinite(), f'value {value.item()}, {words}'
            for gradient in torch.autograd.grad(value, leaves, allow_unused=True):
                assert gradient is None or gradient.isfinite().all(), f'gradient {gradient}, epoch {epoch}, {words}'
        assert all(tensor.isfinite().all() for tensor in loss.state_dict().values()), f'state, {words}'


@pytest.mark.parametrize('name', ALL)
def test_random_batches_are_finite(name):
    hunt(name, range(BATCHES))


@pytest.mark.slow
@pytest.mark.parametrize('name', ALL)
def test_thousand_random_batches_are_finite(name):
    hunt(name, range(1000))


# --- two processes ---------------------------------------------------------------------------------------------------


DISTRIBUTED = [(name, {}) for name in ALL] + [
    ('center', {'reduction': 'sum'}),
    ('fical', {'momentum': 0.9}),
    ('nac', {'norm': 'logits', 'alpha': 0.5}),
    ('pedcc', {'reduction': 'sum'}),
    ('pedcc', {'root': 2.0}),
    ('pod', {'weight': 100.0, 'alpha': 0.5}),
]


class Scaled(nn.Module):
    """Drawn tensors times learnt factors, then the loss: something to distribute, with no model."""

    def __init__(self, name, options):
        super().__init__()
        self.loss = build(name, **options)
        drawn = self.draw(0)[0]
        self.factors = nn.ParameterDict(
            {
                key: torch.ones(tensor.shape if key == 'weight' else tensor.shape[1:], dtype=torch.float64)
                for key, tensor in drawn.items()
                if key != 'centroids'
            }
        )

    def draw(self, step):
        outputs = make_outputs(self.loss, 8, seed=step)
        return {key: tensor.detach() for key, tensor in outputs.drawn.items()}, make_target(8, seed=step)

    def forward(self, step, rows):
        drawn, target = self.draw(step)
        local = {}
        for key, tensor in drawn.items():
            tensor = tensor if key in ('weight', 'centroids') else tensor[rows]
            local[key] = tensor * self.factors[key] if key in self.factors else tensor
        return self.loss(rebuilt(local), target[rows])


def rebuilt(drawn):
    """What make_outputs derives from other drawn tensors, with their graph."""
    found = dict(drawn)
    for key in ('weight', 'centroids'):
        if key in drawn:
            found[key] = F.normalize(drawn[key], dim=1)
    if 'feature_map' in drawn:
        found['feature_map'] = drawn['feature_map'].abs()
    if 'attention' in drawn:
        found['attention'] = drawn['attention'].sigmoid()
    if 'features' in drawn:
        vectors = found.get('centroids', found.get('weight', found['features']))
        found['cosine'] = F.normalize(found['features'], dim=1) @ vectors.T
    return SimpleNamespace(**found)


def run_steps(module, rows):
    """Gradients of four steps over two epochs, and the loss's state at the end."""
    bare = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    found = []
    for step in range(4):
        bare.loss.set_step(step)
        bare.loss.set_epoch(step // 2)
        module.zero_grad()
        torch.manual_seed(step)  # the same mask everywhere
        module(step, rows).backward()
        found.append({key: factor.grad.clone() for key, factor in bare.factors.items()})
    return found, bare.loss.state_dict()


def process(rank, folder):
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = []
    for name, options in DISTRIBUTED:
        try:
            module = nn.parallel.DistributedDataParallel(Scaled(name, options), find_unused_parameters=True)
            results.append(run_steps(module, slice(4 * rank, 4 * rank + 4)))
        except Exception:
            results.append(traceback.format_exc())
    results.append([penalty_gradient(soft, slice(4 * rank, 4 * rank + 4)) for soft in (False, True)])
    torch.save(results, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def penalty_gradient(soft, rows):
    """Gradient, on some rows of the attention, of the squared length of CC's gradient."""
    attention = make_outputs('cc').attention.detach()[rows].requires_grad_()
    loss = channel_correlation(attention, make_target(soft=soft)[rows], 5)
    (gradient,) = torch.autograd.grad(loss, attention, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), attention)[0]


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """What each of two processes found, in the order of DISTRIBUTED."""
    folder = str(tmp_path_factory.mktemp('ddp'))
    torch.multiprocessing.spawn(process, (folder,), nprocs=2)
    return [torch.load(f'{folder}/{rank}.pt', weights_only=False) for rank in range(2)]


@pytest.mark.parametrize('case', range(len(DISTRIBUTED)), ids=lambda i: '-'.join(map(str, DISTRIBUTED[i])))
def test_two_processes_are_one(case, two_processes):
    """Half the batch each: gradients of the whole batch, and the same state everywhere."""
    for rank, results in enumerate(two_processes):
        assert not isinstance(results[case], str), f'process {rank}: {results[case]}'
    expected, state = run_steps(Scaled(*DISTRIBUTED[case]), slice(0, 8))
    for results in two_processes:
        found, its_state = results[case]
        for step in range(4):
            for key, gradient in expected[step].items():
                message = f'step {step}, gradient on {key}'
                torch.testing.assert_close(
                    found[step][key], gradient, rtol=1e-6, atol=1e-9, msg=lambda text, m=message: f'{m}: {text}'
                )
        for key, tensor in state.items():
            torch.testing.assert_close(its_state[key], tensor, rtol=1e-6, atol=1e-9)
            assert torch.equal(its_state[key], two_processes[0][case][1][key]), f'{key} differs between the processes'


@pytest.mark.parametrize('soft', [False, True], ids=['indices', 'probabilities'])
def test_second_derivatives_of_two_processes_are_those_of_one(soft, two_processes):
    expected = 4 * penalty_gradient(soft, slice(0, 8))  # both processes have the loss, so that gradients are doubled
    found = torch.cat([results[-1][soft] for results in two_processes])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_every_loss_has_a_reference():
    """A new loss of ours must bring its formula."""
    assert set(REFERENCES) == set(ALL)
