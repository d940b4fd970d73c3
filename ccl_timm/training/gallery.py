"""Galleries: classification by the nearest of known features, which takes new classes and rejects unknown images."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ccl_timm.data import datasets
from ccl_timm.data.prepare import open_classes
from ccl_timm.errors import UserError, require_writable, user_errors
from ccl_timm.training import measures, retrieval
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.evaluation import loader_of

__all__ = ['Gallery', 'create_gallery']

ACCEPTED = 0.95  # share of the known validation images that a threshold accepts


@dataclass(frozen=True)
class Gallery:
    """Features of labelled images, by which a model classifies others.

    Attributes:
        features: (M, D) float32 of length 1.
        labels: (M,) int64.
        class_names: by label.
        model: architecture that computed the features.
        weights: hash of its weights.
        threshold: cosine below which an image is of no class in the gallery; None to reject none.
    """

    features: Tensor
    labels: Tensor
    class_names: list[str]
    model: str
    weights: str
    threshold: float | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write the gallery to a new safetensors file.

        Raises:
            UserError: the file exists.
        """
        require_writable(path)
        known = {'class_names': self.class_names, 'threshold': self.threshold}
        metadata = {'model': self.model, 'weights': self.weights, 'gallery': json.dumps(known)}
        with user_errors(f"'{path}' cannot be written", (SafetensorError, OSError)):
            save_file({'features': self.features, 'labels': self.labels}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Gallery':
        """Read a gallery.

        Raises:
            UserError: there is none.
        """
        errors = (SafetensorError, OSError, LookupError, TypeError, ValueError)
        with user_errors(f"'{path}' is not a gallery of `ccl-timm index`", errors), safe_open(path, 'pt') as file:
            metadata = file.metadata()
            known = json.loads(metadata['gallery'])
            tensors = file.get_tensor('features'), file.get_tensor('labels')
            gallery = cls(*tensors, known['class_names'], metadata['model'], metadata['weights'], known['threshold'])
            gallery._check()
        return gallery

    def _check(self) -> None:
        features, labels = self.features, self.labels
        right = features.ndim == 2 and features.is_floating_point() and labels.shape == features.shape[:1]
        if not right or not len(labels) or labels.dtype != torch.int64:
            raise ValueError('its features and labels do not belong together')
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            raise ValueError('its labels are not those of its classes')

    def check_model(self, trained: Trained) -> None:
        """Raise a UserError unless a model is the one that computed the features."""
        if self.model != trained.name or self.weights != hash_weights(trained.model):
            raise UserError(
                f'The gallery was made with another model ({self.model}, weights {self.weights}): make one with this '
                f'{trained.name}, `ccl-timm index RUN DIR -o FILE`.'
            )

    def classify(self, features: Tensor, topk: int = 1, threshold: float | None = None) -> list[dict[str, Any]]:
        """Give each image the class of its nearest feature in the gallery, by cosine.

        Args:
            features: (N, D) on the CPU, of any length.
            topk: how many classes, the nearest first.
            threshold: images whose largest cosine is below it are unknown; None for the gallery's own, if it has one.

        Returns:
            For each image ``known`` and ``predictions``, a list of ``{'class', 'index', 'similarity'}``. Those of an
            unknown image are the nearest, none of which it is said to be of.
        """
        limit = self.threshold if threshold is None else threshold
        cosines = F.normalize(features.float(), dim=1) @ self.features.T
        index = self.labels.expand(len(cosines), -1)
        of_class = torch.full((len(cosines), len(self.class_names)), -2.0).scatter_reduce(1, index, cosines, 'amax')
        best = of_class.topk(min(topk, len(self.labels.unique())), dim=1)  # of the classes that have an image
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [
            {
                'known': limit is None or cosine[0] >= limit,
                'predictions': [
                    {'class': self.class_names[k], 'index': k, 'similarity': round(value, 6)}
                    for value, k in zip(cosine, classes, strict=True)
                ],
            }
            for cosine, classes in rows
        ]


def create_gallery(
    trained: Trained,
    folder: str | os.PathLike,
    validation: str | os.PathLike | None = None,
    device: str | torch.device = 'cpu',
    batch_size: int = 256,
    workers: int = 0,
) -> Gallery:
    """Compute the features of a folder with one folder per class, among them classes that the model never saw.

    Args:
        trained: from :func:`ccl_timm.training.checkpoints.load_trained`.
        folder: of images.
        validation: folder of other images of the same classes: the threshold is the largest that accepts 95% of them.
        device: where to compute.
        batch_size: images at a time.
        workers: processes that load images.

    Raises:
        UserError: there is no such folder, or the validation images are not of its classes, or are those in it.
    """
    device = torch.device(device)
    trained.model.to(device)

    def compute(source: str | os.PathLike, label: str) -> tuple[Tensor, Tensor, list[str]]:
        reader = open_classes(source)
        config = {**trained.data_config, 'batch_size': batch_size}
        loader = loader_of(datasets.ImageFiles(reader, trained.image_mode), config, device, workers)
        found = retrieval.extract_outputs(trained.model, loader, ('features',), label)
        if not len(found['labels']):
            raise UserError(f"Not one image in '{source}' can be read.")
        features = F.normalize(found['features'], dim=1).cpu()
        return features.contiguous(), found['labels'].cpu(), list(reader.class_to_idx)

    features, labels, names = compute(folder, 'gallery')
    threshold = None
    if validation is not None:
        known, _, classes = compute(validation, 'validation')
        unknown = sorted({*classes} - {*names})
        if unknown:
            raise UserError(f"'{validation}' has classes that the gallery lacks, such as '{unknown[0]}': remove them.")
        nearest = torch.cat([cosine[:, 0] for _, cosine, _ in measures.nearest(known, features, 1)])
        if nearest.median() > 1 - 1e-5:
            raise UserError(f"The images in '{validation}' are those of the gallery: name other ones.")
        threshold = measures.threshold(nearest, ACCEPTED)
    return Gallery(features, labels, names, trained.name, hash_weights(trained.model), threshold)


def hash_weights(model: nn.Module) -> str:
    """16 hexadecimal digits that identify the weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
