"""Classification of new images by a trained model."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from ccl_timm.data.files import UnreadableImage, list_images, read_image
from ccl_timm.errors import UserError
from ccl_timm.heads import HeadOutputs
from ccl_timm.task import read_head
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.evaluation import classifier_of
from ccl_timm.training.gallery import Gallery
from ccl_timm.training.step_timing import likely_layout

__all__ = [
    'check_tta',
    'compute_batches',
    'find_images',
    'head_outputs',
    'predict',
    'preprocessing',
    'rank',
    'temperature_of',
]


def predict(
    trained: Trained,
    paths: list[Path],
    topk: int = 5,
    batch_size: int = 32,
    device: str = 'cpu',
    calibrated: bool = False,
    gallery: Gallery | None = None,
    threshold: float | None = None,
    tta: bool = False,
) -> tuple[list[dict[str, Any]], list[tuple[Path, str]]]:
    """Classify image files.

    Args:
        trained: from :func:`ccl_timm.training.checkpoints.load_trained`.
        paths: image files.
        topk: how many classes for each, best first.
        batch_size: images at a time.
        device: where to compute.
        calibrated: divide the logits by the model's temperature.
        gallery: classify by the nearest features of this gallery, not by the model's own classes.
        threshold: of the gallery, in the place of its own.
        tta: average the logits over each image and its mirror image; not with ``calibrated`` or a gallery.

    Returns:
        For each image that can be read ``{'image', 'predictions': [{'class', 'index', 'probability'}]}``, in order;
        with a gallery as :meth:`ccl_timm.training.gallery.Gallery.classify` says. And those that cannot be read, with
        the reason. None is replaced by another.

    Raises:
        UserError: the model computes numbers that are not finite, has no temperature, or is not the gallery's.
    """
    if tta:
        check_tta(calibrated, gallery)
    temperature = temperature_of(trained) if calibrated else 1.0
    if gallery:
        gallery.check_model(trained)
    model, unreadable, results = trained.model, [], []
    classifier = classifier_of(trained, tta)

    def compute(images: Tensor) -> dict[str, Tensor]:
        return {'features': head_outputs(model, images).features} if gallery else {'logits': classifier(images)}

    for names, outputs in compute_batches(trained, paths, batch_size, device, compute, unreadable):
        if gallery:
            found = gallery.classify(outputs['features'], topk, threshold)
        else:
            probabilities = (outputs['logits'] / temperature).softmax(-1)
            found = [{'predictions': own} for own in rank(trained, probabilities, topk)]
        results += [{'image': str(name), **own} for name, own in zip(names, found, strict=True)]
    return results, unreadable


@torch.inference_mode()
def compute_batches(
    trained: Trained,
    paths: Iterable[Path],
    batch_size: int,
    device: str | torch.device,
    compute: Callable[[Tensor], dict[str, Tensor]],
    unreadable: list[tuple[Path, str]],
) -> Iterator[tuple[list[Path], dict[str, Tensor]]]:
    """Read image files and compute something of them, a batch at a time.

    Args:
        trained: its model moves to the device.
        paths: image files.
        batch_size: images at a time.
        device: where to compute.
        compute: images (N, C, H, W) to numbers (N, D) by name.
        unreadable: gets the files that cannot be read, with the reason.

    Yields:
        The files of a batch, and what was computed, float32 on the CPU.

    Raises:
        UserError: numbers are not finite.
    """
    prepare = preprocessing(trained)
    memory_format = likely_layout(trained.model.to(device).eval(), torch.device(device))
    for batch in _read_ahead(prepare, iter(paths), batch_size):
        unreadable += [(path, str(image)) for path, image in batch if isinstance(image, UnreadableImage)]
        readable = [(path, image) for path, image in batch if not isinstance(image, UnreadableImage)]
        if not readable:
            continue
        names, images = map(list, zip(*readable, strict=True))
        stacked = torch.stack(images).to(device, memory_format=memory_format)
        found = {name: numbers.float().cpu() for name, numbers in compute(stacked).items()}
        for numbers in found.values():
            finite = numbers.isfinite().all(1).tolist()
            if not all(finite):
                raise UserError(f"The model computes no finite numbers for '{names[finite.index(False)]}'.")
        yield names, found


def _read_ahead(
    prepare: Callable[[Path], Tensor], paths: Iterator[Path], batch_size: int
) -> Iterator[list[tuple[Path, Tensor | UnreadableImage]]]:
    """Batches of files with their images, or the reasons why they cannot be read; the next is read meanwhile."""

    def attempt(path: Path) -> tuple[Path, Tensor | UnreadableImage]:
        try:
            return path, prepare(path)
        except UnreadableImage as error:
            return path, error

    with ThreadPoolExecutor() as pool:
        ahead = pool.map(attempt, itertools.islice(paths, batch_size))
        while batch := list(ahead):
            ahead = pool.map(attempt, itertools.islice(paths, batch_size))
            yield batch


def check_tta(calibrated: bool, gallery: Gallery | None = None) -> None:
    """Raise a UserError for what test-time augmentation does not go with."""
    if calibrated:
        raise UserError('The temperature was fitted without --tta: leave out --tta or --calibrated.')
    if gallery:
        raise UserError('A gallery reads features, and --tta averages logits: leave out --tta or --gallery.')


def temperature_of(trained: Trained) -> float:
    """The temperature fitted for a model.

    Raises:
        UserError: none was.
    """
    if trained.calibration is None:
        raise UserError(
            f"No temperature was fitted for this '{trained.name}': run `timm validate.py RUN --fit-temperature` on "
            'images that it was not trained on; exports made afterwards have it, too.'
        )
    return trained.calibration['temperature']


def head_outputs(model: nn.Module, images: Tensor) -> HeadOutputs:
    """All that a model's head computes for images (N, C, H, W)."""
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return read_head(model.get_classifier(), pooled)


def preprocessing(trained: Trained) -> Callable[[Image.Image | str | os.PathLike], Tensor]:
    """A function from a PIL image or an image file to the model's input (C, H, W), as in validation.

    It raises UnreadableImage for a file that cannot be read.
    """
    transform = timm.data.create_transform(**trained.data_config, is_training=False)
    mode = trained.image_mode

    def prepare(image: Image.Image | str | os.PathLike) -> Tensor:
        return transform(image.convert(mode) if isinstance(image, Image.Image) else read_image(image, mode))

    return prepare


def rank(trained: Trained, probabilities: Tensor, topk: int) -> list[list[dict[str, Any]]]:
    """For each row of probabilities (N, K) its best classes: ``{'class', 'index', 'probability'}``, best first."""
    best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    return [
        [
            {'class': trained.labels[k], 'index': k, 'probability': round(p, 6)}
            for p, k in zip(row, indices, strict=True)
        ]
        for row, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def find_images(names: list[str]) -> list[Path]:
    """The files named, and all images below the folders named, in order.

    Raises:
        UserError: a name does not exist, or a folder has no image.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = list_images(path)
            if not below:
                raise UserError(f"Folder '{path}' holds no image.")
            paths += map(Path, below)
        elif os.path.lexists(path):
            paths.append(path)
        else:
            raise UserError(f"'{path}' does not exist.")
    return paths
