"""The checks that every loss passes."""

import copy
import inspect
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from ccl_timm import models
from ccl_timm._compat import TimmModel
from ccl_timm.errors import UserError
from ccl_timm.heads import HeadOutputs, list_heads
from ccl_timm.losses import Loss, create_loss, loss_class, loss_options
from ccl_timm.task import create_task
from ccl_timm.testing.common import SEED, assert_close, assert_finite, different_state, run_checks, state_of
from ccl_timm.testing.inputs import BY_CLASS, derive, make_outputs, make_target

__all__ = ['LOSS_CHECKS', 'LossCase', 'check_loss', 'try_loss']


@dataclass
class LossCase:
    """A loss under test, and how to make it and its inputs. See :func:`check_loss` for the fields."""

    loss: str | Callable[..., Loss]
    options: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Tensor] | None = None
    outputs: Callable[..., dict[str, Tensor]] | None = None
    prepare: Callable[[Loss], Any] | None = None
    model: Any = None
    backend: str = 'aot_eager_decomp_partition'

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, '__name__', str(self.loss))

    def build(
        self, dtype: torch.dtype = torch.float32, num_classes: int = 5, num_features: int = 6, seed: int = SEED
    ) -> Loss:
        """Make the loss in training mode, its state in ``dtype``; fills in what a task would fill in."""
        known = loss_options(self.loss) if isinstance(self.loss, str) else inspect.signature(self.loss).parameters
        facts = {'num_classes': num_classes, 'num_features': num_features, 'num_channels': 3 * num_classes}
        options = {**{key: value for key, value in facts.items() if key in known}, **self.options}
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
        required = self.build(num_classes=num_classes, num_features=num_features).requires
        kwargs.setdefault('num_channels', self.options.get('num_channels'))
        return make_outputs(required, batch, num_classes, num_features, own=self.outputs, **kwargs)


