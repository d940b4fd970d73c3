"""Checks that every loss and every model must pass: ours, and a plugin's in three lines of its own tests.

A loss with the formula written once more, in another way (loops over samples are fine), and a model::

    from ccl_timm.testing import check_loss, check_model

    def test_my_loss():
        check_loss('my_loss', reference=lambda outputs, target, loss: slow_but_simple(outputs.features, target))

    def test_my_model():
        check_model('my_model', img_size=64)

The lists ``LOSS_CHECKS`` and ``MODEL_CHECKS`` say what is checked; each entry is a function with a sentence of its own.
Failures are AssertionErrors that name the loss or model, the check, and the figures.
"""

import copy
import inspect
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import timm.models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from ccl_timm import models
from ccl_timm.errors import UserError
from ccl_timm.heads import HEADS
from ccl_timm.losses import Loss, create_loss, loss_class, loss_options
from ccl_timm.task import create_task

__all__ = ['LOSS_CHECKS', 'MODEL_CHECKS', 'LossCase', 'check_loss', 'check_model', 'make_outputs', 'make_target']

# what make_outputs can draw by itself
_KNOWN = ('logits', 'cosine', 'features', 'feature_map', 'attention', 'centroids', 'weight')
# class vectors: their first dimension is the class, not the sample
_BY_CLASS = ('weight', 'centroids')
_SEED = 1234


# ---------------------------------------------------------------------------------------------------------------------
# inputs
# ---------------------------------------------------------------------------------------------------------------------


