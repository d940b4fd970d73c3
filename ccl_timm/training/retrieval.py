"""How well a model's features separate classes without its classifier: nearest neighbours."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccl_timm.console import Progress
from ccl_timm.task import read_head

__all__ = ['extract_features', 'extract_outputs', 'knn_accuracy', 'recall_at_1']

_ROWS = 1024  # of the similarity matrix at a time


@torch.inference_mode()
def extract_outputs(model: nn.Module, loader: Any, names: Collection[str], label: str) -> dict[str, Tensor]:
    """The outputs of a model's head for a data set.

    Args:
        model: a timm model, ours or any other.
        loader: of images and labels; an image of label -1 could not be read, and is left out.
        names: of outputs with one row per image: ``features``, ``logits``, ``attention`` ..., and ``hidden``, the
            output of the first linear layer of the heads ``cam`` and ``mlp``; those that the head lacks are left out.
        label: name in front of the progress.

    Returns:
        Each (N, ...) float32, and ``labels`` (N,), on the model's device.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {}
    for images, target in Progress(loader, label, 50):
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        head = model.get_classifier()
        outputs = read_head(head, pooled)._asdict()
        if 'hidden' in names and hasattr(head, 'hidden'):
            outputs['hidden'] = head.hidden(pooled)
        for name in names:
            if outputs.get(name) is not None:
                found.setdefault(name, []).append(outputs[name].float()[target >= 0])
        found.setdefault('labels', []).append(target[target >= 0])
    return {name: torch.cat(batches) for name, batches in found.items()}


def extract_features(model: nn.Module, loader: Any, label: str = 'features') -> tuple[Tensor, Tensor]:
    """Features of a data set, as :func:`extract_outputs` takes it: the input of the last layer, scaled to length 1.

    Returns:
        Features (N, D) float32, labels (N,), on the model's device.
    """
    found = extract_outputs(model, loader, ('features',), label)
    return F.normalize(found['features'], dim=1), found['labels']


def recall_at_1(features: Tensor, labels: Tensor) -> float:
    """Share, in percent, of the images whose nearest other image (by cosine) is of their class.

    Args:
        features: (N, D) of length 1; N >= 2.
        labels: (N,).
    """
    hits = 0
    for start in range(0, len(features), _ROWS):
        similarity = features[start : start + _ROWS] @ features.T
        rows = torch.arange(len(similarity), device=features.device)
        similarity[rows, rows + start] = -2.0  # not its own neighbour; a cosine is at least -1
        hits += (labels[similarity.argmax(1)] == labels[start : start + _ROWS]).sum().item()
    return 100 * hits / len(features)


def knn_accuracy(
    features: Tensor, labels: Tensor, known_features: Tensor, known_labels: Tensor, neighbours: int
) -> float:
    """Accuracy in percent of the k-nearest-neighbour classifier, in which neighbours vote with their cosine.

    Args:
        features: (N, D) of length 1.
        labels: (N,).
        known_features: (M, D) of length 1, of the training split.
        known_labels: (M,).
        neighbours: how many vote; at most M do.
    """
    classes = int(torch.cat([labels, known_labels]).max()) + 1
    hits = 0
    for start in range(0, len(features), _ROWS):
        similarity = features[start : start + _ROWS] @ known_features.T
        value, index = similarity.topk(min(neighbours, len(known_features)), dim=1)
        votes = torch.zeros(len(value), classes, device=value.device).scatter_add_(1, known_labels[index], value)
        hits += (votes.argmax(1) == labels[start : start + _ROWS]).sum().item()
    return 100 * hits / len(features)
