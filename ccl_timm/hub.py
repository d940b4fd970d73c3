"""Exports of trained models: files that timm loads, or ONNX."""

import importlib.util
import json
import os
from pathlib import Path

import timm.models
import torch

from ccl_timm import plugins
from ccl_timm.errors import UserError
from ccl_timm.trained import Trained, load_trained

__all__ = ['export']

EXPORT_FILES = {'timm': ('model.safetensors', 'config.json'), 'onnx': ('model.onnx',)}


def export(
    source: str | os.PathLike, folder: str | os.PathLike, use_ema: bool = False, form: str = 'timm'
) -> list[Path]:
    """Write a trained model for use elsewhere.

    Args:
        source: as of :func:`ccl_timm.trained.load_trained`.
        folder: where to write; may exist, but not hold a model.
        use_ema: the moving average instead of the weights.
        form: ``'timm'``: model.safetensors and config.json, which timm loads from ``local-dir:FOLDER``; it holds mean,
            std, input size, crop and interpolation as trained, the class names, and which package and plugins the
            architecture needs. ``'onnx'``: model.onnx with the same in its metadata, for batches of any size.

    Returns:
        The files written.

    Raises:
        UserError: the source cannot be loaded, the folder holds a model, or packages for ONNX are missing.
    """
    folder = Path(folder)
    names = EXPORT_FILES[form]
    taken = [name for name in names if (folder / name).exists()]
    if taken or (folder.exists() and not folder.is_dir()):
        raise UserError(f"'{folder}' already holds {taken[0] if taken else 'a file'}: name another folder.")
    if form == 'onnx' and not all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript')):
        raise UserError("ONNX needs two more packages: `pip install 'ccl-timm[onnx]'`.")
    trained = load_trained(source, use_ema)
    {'timm': _export_timm, 'onnx': _export_onnx}[form](trained, folder)
    return [folder / name for name in names]


def _export_timm(trained: Trained, folder: Path) -> None:
    import ccl_timm

    needs = {'package': 'ccl-timm', 'version': ccl_timm.__version__, 'plugins': plugins.used_plugins()}
    timm.models.save_for_hf(
        trained.model,
        str(folder),
        model_config={'label_names': trained.class_names, 'ccl_timm': needs},
        safe_serialization=True,
        data_config=trained.data_config,
    )


def _export_onnx(trained: Trained, folder: Path) -> None:
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    # two images: torch.export takes a batch of one for a constant
    images = torch.randn(2, *trained.data_config['input_size'])
    program = torch.onnx.export(
        trained.model,
        (images,),
        input_names=['images'],
        output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    facts = {'architecture': trained.name, 'class_names': trained.class_names, **trained.data_config}
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(model, folder / 'model.onnx')
