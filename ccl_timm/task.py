"""One trainable module of a model and a loss, in the form that timm's training scripts drive."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from timm.models import get_model_input_config, group_parameters, is_model
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ccl_timm._compat import TimmModel
from ccl_timm.errors import UserError, reason
from ccl_timm.heads import CAMHead, HeadOutputs, list_heads
from ccl_timm.losses import Loss, create_loss, loss_options
from ccl_timm.losses.base import sum_terms
from ccl_timm.models.adapters import late_dropout

__all__ = ['LossTask', 'ModelWithLoss', 'create_task', 'create_loss_for', 'probe_outputs', 'read_head']


def create_task(
    model: TimmModel,
    loss: str | Loss,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verbose: bool = False,
    **loss_kwargs: Any,
) -> 'LossTask':
    """Join a model and a loss into one trainable module.

    Args:
        model: a timm model, ours or any other whose head gives what the loss requires.
        loss: a name for :func:`ccl_timm.create_loss`, or a loss.
        device: where the loss's own state lives; default the model's device.
        dtype: kept for timm's scripts; the loss computes in float32 whatever it is.
        verbose: log the choice.
        **loss_kwargs: options of a loss given by name. ``num_classes``, ``num_features`` and ``num_channels`` are
            filled in from the model where the loss takes them.

    The head ``cosine`` scales its logits by the loss's ``scale``, if it has one; ``pedcc`` keeps its own.

    Returns:
        A task: ``task(images, target)['loss'].backward()``; ``task.get_eval_model()`` is the bare model.

    Raises:
        UserError: the model lacks what the loss requires, or does not follow timm's seam of three calls.
    """
    return LossTask(model, loss, device=device, dtype=dtype, verbose=verbose, **loss_kwargs)


def read_head(classifier: Any, pooled: Tensor) -> Any:
    """What a classifier computes from pooled features (N, D): a head's own outputs, or those of a linear layer."""
    if hasattr(classifier, 'outputs'):
        return classifier.outputs(pooled)
    if isinstance(classifier, nn.Conv2d):  # 1x1, in the place of a linear layer: DLA, DPN, ResNetV2
        weight = classifier.weight.flatten(1)
        return HeadOutputs(nn.functional.linear(pooled, weight, classifier.bias), pooled, weight=weight)
    return HeadOutputs(classifier(pooled), pooled, weight=getattr(classifier, 'weight', None))


def channels_first(model: TimmModel, feature_map: Tensor) -> Tensor:
    """What forward_features returns as (N, C, H, W), where it is a map; families such as Swin keep channels last."""
    channels_last = getattr(model, 'output_fmt', None) == 'NHWC' and feature_map.ndim == 4
    return feature_map.permute(0, 3, 1, 2) if channels_last else feature_map


def _name_of(model: TimmModel) -> str:
    return getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__


def _require_timm_model(model: TimmModel, name: str) -> None:
    needed = ('forward_features', 'forward_head', 'get_classifier')
    missing = [method for method in needed if not hasattr(model, method)]
    if missing:
        raise UserError(
            f"'{name}' is no timm model: it has no {', '.join(missing)}. Use ccl_timm.create_model, or a head and a "
            f'loss without a task: head = ccl_timm.heads.{CAMHead.__name__}(num_features, num_classes), and '
            "ccl_timm.create_loss('cc')(head.outputs(pooled), target) in your own loop."
        )


