"""What a model's head computes of a data set: features, logits, attention."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ccl_timm.console import Progress
from ccl_timm.heads import CAMHead, MLPHead
from ccl_timm.task import read_head
from ccl_timm.training.step_timing import likely_layout

__all__ = ['extract_outputs']


@torch.inference_mode()
def extract_outputs(model: nn.Module, loader: Any, names: Collection[str], label: str) -> dict[str, Tensor]:
    """The outputs of a model's head for a data set.

    Args:
        model: a timm model, ours or any other.
        loader: of images and labels; an image of label -1 could not be read, and is left out.
        names: of outputs with one row per image: ``features``, ``logits``, ``attention`` ..., and ``hidden``, the
            output of the first layer of the heads ``cam`` (linear, before its gate) and ``mlp`` (with its ReLU); those
            that the head lacks are left out.
        label: name in front of the progress.

    Returns:
        Each (N, ...) float32; ``labels`` (N,), and ``index`` (N,), the place of each image in the data set. All are on
        the model's device.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {}
    seen = 0
    for images, target in Progress(loader, label, 50):
        images = images.contiguous(memory_format=likely_layout(model, images.device))
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        head = model.get_classifier()
        outputs = read_head(head, pooled)._asdict()
        if 'hidden' in names and isinstance(head, (CAMHead, MLPHead)):
            outputs['hidden'] = head.hidden(pooled)
        readable = target >= 0
        rows = {name: outputs[name].float() for name in names if outputs.get(name) is not None}
        rows |= {'labels': target, 'index': torch.arange(seen, seen + len(target), device=target.device)}
        seen += len(target)
        for name, own in rows.items():
            found.setdefault(name, []).append(own[readable])
    return {name: torch.cat(batches) for name, batches in found.items()}