def make_target(batch: int = 8, num_classes: int = 5, seed: int = 0, soft: bool = False) -> Tensor:
    """Make class indices (batch,) with repeated classes and an absent one, or probabilities (batch, num_classes).

    Args:
        batch: N.
        num_classes: K; the last class is absent if there are more than two.
        seed: for the order.
        soft: mix pairs of samples as Mixup does; every class has a little weight, rows sum to 1, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = max(2, num_classes - 1)
    target = (torch.arange(batch) % min(classes, num_classes))[torch.randperm(batch, generator=generator)]
    if not soft:
        return target
    one_hot = F.one_hot(target, num_classes).double()
    share = 0.2 + 0.6 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    return 0.9 * (share * one_hot + (1 - share) * one_hot.flip(0)) + 0.1 / num_classes


def make_outputs(
    loss: Any,
    batch: int = 8,
    num_classes: int = 5,
    num_features: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    num_channels: int | None = None,
    own: Callable[..., dict[str, Tensor]] | None = None,
    change: Callable[[dict[str, Tensor]], None] | None = None,
) -> SimpleNamespace:
    """Draw what a loss reads, as attributes; ``leaves`` holds by name the tensors that gradients arrive at.

    The tensors agree with each other: ``cosine`` is that of ``features`` and the unit rows of ``weight`` (or
    ``centroids``, which are fixed and get no gradient), ``attention`` is a sigmoid in (0, 1), ``feature_map``
    (N, C, 3, 3) is not negative, as after a ReLU. ``logits`` are drawn by themselves.

    Args:
        loss: a loss, its class, its name, or a tuple of names of tensors.
        batch: N.
        num_classes: K.
        num_features: D.
        dtype: floating point.
        seed: equal seeds give equal tensors.
        num_channels: C of the feature map, 3 K by default.
        own: called as ``own(batch, num_classes, num_features)``; returns by name leaf tensors that the loss reads
            beside (or in place of) the known ones.
        change: called with the drawn tensors by name before anything is derived from them; may write into them.
    """
    reads = _reads(loss)
    generator = torch.Generator().manual_seed(seed)
    channels = num_channels or 3 * num_classes
    shapes = {
        'logits': (batch, num_classes),
        'features': (batch, num_features),
        'feature_map': (batch, channels, 3, 3),
        'attention': (batch, num_features),
        'weight': (num_classes, num_features),
        'centroids': (num_classes, num_features),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        extra = own(batch, num_classes, num_features) if own else {}
    unknown = [name for name in reads if name not in _KNOWN and name not in extra]
    if unknown:
        raise AssertionError(f"nothing is known of the tensor '{unknown[0]}': give a factory that makes it.")
    drawn = {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype)
        for name in sorted(_sources(reads) - extra.keys())
    }
    drawn.update({name: tensor.detach().to(dtype) for name, tensor in extra.items()})
    if change:
        change(drawn)
    for name, tensor in drawn.items():
        tensor.requires_grad_(name != 'centroids' and tensor.is_floating_point())
    return _derive(drawn, reads, extra)


def _reads(loss: Any) -> tuple[str, ...]:
    return loss if isinstance(loss, tuple) else loss_class(loss).reads if isinstance(loss, str) else loss.reads


def _sources(reads: Iterable[str]) -> set[str]:
    """Names of the tensors to draw, from which the read ones can be derived."""
    sources = {name for name in reads if name in _KNOWN}
    if 'cosine' in sources:
        sources = sources - {'cosine'} | {'features', 'centroids' if 'centroids' in sources else 'weight'}
    return sources


def _derive(drawn: dict[str, Tensor], reads: Iterable[str], extra: Iterable[str] = ()) -> SimpleNamespace:
    """From leaves to what a loss reads; keeps the graph between them."""
    rows = {name: F.normalize(drawn[name], dim=1) for name in _BY_CLASS if name in drawn and name not in extra}
    found = {**drawn, **rows}
    if 'feature_map' in drawn and 'feature_map' not in extra:
        found['feature_map'] = drawn['feature_map'].abs()
    if 'attention' in drawn and 'attention' not in extra:
        found['attention'] = drawn['attention'].sigmoid()
    if 'cosine' in reads and 'cosine' not in extra:
        vectors = found['centroids'] if 'centroids' in found else found['weight']
        found['cosine'] = F.normalize(found['features'], dim=1) @ vectors.T
    leaves = {name: tensor for name, tensor in drawn.items() if tensor.requires_grad}
    return SimpleNamespace(**found, leaves=leaves, drawn=drawn, reads=tuple(reads), own=tuple(extra))


# ---------------------------------------------------------------------------------------------------------------------
# a loss under test
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class LossCase:
    """A loss under test, and how to make it and its inputs. See :func:`check_loss` for the fields."""

    loss: str | Callable[..., Loss]
    options: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Tensor] | None = None
    outputs: Callable[..., dict[str, Tensor]] | None = None
    prepare: Callable[[Loss], Any] | None = None
    model: Any = None
    backend: str = 'aot_eager'

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, '__name__', str(self.loss))

    def build(
        self, dtype: torch.dtype = torch.float32, num_classes: int = 5, num_features: int = 6, seed: int = _SEED
    ) -> Loss:
        """Make the loss in training mode, its state in ``dtype``; fills in what a task would fill in."""
        options = loss_options(self.loss) if isinstance(self.loss, str) else inspect.signature(self.loss).parameters
        facts = {'num_classes': num_classes, 'num_features': num_features, 'num_channels': 3 * num_classes}
        options = {**{key: value for key, value in facts.items() if key in options}, **self.options}
        default = torch.get_default_dtype()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                torch.set_default_dtype(dtype)  # so that a constant such as 0.05 is not rounded to float32 on the way
                loss = create_loss(self.loss, **options) if isinstance(self.loss, str) else self.loss(**options)
            finally:
                torch.set_default_dtype(default)
        loss = loss.to(dtype).train()
        if self.prepare:
            self.prepare(loss)
        return loss

    def example(self, batch: int = 8, num_classes: int = 5, num_features: int = 6, **kwargs) -> SimpleNamespace:
        """Inputs that fit :meth:`build`; keyword arguments as for :func:`make_outputs`."""
        reads = self.build(num_classes=num_classes, num_features=num_features).reads
        kwargs.setdefault('num_channels', self.options.get('num_channels'))
        return make_outputs(reads, batch, num_classes, num_features, own=self.outputs, **kwargs)


def _value_and_gradients(loss: Callable, outputs: Any, target: Tensor, leaves: dict[str, Tensor]):
    """The scalar and its gradient at the leaves (zeros where none arrives), always with the same random numbers."""
    if hasattr(outputs, 'drawn'):  # a graph of its own for each call: a loss that holds on to one is found out
        outputs = _derive(outputs.drawn, outputs.reads, outputs.own)
    torch.manual_seed(_SEED)
    value = loss(outputs, target)
    assert value.ndim == 0, f'the loss is of shape {tuple(value.shape)}, not a scalar.'
    assert value.requires_grad, 'the loss has no gradient at all.'
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if leaves else ()
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return value.detach(), gradients


def _state(loss: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in loss.state_dict().items()}


def _equal_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """None, or the name of the first tensor that differs."""
    if a.keys() != b.keys():
        return sorted(a.keys() ^ b.keys())[0]
    return next((name for name in a if not torch.equal(a[name], b[name])), None)


def _assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float, what: str) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f'{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}.'
    if torch.allclose(actual, expected, rtol=rtol, atol=atol):
        return
    error = (actual - expected).abs()
    worst = error.nan_to_num(nan=float('inf')).argmax()
    got, want = actual.flatten()[worst].item(), expected.flatten()[worst].item()
    raise AssertionError(f'{what}: {got:.12g} instead of {want:.12g} (difference {abs(got - want):.3g}).')


def _assert_finite(value: Tensor, gradients: dict[str, Tensor], where: str) -> None:
    assert value.isfinite(), f'{where}: the value is {value.item()}.'
    for name, gradient in gradients.items():
        bad = int((~gradient.isfinite()).sum())
        assert not bad, f'{where}: the gradient on {name} has {bad} of {gradient.numel()} entries that are not finite.'


# ---------------------------------------------------------------------------------------------------------------------
# the checks of a loss
# ---------------------------------------------------------------------------------------------------------------------


def facts_are_declared(case: LossCase) -> None:
    """``reads``, ``head``, ``soft_targets`` and ``batch_statistics`` are there, of the right type, and known."""
    loss = case.build()
    reads = loss.reads
    assert isinstance(reads, tuple) and reads and all(isinstance(name, str) for name in reads), (
        f'reads must be a tuple of names, it is {reads!r}.'
    )
    assert loss.head is None or isinstance(loss.head, str), f'head must be a name or None, it is {loss.head!r}.'
    if case.model is None and case.outputs is None:
        assert loss.head in (None, *HEADS), (
            f"head '{loss.head}' is none of {', '.join(HEADS)}: give a model= that has it."
        )
    for name in ('soft_targets', 'batch_statistics'):
        assert isinstance(getattr(loss, name), bool), f'{name} must be True or False, it is {getattr(loss, name)!r}.'
    cls = case.loss if callable(case.loss) else loss_class(case.loss)
    if getattr(cls, '__init__', None) is nn.Module.__init__:
        return  # no options of its own: the signature is that of torch
    loose = [p.name for p in inspect.signature(cls).parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert not loose, f'its options must be explicit, it takes *{loose[0]}.' if loose else ''


def reads_what_it_declares(case: LossCase) -> None:
    """Nothing beside ``reads`` is taken from the outputs, and each of ``reads`` makes a difference."""
    outputs, target = case.example(), make_target()
    loss = case.build(torch.float64)
    only = SimpleNamespace(**{name: getattr(outputs, name).detach() for name in loss.reads})
    seen = []
    for step in (0, 1):  # a loss that alternates may read one tensor at even steps only
        loss.set_step(step)
        for name in (None, *loss.reads):
            trial, other = copy.deepcopy(loss), copy.copy(only)
            if name:
                read = getattr(only, name)  # no common factor: many losses do not see the scale
                setattr(other, name, read * torch.linspace(0.5, 0.9, read.numel()).view_as(read))
            torch.manual_seed(_SEED)
            value = trial(other, target)
            if name is None:
                base, base_state = value, _state(trial)
            elif not torch.allclose(value, base, rtol=1e-9, atol=0) or _equal_state(_state(trial), base_state):
                seen.append(name)
    unused = [name for name in loss.reads if name not in seen]
    assert not unused, f"reads names '{unused[0]}', but neither value nor state changes with it."


def batch_statistics_are_declared(case: LossCase) -> None:
    """``batch_statistics`` is True exactly if the loss is no sum over samples: then two samples interact."""
    loss = case.build(torch.float64)
    first, second = case.example(seed=0), case.example(seed=1)
    targets = make_target(seed=0), make_target(seed=1)
    targets = targets[0], targets[1].roll(1)
    names = [name for name in loss.reads if name not in _BY_CLASS and len(getattr(first, name)) == 8]

    def value(head: int, rest: int) -> Tensor:
        """Sample 0 of one draw, all others of one draw, the class vectors always of the first."""
        mixed = {name: getattr(first, name).detach() for name in loss.reads}
        for name in names:
            parts = [getattr((first, second)[i], name).detach() for i in (head, rest)]
            mixed[name] = torch.cat([parts[0][:1], parts[1][1:]])
        target = torch.cat([targets[head][:1], targets[rest][1:]])
        torch.manual_seed(_SEED)
        return copy.deepcopy(loss)(SimpleNamespace(**mixed), target).detach()

    # of a sum over samples the mixed second difference is zero
    values = value(0, 0), value(0, 1), value(1, 0), value(1, 1)
    mixed = (values[0] - values[1] - values[2] + values[3]).abs().item()
    scale = max(v.abs().item() for v in values)
    interacts = mixed > 1e-9 * max(scale, 1e-3)
    assert interacts == loss.batch_statistics, (
        f'batch_statistics is {loss.batch_statistics}, but samples {"do" if interacts else "do not"} interact: '
        f'the mixed second difference is {mixed:.3g} at values of {scale:.3g}.'
    )


def soft_targets_are_declared(case: LossCase) -> None:
    """One-hot probabilities equal indices if ``soft_targets``; else probabilities are refused with a UserError."""
    outputs, target = case.example(), make_target()
    one_hot = F.one_hot(target, 5).double()
    if not case.build().soft_targets:
        try:
            case.build(torch.float64)(outputs, one_hot)
        except UserError:
            return
        raise AssertionError('soft_targets is False, but a target of probabilities is not refused with a UserError.')
    hard = _value_and_gradients(case.build(torch.float64), outputs, target, outputs.leaves)
    soft = _value_and_gradients(case.build(torch.float64), case.example(), make_target(soft=True), {})
    _assert_finite(*soft, 'mixed targets')
    if case.options.get('smoothing'):
        return  # probabilities are taken as they are: smoothed already
    soft = _value_and_gradients(case.build(torch.float64), outputs, one_hot, outputs.leaves)
    _assert_close(soft[0], hard[0], 1e-10, 1e-12, 'value with one-hot probabilities in place of indices')
    for name, gradient in soft[1].items():
        _assert_close(gradient, hard[1][name], 1e-9, 1e-11, f'gradient on {name} with one-hot probabilities')


def terms_add_up(case: LossCase) -> None:
    """The named terms are scalars whose sum is the loss; a 32-bit or 8-bit integer target is as good as int64."""
    outputs, target = case.example(), make_target()
    torch.manual_seed(_SEED)
    terms = case.build(torch.float64).named_terms(outputs, target)
    assert isinstance(terms, dict) and terms, f'named_terms must return a dict of terms, it returned {terms!r}.'
    for name, term in terms.items():
        assert term.ndim == 0, f"the term '{name}' is of shape {tuple(term.shape)}, not a scalar."
    for dtype in (torch.int64, torch.int32, torch.uint8):
        value, _ = _value_and_gradients(case.build(torch.float64), outputs, target.to(dtype), {})
        _assert_close(value, sum(terms.values()), 1e-12, 1e-14, f'loss against the sum of its terms ({dtype} target)')


def equals_reference(case: LossCase) -> None:
    """Value and gradient on every leaf equal the reference's, in float64, for several batch sizes."""
    if case.reference is None:
        return
    soft = case.build().soft_targets
    sizes = [(8, 5, 6, False), (4, 5, 6, False), (7, 3, 2, False), (1, 5, 6, False)] + [(6, 4, 5, True)] * soft
    for batch, num_classes, num_features, is_soft in sizes:
        outputs = case.example(batch, num_classes, num_features, seed=batch)
        target = make_target(batch, num_classes, seed=batch, soft=is_soft)
        loss = case.build(torch.float64, num_classes, num_features)
        frozen = copy.deepcopy(loss)  # the reference sees the state before the step
        value, gradients = _value_and_gradients(loss, outputs, target, outputs.leaves)

        def reference(outputs, target, frozen=frozen):
            return (
                torch.as_tensor(case.reference(outputs, target, frozen)) + 0 * next(iter(outputs.leaves.values())).sum()
            )

        expected, wanted = _value_and_gradients(reference, outputs, target, outputs.leaves)
        where = f'against the reference, {batch} samples, {num_classes} classes' + (', soft targets' if is_soft else '')
        _assert_close(value, expected, 1e-10, 1e-13, f'value {where}')
        for name, gradient in gradients.items():
            _assert_close(gradient, wanted[name], 1e-8, 1e-10, f'gradient on {name} {where}')