@contextlib.contextmanager
def _trial(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; mode and random state are as before afterwards, and no module is told of a change."""
    modes = [(each, each.training) for each in module.modules()]
    device = next(module.parameters()).device
    try:
        for each, _ in modes:
            each.training = False
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            yield
    finally:
        for each, training in modes:
            each.training = training


@contextlib.contextmanager
def _noting_calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules within the model, with parameters of their own, that are called."""
    called: set[nn.Module] = set()
    parts = [each for each in model.modules() if not hasattr(each, 'forward_features')]  # not the model, wrapped or not
    own = [each for each in parts if any(True for _ in each.parameters(recurse=False))]
    hooks = [each.register_forward_hook(lambda module, *_: called.add(module)) for each in own]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def probe_outputs(model: TimmModel, input_size: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
    """Run one random image through the model in evaluation mode and return all that a loss could read, by name.

    Leaves the model and the random state as they were. On torch's meta device it needs no weights and gives the shapes.

    Args:
        model: any of timm's or ours.
        input_size: channels, height and width of the image; default the model's own.

    Raises:
        UserError: the model lacks one of timm's three calls (forward_features, forward_head with ``pre_logits=True``,
            get_classifier), or ``model(x)`` is not one tensor equal to what they give one after another.
    """
    name = _name_of(model)
    _require_timm_model(model, name)
    parameter = next(model.parameters())
    try:
        with _trial(model):
            x = torch.randn(1, *(input_size or get_model_input_config(model)['input_size'])).to(parameter)
            with _noting_calls(model) as ours:
                feature_map = model.forward_features(x)
                pooled = model.forward_head(feature_map, pre_logits=True)
                outputs = read_head(classifier := model.get_classifier(), pooled)
            with _noting_calls(model) as all_calls:
                # a new batch norm changes nothing yet: what is left out must be found by its calls
                same = parameter.is_meta or _same(model(x), outputs.logits)
            same &= all_calls <= {*ours, *classifier.modules()}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever another's forward raises
        on = f' on images of {"x".join(map(str, input_size))}' if input_size else ''
        raise UserError(
            f"'{name}' cannot be trained with these losses{on}: {reason(error)}; use another architecture."
        ) from error
    if not same and isinstance(outputs.logits, Tensor) and outputs.logits.isnan().any():
        raise UserError(f"'{name}' cannot be trained: its logits are NaN, perhaps from weights of a run that diverged.")
    if not same:
        raise UserError(
            f"'{name}' cannot be trained with these losses: its output is not get_classifier() of its pooled features "
            '(a model with several heads, for instance); use another architecture.'
        )
    found = {**outputs._asdict(), 'feature_map': channels_first(model, feature_map)}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _same(logits: Any, expected: Tensor) -> bool:
    return isinstance(logits, Tensor) and torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2)


def create_loss_for(model: TimmModel, name: str, available: dict[str, Tensor], **loss_kwargs: Any) -> Loss:
    """Build a loss by name for a model.

    Args:
        model: the loss's, named in errors.
        name: for :func:`ccl_timm.create_loss`.
        available: what :func:`probe_outputs` found; sizes that the loss takes are filled in from it.
        **loss_kwargs: the loss's options.

    Raises:
        UserError: the model lacks what the loss requires, or an option is wrong.
    """
    facts = {key: value for key, value in _facts(available).items() if key in loss_options(name)}
    loss = create_loss(name, **{**facts, **loss_kwargs})
    _check_fit(model, loss, name, available)
    return loss


def _facts(available: dict[str, Tensor]) -> dict[str, int]:
    feature_map = available['feature_map']
    return {
        'num_classes': available['logits'].shape[1],
        'num_features': available['features'].shape[1],
        'num_channels': feature_map.shape[1 if feature_map.ndim == 4 else -1],
    }


def _check_fit(model: TimmModel, loss: Loss, loss_name: str, available: dict[str, Tensor]) -> None:
    missing = [name for name in loss.requires if name not in available]
    name = _name_of(model)
    if 'feature_map' in loss.requires and available['feature_map'].ndim != 4:
        raise UserError(
            f"loss '{loss_name}' requires a feature map (N, C, H, W); that of {name} is "
            f'{tuple(available["feature_map"].shape)}: use a convolutional network.'
        )
    if not missing:
        for key, value in _facts(available).items():
            if (given := getattr(loss, key, value)) != value:
                raise UserError(f"loss '{loss_name}' was built with {key}={given}; {name} has {value}.")
        return
    if not model.num_classes:
        raise UserError(
            f"loss '{loss_name}' requires {' and '.join(missing)}; {name} has no classes: give num_classes."
        )
    kind = type(model.get_classifier()).__name__
    kind = 'a linear classifier' if kind in ('Linear', 'NormLinear') else f'the head {kind}'
    backbone = next((name.removesuffix(f'_{head}') for head in list_heads() if name.endswith(f'_{head}')), name)
    fits = loss.head in list_heads() and is_model(backbone)  # a plug-in's loss may name a head of its own models only
    remedy = f'use {backbone}_{loss.head}' if fits else 'use a model whose head outputs it'
    raise UserError(f"loss '{loss_name}' requires {' and '.join(missing)}; {name} has {kind}: {remedy}.")


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, so that DDP, compile, the optimizer and EMA see both.

    ``forward(input, target)`` returns ``loss`` (scalar), ``output`` (logits (N, K)) and the detached named terms.

    Buffers, int64 scalars, so that every trainer saves them and torch.compile traces them: ``epoch`` (0-based),
    ``batches`` trained in it so far, ``step``, optimizer steps taken.
    """

    loss: Loss
    epoch: Tensor
    batches: Tensor
    step: Tensor

    def __init__(self, model: TimmModel, loss: Loss):
        super().__init__()
        self.model: TimmModel = model
        self.loss = loss
        self.requires_feature_map = 'feature_map' in loss.requires
        self.takes_features = False
        self.feature_drop_rate = 0.0
        device = next(model.parameters()).device
        for name in _COUNTERS:
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self.register_load_state_dict_pre_hook(_keep_missing_counters)
        self.detects_epochs = True
        self.min_batches = 2  # of an epoch that train() ends: some trainers call it in every step
        self._mode: bool | None = None  # that train() was last called with

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.takes_features:
            pooled = nn.functional.dropout(input, self.feature_drop_rate, self.training)
        else:
            feature_map = self.model.forward_features(input)
            pooled = self.model.forward_head(feature_map, pre_logits=True)
            pooled = late_dropout(self.model, pooled)
        outputs = read_head(self.model.get_classifier(), pooled)
        logits = outputs.logits
        if self.requires_feature_map:
            outputs = outputs._replace(feature_map=channels_first(self.model, feature_map))
        terms = self.loss.loss_dict(outputs, target)
        result = {'loss': sum_terms(terms), 'output': logits}
        return result | {name: term.detach() for name, term in terms.items() if name not in result}

    def train(self, mode: bool = True) -> 'ModelWithLoss':
        """Set the mode; entering training after an epoch's batches begins the next epoch, see :class:`LossTask`."""
        super().train(mode)
        self._mode = mode
        if mode and self.detects_epochs and (batches := int(self.batches)):
            if batches >= self.min_batches:
                self.begin_epoch(int(self.epoch) + 1)
            else:
                self._stop_detecting('train() was called after a single batch')
        return self

    def count_batch(self, count_step: bool) -> None:
        """A batch has been trained, and so, with ``count_step``, an optimizer step."""
        self.batches += 1
        if count_step:
            self.set_step(self.step + 1)
        if self.detects_epochs and self._mode is not True and not torch.compiler.is_compiling():
            self._stop_detecting('batches are trained though train() was not called before')

    def _stop_detecting(self, why: str) -> None:
        self.detects_epochs = False
        if self.loss.needs_epochs:
            warnings.warn(
                f'{type(self.loss).__name__} depends on the epoch, and this training loop does not announce epochs '
                f'({why}): call task.set_epoch(epoch) at the start of each, or add the callback for your trainer from '
                'ccl_timm.integrations. Until then the loss stays in this epoch.',
                stacklevel=3,
            )

    def begin_epoch(self, epoch: int) -> None:
        """Tell the loss that an epoch (0-based) begins."""
        self.epoch.fill_(epoch)
        self.batches.zero_()
        self.loss.set_epoch(epoch)

    def set_step(self, step: int | Tensor) -> None:
        """Tell the loss how many optimizer steps have been taken."""
        self.step.fill_(step)
        self.loss.set_step(step)

    def no_weight_decay(self) -> set[str]:
        """The model's parameters without weight decay."""
        names = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else set()
        return {f'model.{name}' for name in names}

    def group_matcher(self, coarse: bool = False):
        """The model's layer groups for layer-wise learning rates; the loss's parameters go with the last."""
        if not hasattr(self.model, 'group_matcher'):
            return {}
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('model.'), last)


