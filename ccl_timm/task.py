"""One trainable module of a model and a loss, in the form that timm's training scripts drive."""

from typing import Any

import torch
from timm.models import group_parameters
from timm.models._input import get_model_input_config
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ccl_timm.errors import UserError
from ccl_timm.heads import HEADS, HeadOutputs
from ccl_timm.losses import Loss, create_loss, loss_options

__all__ = ['LossTask', 'ModelWithLoss', 'create_task', 'fitting_loss', 'probe', 'read_head']


def create_task(
    model: nn.Module,
    loss: str | Loss,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verbose: bool = False,
    **loss_kwargs: Any,
) -> 'LossTask':
    """Join a model and a loss into one trainable module.

    Args:
        model: a timm model, ours or any other whose head gives what the loss reads.
        loss: a name for :func:`ccl_timm.create_loss`, or a loss.
        device: where the loss's own state lives; default the model's device.
        dtype: kept for timm's scripts; the loss computes in float32 whatever it is.
        verbose: log the choice.
        **loss_kwargs: options of a loss given by name. ``num_classes``, ``num_features`` and ``num_channels`` are
            filled in from the model where the loss takes them.

    A head that scales its logits gets the loss's ``scale``.

    Returns:
        A task: ``task(images, target)['loss'].backward()``; ``task.get_eval_model()`` is the bare model.

    Raises:
        UserError: the model lacks what the loss reads, or does not follow timm's seam of three calls.
    """
    return LossTask(model, loss, device=device, dtype=dtype, verbose=verbose, **loss_kwargs)


def read_head(classifier: nn.Module, pooled: Tensor) -> Any:
    """What a classifier computes from pooled features (N, D): a head's own outputs, or those of a linear layer."""
    if hasattr(classifier, 'outputs'):
        return classifier.outputs(pooled)
    if isinstance(classifier, nn.Conv2d):  # 1x1, in the place of a linear layer: DLA, DPN, ResNetV2
        weight = classifier.weight.flatten(1)
        return HeadOutputs(nn.functional.linear(pooled, weight, classifier.bias), pooled, weight=weight)
    return HeadOutputs(classifier(pooled), pooled, weight=getattr(classifier, 'weight', None))


def channels_first(model: nn.Module, feature_map: Tensor) -> Tensor:
    """What forward_features returns as (N, C, H, W), where it is a map; families such as Swin keep channels last."""
    channels_last = getattr(model, 'output_fmt', None) == 'NHWC' and feature_map.ndim == 4
    return feature_map.permute(0, 3, 1, 2) if channels_last else feature_map


@torch.no_grad()
def probe(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
    """Run one random image through the model in evaluation mode and return all that a loss could read, by name.

    Leaves the model and the random state as they were. On torch's meta device it takes no weights and tells shapes.

    Args:
        model: any of timm's or ours.
        input_size: channels, height and width of the image; default the model's own.

    Raises:
        UserError: ``model(x)`` is not one tensor equal to what timm's three calls (forward_features, forward_head with
            ``pre_logits=True``, get_classifier) give one after another.
    """
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    parameter = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []):
            x = torch.randn(1, *(input_size or get_model_input_config(model)['input_size'])).to(parameter)
            feature_map = model.forward_features(x)
            pooled = model.forward_head(feature_map, pre_logits=True)
            outputs = read_head(model.get_classifier(), pooled)
            same = parameter.is_meta or _same(model(x), outputs.logits)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever another's forward raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        on = f' on images of {"x".join(map(str, input_size))}' if input_size else ''
        raise UserError(
            f"'{name}' cannot be trained with these losses{on}: {reason}; use another architecture."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not same:
        raise UserError(
            f"'{name}' cannot be trained with these losses: its output is not get_classifier() of its pooled features "
            '(a model with several heads, for instance); use another architecture.'
        )
    found = {**outputs._asdict(), 'feature_map': channels_first(model, feature_map)}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _same(logits: Any, expected: Tensor) -> bool:
    return isinstance(logits, Tensor) and torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2)


