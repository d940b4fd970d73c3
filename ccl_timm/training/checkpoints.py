"""Models as training left them: built from a run's settings, loaded from its checkpoints or from an exported folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.models
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from ccl_timm import models
from ccl_timm.data.files import color_mode
from ccl_timm.data.loaders import resolve_preprocessing
from ccl_timm.errors import LIBRARY_ERRORS, UserError, user_errors
from ccl_timm.models import weights
from ccl_timm.training.checkpoint_files import check_intact, read_checkpoint
from ccl_timm.training.run_dir import RunDir, check_calibration

__all__ = ['Trained', 'build_model', 'check_outputs', 'load_trained']


@dataclass
class Trained:
    """A trained model with what its use needs.

    Attributes:
        name: architecture.
        model: in evaluation mode, on the CPU.
        data_config: ``input_size``, ``mean``, ``std``, ``crop_pct``, ``interpolation`` as trained.
        class_names: in the order of the logits; None if unknown.
        settings: those of the run; of an export only the ``input_img_mode``, where it has one.
        epoch: of the checkpoint, counted from 0; None for an export.
        ema: whether these are the moving average of the weights.
        calibration: a ``temperature``, and the ``data``, ``split``, number of ``images`` and their ``fingerprint`` that
            it was fitted on; None if none was.
        fingerprint: of the data that a share was held out of; empty if none was.
    """

    name: str
    model: nn.Module
    data_config: dict[str, Any]
    class_names: list[str] | None
    settings: dict[str, Any]
    epoch: int | None = None
    ema: bool = False
    calibration: dict[str, Any] | None = None
    fingerprint: str = ''

    @property
    def image_mode(self) -> str:
        """Pillow's mode of the images that it takes."""
        return self.settings.get('input_img_mode') or color_mode(self.data_config['input_size'][0])

    @property
    def labels(self) -> list[str]:
        """A name for each logit: that of the class, or the number of one that has none."""
        names = self.class_names or []
        return [*names, *map(str, range(len(names), self.model.num_classes))]


def build_model(settings: dict[str, Any], **kwargs: Any) -> nn.Module:
    """Build the model that a training script's settings name.

    Args:
        settings: the script's settings, by name.
        **kwargs: further arguments of timm's ``create_model``; they come before the settings.

    Raises:
        UserError: no such model, or one that does not take an option.
    """
    name = settings['model']
    options = {
        'num_classes': settings.get('num_classes'),
        'drop_rate': settings.get('drop', 0.0),
        'drop_path_rate': settings.get('drop_path'),
        'global_pool': settings.get('gp'),
        'bn_momentum': settings.get('bn_momentum'),
        'bn_eps': settings.get('bn_eps'),
        **settings.get('model_kwargs', {}),
        **kwargs,
    }
    given = {key: value for key, value in options.items() if value is not None}
    hint = '; --pretrained-path adapts a checkpoint to other classes' if kwargs.get('checkpoint_path') else ''
    errors = (*LIBRARY_ERRORS, AttributeError, SafetensorError)
    with user_errors(f"Model '{name}' cannot be built with {given}", errors, hint=hint):
        return models.create_for_input(name, settings, **options)


def load_trained(source: str | os.PathLike, use_ema: bool = False) -> Trained:
    """Load a trained model.

    Args:
        source: folder of a run (its best checkpoint), a checkpoint file in one, an exported folder, or
            ``'hf-hub:owner/name'``.
        use_ema: the moving average instead of the weights.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    name = str(source or '')
    if not name:
        raise UserError('Name the folder of a run or of an exported model.')
    if name.startswith('hf-hub:'):
        return _load_exported(name)
    path = Path(name.removeprefix('local-dir:'))
    if (path / 'config.json').is_file():
        return _load_exported(f'local-dir:{path}')
    checkpoint_file = path if path.is_file() else RunDir(path).best_or_last_checkpoint()
    checkpoint = read_checkpoint(checkpoint_file)
    check_intact(checkpoint_file)
    settings = _settings_of(checkpoint, checkpoint_file)
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise UserError(f"'{checkpoint_file}' has no moving average: it was trained without --model-ema.")
    state = timm.models.clean_state_dict(checkpoint[key])
    found = models.options_in_weights(settings['model'], state)
    model = build_model({**settings, 'model_kwargs': {**found, **settings.get('model_kwargs', {})}})
    model.load_state_dict(state)
    _check_finite(model, checkpoint_file)
    config = resolve_preprocessing(model, settings)
    names = settings.get('class_names')
    epoch = checkpoint['epoch']
    run = RunDir.of(checkpoint_file)
    held_out = settings.get('val_fraction') is not None
    data = run.environment().get('data_fingerprint', '') if held_out else ''
    calibration = run.calibration(epoch, use_ema)
    return Trained(settings['model'], model.eval(), config, names, settings, epoch, use_ema, calibration, data)


def _settings_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    args = checkpoint.get('args')
    if args is None:
        raise UserError(f"'{path}' holds no settings of a run: how its model was built is unknown.")
    return vars(args)


def _load_exported(name: str) -> Trained:
    model = models.create_model(name, pretrained=True).eval()
    _check_finite(model, name)
    config = resolve_preprocessing(model)
    names = model.pretrained_cfg.get('label_names')
    own = weights.read_config(*timm.models.parse_model_name(name)).get('ccl_timm')
    own = own if isinstance(own, dict) else {}
    calibration, mode = own.get('calibration'), own.get('input_img_mode')
    return Trained(
        model.pretrained_cfg['architecture'],
        model,
        config,
        list(names) if names else None,
        settings={'input_img_mode': mode} if mode in Image.MODES else {},
        calibration=None if calibration is None else check_calibration(calibration, name),
    )


def _check_finite(model: nn.Module, source: str | os.PathLike) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"'{source}' has weights that are not finite numbers, such as '{name}': its training diverged. Take "
                'another checkpoint.'
            )


@torch.inference_mode()
def check_outputs(trained: Trained) -> None:
    """Raise a UserError unless a model computes finite logits of a random image."""
    images = torch.randn(1, *trained.data_config['input_size'])
    if not torch.isfinite(trained.model(images)).all():
        raise UserError(
            f"'{trained.name}' computes logits that are not finite numbers: its training diverged. Take another "
            'checkpoint.'
        )