def gradient_is_the_derivative(case: LossCase) -> None:
    """torch's gradcheck in float64: the gradient is that of the value, with nothing detached."""
    outputs = case.example(4, 3, 4)
    loss, target = case.build(torch.float64, 3, 4), make_target(4, 3)
    names = tuple(outputs.leaves)

    def function(*leaves: Tensor) -> Tensor:
        torch.manual_seed(_SEED)
        drawn = {**outputs.drawn, **dict(zip(names, leaves, strict=True))}
        return copy.deepcopy(loss)(_derive(drawn, loss.reads, outputs.own), target)

    for step in (0, 1):
        loss.set_step(step)
        leaves = tuple(outputs.leaves.values())
        try:
            # a feature map has hundreds of entries: random directions then, in place of each entry
            gradcheck(function, leaves, fast_mode=sum(leaf.numel() for leaf in leaves) > 200)
        except GradcheckError as error:
            sentence = ' '.join(str(error).split())[:400]
            raise AssertionError(
                f'the gradient is not the derivative of the value (step {step}): {sentence}'
            ) from error


def half_precision_is_close(case: LossCase) -> None:
    """float16 and bfloat16 inputs, also under autocast, give what float64 gives for the same rounded numbers."""
    loss, target = case.build(), make_target()
    double = copy.deepcopy(loss).double()
    for dtype in (torch.float16, torch.bfloat16):
        read = {name: getattr(case.example(dtype=torch.float32), name).detach().to(dtype) for name in loss.reads}
        leaves = {name: tensor.requires_grad_(name != 'centroids') for name, tensor in read.items()}
        leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
        exact = {name: tensor.detach().double().requires_grad_(name in leaves) for name, tensor in read.items()}
        exact_leaves = {name: exact[name] for name in leaves}
        expected, wanted = _value_and_gradients(copy.deepcopy(double), SimpleNamespace(**exact), target, exact_leaves)
        for autocast in (False, True):
            where = f'with {str(dtype).removeprefix("torch.")} inputs' + (' under autocast' if autocast else '')
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
                value, gradients = _value_and_gradients(copy.deepcopy(loss), SimpleNamespace(**read), target, leaves)
            assert value.dtype == torch.float32, f'the value is of type {value.dtype} {where}, not float32.'
            _assert_finite(value, gradients, where)
            _assert_close(value, expected, 1e-4, 1e-5, f'value {where}')
            for name, gradient in gradients.items():
                tolerance = 0.01 * wanted[name].abs().max().item() + 1e-6
                _assert_close(gradient, wanted[name], 0.02, tolerance, f'gradient on {name} {where}')