def fitting_loss(model: nn.Module, name: str, available: dict[str, Tensor], **loss_kwargs: Any) -> Loss:
    """Build a loss by name for a model.

    Args:
        model: the loss's, named in errors.
        name: for :func:`ccl_timm.create_loss`.
        available: what :func:`probe` found; sizes that the loss takes are filled in from it.
        **loss_kwargs: the loss's options.

    Raises:
        UserError: the model lacks what the loss reads, or an option is wrong.
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


def _check_fit(model: nn.Module, loss: Loss, loss_name: str, available: dict[str, Tensor]) -> None:
    missing = [name for name in loss.reads if name not in available]
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    if 'feature_map' in loss.reads and available['feature_map'].ndim != 4:
        raise UserError(
            f"loss '{loss_name}' reads a feature map (N, C, H, W); that of {name} is "
            f'{tuple(available["feature_map"].shape)}: use a convolutional network.'
        )
    if not missing:
        return
    kind = type(model.get_classifier()).__name__
    kind = 'a linear classifier' if kind in ('Linear', 'NormLinear') else f'the head {kind}'
    backbone = next((name.removesuffix(f'_{head}') for head in HEADS if name.endswith(f'_{head}')), name)
    way_out = f'use {backbone}_{loss.head}' if loss.head else 'use a model whose head gives it out'
    raise UserError(f"loss '{loss_name}' reads {' and '.join(missing)}; {name} has {kind}: {way_out}.")


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, so that DDP, compile, the optimizer and EMA see both.

    ``forward(input, target)`` returns ``loss`` (scalar), ``output`` (logits (N, K)) and the detached named terms.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss
        self.reads_feature_map = 'feature_map' in loss.reads
        self.epoch = 0
        self.step = 0
        self.trained = False  # since the epoch began
        self.detects_epochs = True

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        feature_map = self.model.forward_features(input)
        pooled = self.model.forward_head(feature_map, pre_logits=True)
        outputs = read_head(self.model.get_classifier(), pooled)
        logits = outputs.logits
        if self.reads_feature_map:
            outputs = _WithFeatureMap(outputs, channels_first(self.model, feature_map))
        terms = self.loss.named_terms(outputs, target)
        loss = torch.stack(list(terms.values())).sum()
        result = {'loss': loss, 'output': logits}
        return result | {name: term.detach() for name, term in terms.items() if name not in result}

    def train(self, mode: bool = True) -> 'ModelWithLoss':
        """Set the mode; entering training after at least one training step begins the next epoch."""
        super().train(mode)
        if mode and self.trained and self.detects_epochs:
            self.begin_epoch(self.epoch + 1)
        return self

    def begin_epoch(self, epoch: int) -> None:
        """Tell the loss that an epoch (0-based) begins."""
        self.epoch, self.trained = epoch, False
        self.loss.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Tell the loss how many optimizer steps have been taken."""
        self.step = step
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


class _WithFeatureMap:
    """A head's outputs plus the feature map."""

    def __init__(self, outputs: Any, feature_map: Tensor):
        self.outputs = outputs
        self.feature_map = feature_map

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outputs, name)


class LossTask(TrainingTask):
    """timm's TrainingTask for a model and one of our losses. See :func:`create_task` for the arguments.

    Counts epochs and optimizer steps for losses with a schedule: epochs when a script puts the trainable module into
    training mode again, or as told by :meth:`set_epoch`; steps as :meth:`update_ema` is told them, which timm's
    scripts call after each, EMA or not, and by forward calls in a loop that does not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = False,
        **loss_kwargs: Any,
    ):
        device = next(model.parameters()).device if device is None else torch.device(device)
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        available = probe(model)
        if isinstance(loss, str):
            loss = fitting_loss(model, loss, available, **loss_kwargs)
        else:
            name = type(loss).__name__
            if loss_kwargs:
                raise UserError(f'{name} is built already: give its options {sorted(loss_kwargs)} to its constructor.')
            _check_fit(model, loss, name, available)
        scale = getattr(model.get_classifier(), 'scale', None)
        if isinstance(scale, Tensor) and hasattr(loss, 'scale'):
            scale.fill_(loss.scale)
        self.trainable_module = ModelWithLoss(model, loss.to(device))
        self._told_steps = False

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
        if bare.training:
            bare.trained = True
            if not self._told_steps:
                bare.set_step(bare.step + 1)
        return result

    def update_ema(self, step: int | None = None) -> None:
        """Update the EMA, if there is one; ``step`` counts the optimizer steps taken so far."""
        super().update_ema(step)
        if step is not None:
            self.tell_steps(step)

    def tell_steps(self, step: int = 0) -> None:
        """Tell that ``step`` optimizer steps have been taken, and that further ones will be told by update_ema."""
        self._told_steps = True
        self._bare().set_step(step)

    @torch.no_grad()
    def try_once(self, input_size: tuple[int, int, int], soft_classes: int = 0) -> None:
        """Evaluate model and loss on two random images of a size, so that what cannot work fails before training.

        With soft_classes, the targets are rows of so many probabilities, as Mixup makes them.
        """
        modes = [(module, module.training) for module in self.modules()]
        try:
            self.eval()
            with torch.random.fork_rng(devices=[self.device] if self.device.type == 'cuda' else []):
                images = torch.randn(2, *input_size).to(next(self.parameters()))
                target = torch.zeros(2, dtype=torch.long, device=images.device)
                self(images, nn.functional.one_hot(target, soft_classes).to(images) if soft_classes else target)
        finally:
            for module, training in modes:
                module.training = training

    def set_epoch(self, epoch: int) -> None:
        """Tell that an epoch (0-based) begins; from then on epochs are no longer detected."""
        bare = self._bare()
        bare.detects_epochs = False
        bare.begin_epoch(epoch)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'LossTask':
        """Wrap the trainable module in DistributedDataParallel, which takes no device ids on the CPU."""
        device_ids = None if self.device.type == 'cpu' else device_ids
        module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        self.trainable_module = module
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile model and loss for training, and the bare model for evaluation; returns the latter."""
        self.eval_model = torch.compile(self.trainable_module.model, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

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
        counters = {'epoch': bare.epoch, 'step': bare.step, 'trained': bare.trained}
        return {'loss': bare.loss.state_dict(), **counters}

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
        bare.epoch, bare.step = state.get('epoch', 0), state.get('step', 0)
        bare.trained = state.get('trained', False)