def _value_and_gradients(
    loss: Callable, outputs: Any, target: Tensor, leaves: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar and its gradient at the leaves (zeros where none arrives), always with the same random numbers."""
    if hasattr(outputs, 'drawn'):  # a graph of its own for each call: a loss that holds on to one is found out
        outputs = derive(outputs.drawn, outputs.requires, outputs.own)
    torch.manual_seed(SEED)
    value = loss(outputs, target)
    assert value.ndim == 0, f'the loss is of shape {tuple(value.shape)}, not a scalar.'
    assert value.requires_grad, 'the loss has no gradient at all.'
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if leaves else ()
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return value.detach(), gradients


def facts_are_declared(case: LossCase) -> None:
    """``requires``, ``head``, ``soft_targets``, ``uses_batch_statistics`` are there, of the right type, and known."""
    loss = case.build()
    required = loss.requires
    assert isinstance(required, tuple) and required and all(isinstance(name, str) for name in required), (
        f'requires must be a tuple of names, it is {required!r}.'
    )
    assert loss.head is None or isinstance(loss.head, str), f'head must be a name or None, it is {loss.head!r}.'
    if case.model is None and case.outputs is None:
        assert loss.head in (None, *list_heads()), (
            f"head '{loss.head}' is none of {', '.join(list_heads())}: give a model= that has it."
        )
    for name in ('soft_targets', 'uses_batch_statistics'):
        assert isinstance(getattr(loss, name), bool), f'{name} must be True or False, it is {getattr(loss, name)!r}.'
    cls = case.loss if callable(case.loss) else loss_class(case.loss)
    if getattr(cls, '__init__', None) is nn.Module.__init__:
        return  # no options of its own: the signature is that of torch
    loose = [p.name for p in inspect.signature(cls).parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert not loose, f'its options must be explicit, it takes *{loose[0]}.' if loose else ''


def search_space_can_be_tried(case: LossCase) -> None:
    """``search_space`` names options of the loss, and both ends of each range are values that it takes."""
    for name, (low, high, log) in case.build().search_space.items():
        assert low < high and (low > 0 or not log), f"the range of '{name}' in search_space is {low} to {high}."
        for value in (low, high):
            try:
                LossCase(case.loss, {**case.options, name: value}).build()
            except (TypeError, UserError) as error:
                raise AssertionError(f"search_space has '{name}' from {low} to {high}, and {value}: {error}") from error


def reads_what_it_declares(case: LossCase) -> None:
    """Nothing beside ``requires`` is taken from the outputs, and each of ``requires`` makes a difference."""
    outputs, target = case.example(), make_target()
    loss = case.build(torch.float64)
    only = SimpleNamespace(**{name: getattr(outputs, name).detach() for name in loss.requires})
    seen = []
    for step in (0, 1):  # a loss that alternates may read one tensor at even steps only
        loss.set_step(step)
        for name in (None, *loss.requires):
            trial, other = copy.deepcopy(loss), copy.copy(only)
            if name:
                read = getattr(only, name)  # no common factor: many losses do not see the scale
                setattr(other, name, read * torch.linspace(0.5, 0.9, read.numel()).view_as(read))
            torch.manual_seed(SEED)
            value = trial(other, target)
            if name is None:
                base, base_state = value, state_of(trial)
            elif not torch.allclose(value, base, rtol=1e-9, atol=0) or different_state(state_of(trial), base_state):
                seen.append(name)
    unused = [name for name in loss.requires if name not in seen]
    assert not unused, f"requires names '{unused[0]}', but neither value nor state changes with it."


def batch_statistics_are_declared(case: LossCase) -> None:
    """``uses_batch_statistics`` is True exactly if the loss is no sum over samples: then two samples interact."""
    loss = case.build(torch.float64)
    first, second = case.example(seed=0), case.example(seed=1)
    targets = make_target(seed=0), make_target(seed=1)
    targets = targets[0], targets[1].roll(1)
    names = [name for name in loss.requires if name not in BY_CLASS and len(getattr(first, name)) == 8]

    def value(head: int, rest: int) -> Tensor:
        """Sample 0 of one draw, all others of one draw, the class vectors always of the first."""
        mixed = {name: getattr(first, name).detach() for name in loss.requires}
        for name in names:
            halves = [getattr((first, second)[i], name).detach() for i in (head, rest)]
            mixed[name] = torch.cat([halves[0][:1], halves[1][1:]])
        target = torch.cat([targets[head][:1], targets[rest][1:]])
        torch.manual_seed(SEED)
        return copy.deepcopy(loss)(SimpleNamespace(**mixed), target).detach()

    # of a sum over samples the mixed second difference is zero
    values = value(0, 0), value(0, 1), value(1, 0), value(1, 1)
    mixed = (values[0] - values[1] - values[2] + values[3]).abs().item()
    scale = max(v.abs().item() for v in values)
    interacts = mixed > 1e-9 * max(scale, 1e-3)
    assert interacts == loss.uses_batch_statistics, (
        f'uses_batch_statistics is {loss.uses_batch_statistics}, but samples {"do" if interacts else "do not"} '
        f'interact: the mixed second difference is {mixed:.3g} at values of {scale:.3g}.'
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
    assert_finite(*soft, 'mixed targets')
    if case.options.get('smoothing'):
        return  # probabilities are taken as they are: smoothed already
    soft = _value_and_gradients(case.build(torch.float64), outputs, one_hot, outputs.leaves)
    assert_close(soft[0], hard[0], 1e-10, 1e-12, 'value with one-hot probabilities in place of indices')
    for name, gradient in soft[1].items():
        assert_close(gradient, hard[1][name], 1e-9, 1e-11, f'gradient on {name} with one-hot probabilities')


def terms_add_up(case: LossCase) -> None:
    """The named terms are scalars whose sum is the loss; a 32-bit or 8-bit integer target is as good as int64."""
    outputs, target = case.example(), make_target()
    torch.manual_seed(SEED)
    terms = case.build(torch.float64).loss_dict(outputs, target)
    assert isinstance(terms, dict) and terms, f'loss_dict must return a dict of terms, it returned {terms!r}.'
    for name, term in terms.items():
        assert term.ndim == 0, f"the term '{name}' is of shape {tuple(term.shape)}, not a scalar."
    for dtype in (torch.int64, torch.int32, torch.uint8):
        value, _ = _value_and_gradients(case.build(torch.float64), outputs, target.to(dtype), {})
        total = sum(terms.values(), torch.zeros((), dtype=torch.float64))
        assert_close(value, total, 1e-12, 1e-14, f'loss against the sum of its terms ({dtype} target)')


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
        assert_close(value, expected, 1e-10, 1e-13, f'value {where}')
        for name, gradient in gradients.items():
            assert_close(gradient, wanted[name], 1e-8, 1e-10, f'gradient on {name} {where}')


def gradient_is_the_derivative(case: LossCase) -> None:
    """torch's gradcheck in float64: the gradient is that of the value, with nothing detached, and differentiable."""
    outputs = case.example(4, 3, 4)
    loss, target = case.build(torch.float64, 3, 4), make_target(4, 3)
    names = tuple(outputs.leaves)

    def function(*leaves: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        drawn = {**outputs.drawn, **dict(zip(names, leaves, strict=True))}
        return copy.deepcopy(loss)(derive(drawn, loss.requires, outputs.own), target)

    for step in (0, 1):
        loss.set_step(step)
        leaves = tuple(outputs.leaves.values())
        try:
            # a feature map has hundreds of entries: random directions then, in place of each entry
            fast_mode = sum(leaf.numel() for leaf in leaves) > 200
            gradcheck(function, leaves, fast_mode=fast_mode)
            gradgradcheck(function, leaves, fast_mode=fast_mode)
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
        read = {name: getattr(case.example(dtype=torch.float32), name).detach().to(dtype) for name in loss.requires}
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
            assert_finite(value, gradients, where)
            assert_close(value, expected, 1e-4, 1e-5, f'value {where}')
            for name, gradient in gradients.items():
                tolerance = 0.01 * wanted[name].abs().max().item() + 1e-6
                assert_close(gradient, wanted[name], 0.02, tolerance, f'gradient on {name} {where}')


def compiled_is_equal(case: LossCase) -> None:
    """torch.compile changes neither value, nor gradient, nor state, over three steps."""
    import torch._inductor.config as inductor  # takes a second to import: not for the checks that do without

    torch._dynamo.reset()
    eager = case.build()
    compiled: Any = torch.compile(copy.deepcopy(eager), backend=case.backend)
    with inductor.patch(fallback_random=True):
        for step in range(3):
            outputs, target = case.example(dtype=torch.float32, seed=step), make_target(seed=step)
            for loss in (eager, compiled):
                loss.set_step(step)
            value, gradients = _value_and_gradients(eager, outputs, target, outputs.leaves)
            again, others = _value_and_gradients(compiled, outputs, target, outputs.leaves)
            assert_close(again, value, 1e-5, 1e-6, f'compiled value at step {step}')
            for name, gradient in others.items():
                assert_close(gradient, gradients[name], 1e-4, 1e-6, f'compiled gradient on {name} at step {step}')
    for (name, tensor), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        assert_close(other, tensor, 1e-5, 1e-6, f"compiled state '{name}'")


def _repeat_first(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(BY_CLASS):
        drawn[name][:] = drawn[name][:1].clone()


def _zero(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(BY_CLASS):
        drawn[name].zero_()


def _extreme(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(BY_CLASS):
        drawn[name].copy_(1e4 * (drawn[name].sign()))


def _tiny(drawn: dict[str, Tensor]) -> None:
    for name in drawn.keys() - set(BY_CLASS):
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
                    assert_finite(*found, f'{where}, {dtype}, step {step}')
    _exact_cosines_are_finite(case)


def _exact_cosines_are_finite(case: LossCase) -> None:
    """Cosines that are 1 or -1 to the last bit, or one rounding beyond, as a product of unit vectors gives them."""
    if 'cosine' not in case.build().requires:
        return
    step = torch.finfo(torch.float32).eps
    for cosine in (1.0, -1.0, 1 + step, -1 - step, 1 - step, step - 1):
        loss, target = case.build(), make_target()
        outputs = case.example(dtype=torch.float32)
        read = {name: getattr(outputs, name).detach() for name in loss.requires}
        read['cosine'] = torch.full_like(read['cosine'], cosine).requires_grad_()
        found = _value_and_gradients(loss, SimpleNamespace(**read), target, {'cosine': read['cosine']})
        assert_finite(*found, f'all cosines {cosine!r}')


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
    other = case.build(torch.float64, seed=SEED + 1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in (2, 3):
        outputs, target = case.example(seed=step), make_target(seed=step)
        value, _ = _value_and_gradients(loss, outputs, target, outputs.leaves)
        again, _ = _value_and_gradients(other, outputs, target, outputs.leaves)
        assert_close(again, value, 0, 0, 'value after loading the saved state')
        differs = different_state(state_of(loss), state_of(other))
        assert not differs, f"the state '{differs}' differs after loading the saved state and one more step."
        for each in (loss, other):  # an epoch closes what was gathered in it
            each.set_epoch(step)


def seed_decides(case: LossCase) -> None:
    """Two losses of one seed agree in state, value and gradient."""
    outputs, target = case.example(), make_target()
    first, second = case.build(torch.float64), case.build(torch.float64)
    differs = different_state(state_of(first), state_of(second))
    assert not differs, f"the state '{differs}' of a new loss differs between two of the same seed."
    value, gradients = _value_and_gradients(first, outputs, target, outputs.leaves)
    again, others = _value_and_gradients(second, outputs, target, outputs.leaves)
    assert_close(again, value, 0, 0, 'value of two losses of the same seed')
    for name, gradient in others.items():
        assert_close(gradient, gradients[name], 0, 0, f'gradient on {name} of two losses of the same seed')


def evaluation_keeps_state(case: LossCase) -> None:
    """A forward pass in evaluation mode or without gradient changes no state; evaluation draws no random numbers."""
    loss, target = case.build(), make_target()
    outputs = case.example(dtype=torch.float32)
    before = state_of(loss)
    loss.eval()
    values = []
    for seed in range(8):
        torch.manual_seed(seed)
        values.append(loss(outputs, target).detach())
    differs = different_state(before, state_of(loss))
    assert not differs, f"a forward pass in evaluation mode changes the state '{differs}'."
    assert len(torch.stack(values).unique()) == 1, 'in evaluation mode the value depends on random numbers.'
    loss.train()
    with torch.no_grad():
        loss(outputs, target)
    differs = different_state(before, state_of(loss))
    assert not differs, f"a forward pass without gradient changes the state '{differs}'."


def trains_in_a_task(case: LossCase) -> None:
    """In a task on a small model with the head that it names, the loss of one fixed batch falls within 16 steps."""
    if case.model is None and case.outputs is not None:
        return  # tensors of a head that only the plugin knows, and no model with it was given
    torch.manual_seed(SEED)
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
        assert_close(result['loss'], sum(terms), 1e-4, 1e-5, "the task's loss against the sum of its terms")
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


def _small_model(case: LossCase) -> TimmModel:
    if isinstance(case.model, nn.Module):
        return copy.deepcopy(case.model)
    head, name = case.build().head, case.model
    if name is None and head:
        models.register_variant('test_resnet', head)
        name = f'test_resnet_{head}'
    return models.create_model(name or 'test_resnet', num_classes=5)


def _input_size(model: TimmModel) -> tuple[int, int, int]:
    cfg = model.pretrained_cfg
    channels, *size = cfg['input_size']
    # 96 px leave a map of 3 x 3 after five halvings
    return (channels, *size) if cfg.get('fixed_input_size') else (channels, *(min(96, s) for s in size))


def _width(model: TimmModel) -> int:
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
    search_space_can_be_tried,
)


def check_loss(
    loss: str | Callable[..., Loss],
    reference: Callable[..., Tensor] | None = None,
    *,
    outputs: Callable[..., dict[str, Tensor]] | None = None,
    prepare: Callable[[Loss], Any] | None = None,
    model: Any = None,
    backend: str = 'aot_eager_decomp_partition',
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
            required and that no head of ours outputs.
        prepare: called with every new loss, for instance to set its step.
        model: a name for :func:`ccl_timm.create_model`, or a model with 5 classes, to train on; a small ResNet with
            the head that the loss names by default. Without one, a loss with ``outputs`` is not trained.
        backend: of torch.compile. The default divides the graph as ``'inductor'`` does, which needs a C++ compiler
            and takes longer; with it, a state that is overwritten in place can spoil the gradient.
        checks: some of ``LOSS_CHECKS``, to leave others out.
        **loss_kwargs: options of the loss; ``num_classes`` (5 in most checks), ``num_features`` (6) and
            ``num_channels`` (three a class) are filled in where it takes them.

    Raises:
        AssertionError: names the loss, the check, and the values.

    Example::

        def test_my_loss():
            check_loss('my_loss', my_reference, margin=0.2)
    """
    case = LossCase(loss, loss_kwargs, reference, outputs, prepare, model, backend)
    run_checks(f"loss '{case.name}'", case, checks)


def try_loss(name: str) -> None:
    """Build a loss by name with its defaults, and compute it on random tensors if heads of ours give what it reads.

    What ``ccl-timm plugins --check`` asks of every plug-in's loss; :func:`check_loss` asks for much more.

    Raises:
        UserError: it cannot be built.
        AssertionError: a term is not a finite scalar.
    """
    case = LossCase(name)
    loss = case.build()
    if not {*loss.requires} <= {*HeadOutputs._fields, 'feature_map'}:
        return
    for term, value in loss.loss_dict(case.example(dtype=torch.float32), make_target()).items():
        assert value.ndim == 0 and value.isfinite(), f"its term '{term}' is {value.detach()}, not a finite scalar"