def compiled_is_equal(case: LossCase) -> None:
    """torch.compile changes neither value, nor gradient, nor state, over three steps."""
    import torch._inductor.config as inductor  # takes a second to import: not for the checks that do without

    torch._dynamo.reset()
    eager = case.build()
    compiled = torch.compile(copy.deepcopy(eager), backend=case.backend)
    with inductor.patch(fallback_random=True):
        for step in range(3):
            outputs, target = case.example(dtype=torch.float32, seed=step), make_target(seed=step)
            for loss in (eager, compiled):
                loss.set_step(step)
            value, gradients = _value_and_gradients(eager, outputs, target, outputs.leaves)
            again, others = _value_and_gradients(compiled, outputs, target, outputs.leaves)
            _assert_close(again, value, 1e-5, 1e-6, f'compiled value at step {step}')
            for name, gradient in others.items():
                _assert_close(gradient, gradients[name], 1e-4, 1e-6, f'compiled gradient on {name} at step {step}')
    for (name, tensor), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        _assert_close(other, tensor, 1e-5, 1e-6, f"compiled state '{name}'")


def _repeat_first(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(_BY_CLASS):
        drawn[name][:] = drawn[name][:1].clone()


def _zero(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(_BY_CLASS):
        drawn[name].zero_()


def _extreme(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(_BY_CLASS):
        drawn[name].copy_(1e4 * (drawn[name].sign()))


def _tiny(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(_BY_CLASS):
        drawn[name].mul_(1e-6)


def _class_vectors(sign: float) -> Callable[[dict[str, Tensor]], None]:
    def change(drawn: dict[str, Tensor]) -> None:
        vectors = drawn.get('centroids', drawn.get('weight'))
        if 'features' in drawn and vectors is not None:
            target = make_target(len(drawn['features']), len(vectors))
            drawn['features'].copy_(sign * vectors[target])

    return change


# name -> batch, classes, change of the drawn tensors, target (None: the usual one)
_HARD_BATCHES: dict[str, tuple[int, int, Callable | None, Tensor | None]] = {
    'a batch of one': (1, 5, None, None),
    'a batch of one class': (8, 5, None, torch.full((8,), 2)),
    'all classes different': (5, 5, None, torch.arange(5)),
    'two classes': (8, 2, None, None),
    'duplicated rows': (8, 5, _repeat_first, None),
    'duplicated rows of one class': (8, 5, _repeat_first, torch.full((8,), 2)),
    'zero rows': (8, 5, _zero, None),
    'a zero row alone': (1, 5, _zero, None),
    'rows of 1e-6': (8, 5, _tiny, None),
    'rows of 1e4': (8, 5, _extreme, None),
    'cosine 1': (8, 5, _class_vectors(1.0), None),
    'cosine -1': (8, 5, _class_vectors(-1.0), None),
}


def hard_batches_are_finite(case: LossCase) -> None:
    """Value and gradient are finite for degenerate and extreme batches, in float32 and float64, in every state."""
    for where, (batch, num_classes, change, target) in _HARD_BATCHES.items():
        target = make_target(batch, num_classes) if target is None else target
        targets = [target]
        if case.build().soft_targets:
            targets.append(F.one_hot(target, num_classes).double())
        for dtype in (torch.float32, torch.float64):
            loss = case.build(dtype, num_classes)
            outputs = case.example(batch, num_classes, dtype=dtype, change=change)
            for step in range(3):
                loss.set_step(step)
                loss.set_epoch(step)
                for each in targets:
                    found = _value_and_gradients(loss, outputs, each, outputs.leaves)
                    _assert_finite(*found, f'{where}, {dtype}, step {step}')
    _exact_cosines_are_finite(case)


def _exact_cosines_are_finite(case: LossCase) -> None:
    """Cosines that are 1 or -1 to the last bit, or one rounding beyond, as a product of unit vectors gives them."""
    if 'cosine' not in case.build().reads:
        return
    step = torch.finfo(torch.float32).eps
    for cosine in (1.0, -1.0, 1 + step, -1 - step, 1 - step, step - 1):
        loss, target = case.build(), make_target()
        outputs = case.example(dtype=torch.float32)
        read = {name: getattr(outputs, name).detach() for name in loss.reads}
        read['cosine'] = torch.full_like(read['cosine'], cosine).requires_grad_()
        found = _value_and_gradients(loss, SimpleNamespace(**read), target, {'cosine': read['cosine']})
        _assert_finite(*found, f'all cosines {cosine!r}')


def state_is_saved(case: LossCase) -> None:
    """A loss that loads another's saved state goes on exactly as that one, whatever has happened to it before."""
    loss = case.build(torch.float64)
    for step in range(2):
        outputs, target = case.example(seed=step), make_target(seed=step)
        loss.set_epoch(step)
        loss.set_step(step)
        _value_and_gradients(loss, outputs, target, outputs.leaves)
        held = [name for name, tensor in loss.named_buffers() if tensor.requires_grad]
        assert not held, f"the state '{held[0]}' holds a graph: update it from detached tensors." if held else ''
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = case.build(torch.float64, seed=_SEED + 1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in (2, 3):
        outputs, target = case.example(seed=step), make_target(seed=step)
        value, _ = _value_and_gradients(loss, outputs, target, outputs.leaves)
        again, _ = _value_and_gradients(other, outputs, target, outputs.leaves)
        _assert_close(again, value, 0, 0, 'value after loading the saved state')
        differs = _equal_state(_state(loss), _state(other))
        assert not differs, f"the state '{differs}' differs after loading the saved state and one more step."
        for each in (loss, other):  # an epoch closes what was gathered in it
            each.set_epoch(step)


def seed_decides(case: LossCase) -> None:
    """Two losses of one seed agree in state, value and gradient."""
    outputs, target = case.example(), make_target()
    first, second = case.build(torch.float64), case.build(torch.float64)
    differs = _equal_state(_state(first), _state(second))
    assert not differs, f"the state '{differs}' of a new loss differs between two of the same seed."
    value, gradients = _value_and_gradients(first, outputs, target, outputs.leaves)
    again, others = _value_and_gradients(second, outputs, target, outputs.leaves)
    _assert_close(again, value, 0, 0, 'value of two losses of the same seed')
    for name, gradient in others.items():
        _assert_close(gradient, gradients[name], 0, 0, f'gradient on {name} of two losses of the same seed')


def evaluation_keeps_state(case: LossCase) -> None:
    """Neither a forward pass in evaluation mode nor one without gradient changes the state."""
    loss, target = case.build(), make_target()
    outputs = case.example(dtype=torch.float32)
    before = _state(loss)
    loss.eval()
    loss(outputs, target)
    differs = _equal_state(before, _state(loss))
    assert not differs, f"a forward pass in evaluation mode changes the state '{differs}'."
    loss.train()
    with torch.no_grad():
        loss(outputs, target)
    differs = _equal_state(before, _state(loss))
    assert not differs, f"a forward pass without gradient changes the state '{differs}'."


def trains_in_a_task(case: LossCase) -> None:
    """In a task on a small model with the head that it names, the loss of one fixed batch falls within 16 steps."""
    if case.model is None and case.outputs is not None:
        return  # tensors of a head that only the plugin knows, and no model with it was given
    torch.manual_seed(_SEED)
    model = _small_model(case)
    loss = case.loss if isinstance(case.loss, str) else case.build(torch.float32, 5, _width(model))
    task = create_task(model, loss, **(case.options if isinstance(case.loss, str) else {}))
    task.train()
    x, target = torch.randn(8, *_input_size(model)), make_target(8, 5)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    history = []
    for step in range(16):
        result = task(x, target)
        terms = [value for name, value in result.items() if name not in ('loss', 'output')]
        _assert_close(result['loss'], sum(terms), 1e-4, 1e-5, "the task's loss against the sum of its terms")
        optimizer.zero_grad()
        result['loss'].backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        task.update_ema(step + 1)
        history.append(result['loss'].item())
        assert result['loss'].isfinite(), f'the loss is {history[-1]} at step {step} of training.'
    first, last = sum(history[:4]) / 4, sum(history[-4:]) / 4
    assert last < first, (
        f'training does not lower it: mean {first:.6g} over the first four steps, {last:.6g} over the last.'
    )
    task.load_task_state(copy.deepcopy(task.get_task_state()))


def _small_model(case: LossCase) -> nn.Module:
    if isinstance(case.model, nn.Module):
        return copy.deepcopy(case.model)
    head, name = case.build().head, case.model
    if name is None and head:
        models.register_variant('test_resnet', head)
        name = f'test_resnet_{head}'
    return models.create_model(name or 'test_resnet', num_classes=5)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    cfg = model.pretrained_cfg
    channels, *size = cfg['input_size']
    # 96 px leave a map of 3 x 3 after five halvings
    return (channels, *size) if cfg.get('fixed_input_size') else (channels, *(min(96, s) for s in size))


def _width(model: nn.Module) -> int:
    with torch.no_grad():
        model.eval()
        pooled = model.forward_head(model.forward_features(torch.zeros(1, *_input_size(model))), pre_logits=True)
        classifier = model.get_classifier()
        return classifier.outputs(pooled).features.shape[1] if hasattr(classifier, 'outputs') else pooled.shape[1]


LOSS_CHECKS: tuple[Callable[[LossCase], None], ...] = (
    facts_are_declared,
    reads_what_it_declares,
    batch_statistics_are_declared,
    soft_targets_are_declared,
    terms_add_up,
    equals_reference,
    gradient_is_the_derivative,
    half_precision_is_close,
    hard_batches_are_finite,
    state_is_saved,
    seed_decides,
    evaluation_keeps_state,
    compiled_is_equal,
    trains_in_a_task,
)


def check_loss(
    loss: str | Callable[..., Loss],
    reference: Callable[..., Tensor] | None = None,
    *,
    outputs: Callable[..., dict[str, Tensor]] | None = None,
    prepare: Callable[[Loss], Any] | None = None,
    model: Any = None,
    backend: str = 'aot_eager',
    checks: Iterable[Callable[[LossCase], None]] = LOSS_CHECKS,
    **loss_kwargs: Any,
) -> None:
    """Run all checks of a loss (``LOSS_CHECKS``), one after another.

    Args:
        loss: a name that :func:`ccl_timm.create_loss` knows, or the loss's class.
        reference: the formula written independently, called as ``reference(outputs, target, loss)``: returns the same
            scalar, in float64, with gradient by autograd. ``loss`` is a copy as it was before the step, for its state;
            random numbers start where the loss's started. If the loss takes soft targets, so must the reference.
        outputs: called as ``outputs(batch, num_classes, num_features)``; returns by name random tensors that the loss
            reads and that no head of ours gives out.
        prepare: called with every new loss, for instance to set its step.
        model: a name for :func:`ccl_timm.create_model`, or a model with 5 classes, to train on; a small ResNet with
            the head that the loss names by default. Without one, a loss with ``outputs`` is not trained.
        backend: of torch.compile; ``'inductor'`` needs a C++ compiler and takes longer.
        checks: some of ``LOSS_CHECKS``, to leave others out.
        **loss_kwargs: options of the loss; ``num_classes`` (5 in most checks), ``num_features`` (6) and
            ``num_channels`` (three a class) are filled in where it takes them.

    Raises:
        AssertionError: names the loss, the check, and the figures.

    Example::

        def test_my_loss():
            check_loss('my_loss', my_reference, margin=0.2)
    """
    case = LossCase(loss, loss_kwargs, reference, outputs, prepare, model, backend)
    _run(f"loss '{case.name}'", case, checks)


def _run(what: str, case: Any, checks: Iterable[Callable]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, sharing the work takes longer than the work
    try:
        for check in checks:
            with torch.random.fork_rng():
                _run_one(what, case, check)
    finally:
        torch.set_num_threads(threads)


def _run_one(what: str, case: Any, check: Callable) -> None:
    try:
        check(case)
    except Exception as error:
        cause = str(error) if isinstance(error, AssertionError) else f'{type(error).__name__}: {error}'
        raise AssertionError(f'{what}, {check.__name__}: {cause}') from error


# ---------------------------------------------------------------------------------------------------------------------
# the checks of a model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelCase:
    """A model under test, and how to make it. See :func:`check_model` for the fields."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None

    def build(self, num_classes: int = 5, **kwargs: Any) -> nn.Module:
        """Make the model, in evaluation mode."""
        models.ensure_registered(self.name)
        if self.img_size and timm.models.get_pretrained_cfg(self.name).fixed_input_size:
            kwargs['img_size'] = self.img_size
        torch.manual_seed(_SEED)
        return models.create_model(self.name, num_classes=num_classes, **{**self.options, **kwargs}).eval()

    def images(self, model: nn.Module, batch: int = 2) -> Tensor:
        """Random images that the model takes."""
        channels, *size = model.pretrained_cfg['input_size']
        size = [self.img_size] * 2 if self.img_size else size
        return torch.randn(batch, self.options.get('in_chans', channels), *size)


def _class_tensors(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the tensors that the cfg names as shaped by the number of classes."""
    names = model.pretrained_cfg['classifier']
    return tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names))


def cfg_is_complete(case: ModelCase) -> None:
    """``pretrained_cfg`` says what data and checkpoint tools need, and its layer names exist in the model."""
    model = case.build()
    cfg = model.pretrained_cfg
    for key in ('architecture', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'num_classes', 'classifier'):
        assert cfg.get(key) is not None, f"pretrained_cfg lacks '{key}'."
    assert cfg['architecture'] == case.name.partition('.')[0], (
        f"pretrained_cfg names the architecture '{cfg['architecture']}'."
    )
    assert len(cfg['mean']) == len(cfg['std']) == cfg['input_size'][0], 'mean, std and input_size differ in channels.'
    keys = model.state_dict().keys()
    first = cfg.get('first_conv') or ()
    for name in (*_class_tensors(model), *(f'{n}.' for n in ([first] if isinstance(first, str) else first))):
        assert any(key.startswith(name) for key in keys), f"pretrained_cfg names '{name[:-1]}', which has no tensors."


def seam_holds(case: ModelCase) -> None:
    """``model(x)`` is get_classifier() of forward_head(forward_features(x), pre_logits=True): one tensor, also in
    training; num_classes, num_features and head_hidden_size say the widths."""
    model = case.build()
    x = case.images(model)
    assert model.num_classes == 5, f'num_classes is {model.num_classes} for a model of 5.'
    with torch.no_grad():
        feature_map = model.forward_features(x)
        pooled = model.forward_head(feature_map, pre_logits=True)
        logits, whole = model.get_classifier()(pooled), model(x)
        trained = model.train()(x)
    assert pooled.shape == (2, model.head_hidden_size), (
        f'pre_logits are of shape {tuple(pooled.shape)}, head_hidden_size is {model.head_hidden_size}.'
    )
    channels = feature_map.shape[1] if feature_map.shape[1] == model.num_features else feature_map.shape[-1]
    assert channels == model.num_features, (
        f'forward_features gives {tuple(feature_map.shape)}, num_features is {model.num_features}.'
    )
    assert isinstance(trained, Tensor) and trained.shape == (2, 5), 'in training the model does not return one (N, K).'
    _assert_close(whole, logits, 1e-5, 1e-5, 'logits of the model against those of its three parts')


def classes_can_change(case: ModelCase) -> None:
    """reset_classifier changes the tensors that the cfg names and no other; 0 classes give features, then any again."""
    model = case.build()
    x, by_class = case.images(model), _class_tensors(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(by_class)}
    model.reset_classifier(7)
    after = {k: v for k, v in model.state_dict().items() if not k.startswith(by_class)}
    differs = _equal_state(before, after)
    assert not differs, f"reset_classifier(7) changes '{differs}', which is not shaped by the classes."
    with torch.no_grad():
        logits = model(x)
        assert model.num_classes == 7 and logits.shape == (2, 7), f'7 classes give logits {tuple(logits.shape)}.'
        model.reset_classifier(0)
        none = case.build(num_classes=0)
        for each, how in ((model, 'reset to 0 classes'), (none, 'built with 0 classes')):
            out = each(x)
            assert each.num_classes == 0, f'num_classes is {each.num_classes} when {how}.'
            assert out.shape == (2, each.head_hidden_size), f'the output is of shape {tuple(out.shape)} when {how}.'
            each.reset_classifier(3)
            assert each(x).shape == (2, 3), f'3 classes give {tuple(each(x).shape)} after it was {how}.'
            assert type(each.get_classifier()) is type(case.build().get_classifier()), f'another head after {how}.'


def takes_one_channel(case: ModelCase) -> None:
    """``in_chans=1`` gives a model of grey images."""
    model = case.build(in_chans=1)
    with torch.no_grad():
        logits = model(case.images(model)[:, :1])
    assert logits.shape == (2, 5), f'a grey image gives logits of shape {tuple(logits.shape)}.'


def tools_are_there(case: ModelCase) -> None:
    """group_matcher covers every parameter, no_weight_decay is a set of names, checkpointing changes no logits."""
    model = case.build()
    names = dict(model.named_parameters()).keys()
    for coarse in (False, True):
        layers = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        missing = sorted(names - layers.keys())
        assert not missing, f"group_matcher(coarse={coarse}) leaves out '{missing[0]}'." if missing else ''
        assert len(set(layers.values())) > 1, f'group_matcher(coarse={coarse}) puts everything into one layer.'
    keep = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    assert all(isinstance(name, str) for name in keep), f'no_weight_decay() must give names, it gives {keep!r}.'
    model.set_grad_checkpointing(False)
    x = case.images(model)
    expected = model(x)
    try:
        model.set_grad_checkpointing(True)
    except AssertionError:
        return  # timm's way to say that the architecture has none
    _assert_close(model(x), expected, 1e-5, 1e-5, 'logits with gradient checkpointing')


def copies_are_equal(case: ModelCase) -> None:
    """copy.deepcopy and pickle give a model with the same tensors and logits, whose classes can change."""
    model = case.build()
    x = case.images(model)
    with torch.no_grad():
        expected = model(x)
        for how, other in (('deepcopy', copy.deepcopy(model)), ('pickle', pickle.loads(pickle.dumps(model)))):
            _assert_close(other(x), expected, 0, 0, f'logits after {how}')
            other.reset_classifier(3)
            assert other(x).shape == (2, 3), f'after {how}, reset_classifier(3) gives {tuple(other(x).shape)}.'
        _assert_close(model(x), expected, 0, 0, 'logits after its copies were changed')


def saved_is_equal(case: ModelCase) -> None:
    """Saved as the Hub wants it (safetensors and config.json), ``local-dir:`` gives back the same model."""
    model = case.build()
    x = case.images(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        other = models.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert type(other) is type(model), f'it comes back as {type(other).__name__}, not {type(model).__name__}.'
        differs = _equal_state(model.state_dict(), other.state_dict())
        assert not differs, f"the tensor '{differs}' does not come back as it was saved."
        _assert_close(other(x), model(x), 1e-6, 1e-6, 'logits of the loaded model')


def gradients_reach_all(case: ModelCase) -> None:
    """Every parameter that asks for a gradient gets a finite one, and nothing fixed is among the parameters."""
    model = case.build().train()
    model(case.images(model, batch=4)).logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient reaches '{name}'."
            assert parameter.grad.isfinite().all(), f"the gradient on '{name}' is not finite."


def scripted_is_equal(case: ModelCase) -> None:
    """torch.jit.script of the model gives the same logits."""
    model = case.build(scriptable=True)
    x = case.images(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # recent versions of torch deprecate torch.jit
        scripted = torch.jit.script(model)
        _assert_close(scripted(x), model(x), 1e-4, 1e-5, 'logits of the scripted model')


MODEL_CHECKS: tuple[Callable[[ModelCase], None], ...] = (
    cfg_is_complete,
    seam_holds,
    classes_can_change,
    takes_one_channel,
    tools_are_there,
    copies_are_equal,
    saved_is_equal,
    gradients_reach_all,
    scripted_is_equal,
)


def check_model(
    model_name: str,
    *,
    img_size: int | None = None,
    checks: Iterable[Callable[[ModelCase], None]] = MODEL_CHECKS,
    **model_kwargs: Any,
) -> None:
    """Run all checks of a model (``MODEL_CHECKS``), one after another: the contract of timm's models, and its tools.

    Args:
        model_name: a name that :func:`ccl_timm.create_model` knows.
        img_size: side of the test images, smaller than the model's own to save time; also given to the model where
            its architecture fixes it (vision transformers).
        checks: some of ``MODEL_CHECKS``, to leave others out.
        **model_kwargs: options of the model.

    Raises:
        AssertionError: names the model, the check, and the figures.

    Example::

        def test_my_model():
            check_model('my_model', img_size=64)
    """
    _run(f"model '{model_name}'", ModelCase(model_name, model_kwargs, img_size), checks)