_COUNTERS = ('epoch', 'batches', 'step')


def _keep_missing_counters(module: ModelWithLoss, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """State dicts of older versions have no counters."""
    for name in _COUNTERS:
        state_dict.setdefault(f'{prefix}{name}', getattr(module, name))


class LossTask(TrainingTask):
    """timm's TrainingTask for a model and one of our losses. See :func:`create_task` for the arguments.

    Counts epochs and optimizer steps for losses with a schedule, in buffers that ``state_dict`` holds.

    Epochs are those of :meth:`set_epoch`. Without it, one begins when ``train()`` is called, as timm's scripts do,
    after two training batches or more. Where ``train()`` is called at every step (Hugging Face's Trainer) or never
    (Lightning), epochs are not counted, and a loss that depends on them warns once. A loop that calls ``train()`` only
    once, which nothing tells from a long first epoch, or within an epoch, after evaluation, must call
    :meth:`set_epoch`.

    Steps are those of :meth:`update_ema`, which timm's scripts call after each optimizer step, EMA or not, or
    of :meth:`set_num_updates`. Without either, each training batch is one: where gradients accumulate, call one of them
    after each optimizer step, and ``set_num_updates(steps)`` before the first batch, also of a resumed training.

    ``ccl_timm.integrations`` has callbacks that do both for Hugging Face's Trainer and for Lightning.
    """

    def __init__(
        self,
        model: TimmModel,
        loss: str | Loss,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = False,
        **loss_kwargs: Any,
    ):
        device = next(model.parameters()).device if device is None else torch.device(device)
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        available = probe_outputs(model)
        if not model.num_classes:
            raise UserError(f'{_name_of(model)} has no classes: give num_classes.')
        if isinstance(loss, str):
            loss = create_loss_for(model, loss, available, **loss_kwargs)
        else:
            name = type(loss).__name__
            if not isinstance(loss, Loss):
                raise UserError(
                    f'{loss!r} is none of our losses: give a name, or an object of a subclass of ccl_timm.Loss; '
                    'a criterion of logits and targets becomes one by ccl_timm.losses.LogitsLoss(criterion).'
                )
            if loss_kwargs:
                raise UserError(f'{name} is built already: give its options {sorted(loss_kwargs)} to its constructor.')
            _check_fit(model, loss, name, available)
        scale, loss_scale = getattr(model.get_classifier(), 'scale', None), getattr(loss, 'scale', None)
        if isinstance(scale, Tensor) and loss_scale is not None:
            scale.fill_(loss_scale)
        if caution := loss.caution(available['logits'].shape[1]):
            warnings.warn(f'{type(loss).__name__}: {caution}', stacklevel=2)
        self.trainable_module: Any = ModelWithLoss(model, loss.to(device))  # or what wraps it: DDP, compiled
        self._counts_updates = False

    @property
    def loss(self) -> Loss:
        """The loss, whatever wraps the trainable module."""
        return self._bare().loss

    def _bare(self, module: nn.Module | None = None, ema: bool = False) -> ModelWithLoss:
        return unwrap_model(module if module is not None else self.get_trainable_module(ema=ema))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Forward pass and loss.

        Args:
            input: images (N, C, H, W).
            target: (N,) class indices, or (N, K) probabilities for a loss with soft targets.

        Returns:
            ``loss`` (scalar, with gradient), ``output`` (logits (N, K)), and each named term of the loss, detached.
        """
        result = self.trainable_module(input, target)
        bare = self._bare()
        if bare.training and torch.is_grad_enabled():
            bare.count_batch(count_step=not self._counts_updates)
        return result

    def update_ema(self, step: int | None = None) -> None:
        """Update the EMA, if there is one; ``step`` counts the optimizer steps taken so far."""
        super().update_ema(step)
        if step is not None:
            self.set_num_updates(step)

    def set_num_updates(self, step: int = 0) -> None:
        """Set the number of optimizer steps taken; update_ema will set it from now on."""
        self._counts_updates = True
        self._bare().set_step(step)

    def follow_timm_script(self) -> None:
        """Rely on what timm's scripts do: ``train()`` once an epoch, however short, and update_ema after each step."""
        self._counts_updates = True
        self._bare().min_batches = 1

    def no_weight_decay(self) -> set[str]:
        """The model's parameters without weight decay, by their names in the task."""
        return {self._prefix() + name for name in self._bare().no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], Any] | dict[str, Any]:
        """The model's layer groups, for parameters by their names in the task."""
        matcher, prefix = self._bare().group_matcher(coarse), self._prefix()
        return (lambda name: matcher(name.removeprefix(prefix))) if callable(matcher) else matcher

    def _prefix(self) -> str:
        bare = self._bare()
        return next(name for name, module in self.named_modules() if module is bare) + '.'

    @torch.no_grad()
    def dry_run_forward(self, input_size: tuple[int, int, int], soft_classes: int = 0) -> None:
        """Evaluate model and loss on two random images of a size, so that what cannot work fails before training.

        With soft_classes, the targets are rows of this many probabilities, as Mixup makes them.
        """
        with _trial(self):
            images = torch.randn(2, *input_size).to(next(self.parameters()))
            target = torch.zeros(2, dtype=torch.long, device=images.device)
            self(images, nn.functional.one_hot(target, soft_classes).to(images) if soft_classes else target)

    def train_on_features(self, drop_rate: float = 0.0) -> None:
        """From now on inputs are what the model's head reads, (N, D) as in evaluation, and not images.

        Args:
            drop_rate: of the dropout before the head in training; families keep their own in several places.

        Raises:
            UserError: the loss requires the feature map, which is pooled by then.
        """
        if self._bare().requires_feature_map:
            raise UserError(
                f'{type(self.loss).__name__} requires the feature map, which pooled features no longer have.'
            )
        self._bare().takes_features, self._bare().feature_drop_rate = True, drop_rate

    def set_epoch(self, epoch: int) -> None:
        """Tell that an epoch (0-based) begins; from then on epochs are no longer detected.

        In an epoch that has begun already, as after a resumption within it, this changes nothing.
        """
        bare = self._bare()
        bare.detects_epochs = False
        if bare.epoch != epoch or bare.batches == 0:
            bare.begin_epoch(epoch)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'LossTask':
        """Wrap the trainable module in DistributedDataParallel, which takes no device ids on the CPU."""
        device_ids = None if self.device.type == 'cpu' else device_ids
        module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        self.trainable_module = module
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:  # type: ignore[override]  # as timm has it
        """Compile model and loss for training, and the bare model for evaluation; returns the latter."""
        self.eval_model = torch.compile(self.trainable_module.model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return cast(nn.Module, self.eval_model)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the bare model: what is validated, saved and exported."""
        module = super().get_eval_model(module=module, ema=ema)
        bare = unwrap_model(module) if module is not None else None
        return bare.model if isinstance(bare, ModelWithLoss) else module

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters for gradient clipping; adaptive clipping leaves out the classifier."""
        bare = self._bare()
        head = {id(p) for p in bare.model.get_classifier().parameters()} if exclude_head else set()
        return [p for p in bare.parameters() if id(p) not in head]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """State outside the model: the loss's tensors and the counters."""
        if module is None and self.get_trainable_module(ema=ema) is None:
            return {}
        bare = self._bare(module, ema)
        return {'loss': bare.loss.state_dict(), **{name: int(getattr(bare, name)) for name in _COUNTERS}}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore what :meth:`get_task_state` returned; None (a checkpoint without it) changes nothing."""
        if not state:
            return
        bare = self._bare(module, ema)
        bare.loss.load_state_dict(state.get('loss', {}), strict=strict)
        older = {'batches': bare.min_batches * state.get('trained', False)}
        for name in _COUNTERS:
            getattr(bare, name).fill_({**older, **state}.get(name, 0))
