"""A trained model's features: pictures of them, and how well they separate classes without its classifier."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ccl_timm.data.config import DataConfig
from ccl_timm.errors import UserError
from ccl_timm.experiments import analysis, plots
from ccl_timm.training import evaluation, retrieval
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.measures import nearest

__all__ = ['MEASURES', 'analyse', 'describe', 'draw', 'draw_neighbours', 'show_measures', 'split_outputs']

# what is measured of features, and how it is printed
MEASURES = {
    'images': '.0f',
    'mean distance to the class centre': '.4g',
    'mean distance between class centres': '.4g',
    'variance of eigenvalues within classes, unit features': '.3g',
    'top-1 %, features shorter than the mean': '.2f',
    'top-1 %, features longer than the mean': '.2f',
    'top-1 %, the model': '.2f',
    'top-1 %, cosine with class vectors': '.2f',
    'top-1 %, Gaussian discriminant': '.2f',
    'channels of attention': '.0f',
    'channels open for a class, mean': '.1f',
    'rank correlation of these with top-1 of the class': '.2f',
}


def split_outputs(
    trained: Trained, data: DataConfig, named: bool, device: torch.device, workers: int, layer: str = 'features'
) -> dict[str, dict[str, np.ndarray]]:
    """What a model computes of the training split and of the validation split, by the names of the splits.

    Args:
        trained: from :func:`ccl_timm.training.checkpoints.load_trained`.
        data: from :func:`ccl_timm.training.evaluation.choose_data`.
        named: see :func:`ccl_timm.training.evaluation.open_for`.
        device: where to compute.
        workers: processes that load images.
        layer: whose output is called ``features``: ``'features'`` or ``'hidden'``.

    Returns:
        For each split ``features`` (N, D), ``logits`` (N, K), ``labels`` (N,), ``index`` (N,) of the images and, where
        the model has it, ``attention`` (N, C).

    Raises:
        UserError: the data does not fit the model, or the model lacks the layer.
    """
    config = {**trained.data_config, 'batch_size': data.batch_size}
    model, splits = trained.model.to(device), {}
    for split, name in {'training': data.train_split, data.val_split: data.val_split}.items():
        dataset = evaluation.open_for(data, name, trained, training=split == 'training', named=named)
        evaluation.check_labels(dataset, trained)
        loader = evaluation.loader_of(dataset, config, device, workers)
        found = retrieval.extract_outputs(model, loader, (layer, 'logits', 'attention'), f'{split} split')
        if layer not in found:
            head = type(model.get_classifier()).__name__
            raise UserError(f'Only the heads cam and mlp have --layer {layer}; this model has a {head}.')
        found['features'] = found.pop(layer)
        splits[split] = {key: value.cpu().numpy() for key, value in found.items()}
        splits[split] |= {'features': splits[split]['features'].astype(np.float64)}
    return splits


def describe(trained: Trained) -> str:
    """Title for pictures of a model."""
    loss = trained.settings.get('loss') or ''
    when = f', after epoch {trained.epoch + 1}' if trained.epoch is not None else ''
    return f'{trained.name}{f" trained with {loss}" if loss else ""}{when}'


def draw(
    splits: dict[str, dict[str, np.ndarray]],
    names: list[str],
    title: str,
    folder: Path,
    limit: int,
    layer: str = 'features',
    form: str = 'png',
) -> list[Path]:
    """Draw features of both splits, and attention and confusion of the last one.

    Args:
        splits: ``features`` (N, D), ``logits`` (N, K), ``labels`` (N,) and perhaps ``attention`` (N, C), by split.
        names: of the classes.
        title: of the model.
        folder: where to write; created if it does not exist.
        limit: see :func:`plots.in_the_plane`.
        layer: of which the features are, ``features`` or ``hidden``; their picture is named after it.
        form: ``'png'`` or ``'svg'``.

    Returns:
        The files written.
    """
    points, how = plots.in_the_plane({split: (own['features'], own['labels']) for split, own in splits.items()}, limit)
    caption = '\n'.join([how, *(_distances(split, own) for split, own in splits.items())])
    heading = title if layer == 'features' else f'{title}, {layer} layer'
    drawn = {layer: plots.draw_features(points, names, heading, caption)}
    name, last = list(splits.items())[-1]
    title = f'{title}\n{name} split'
    if 'attention' in last:
        drawn['attention'] = plots.draw_attention(last['attention'], last['labels'], names, title)
    confusion = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(confusion, (last['labels'], last['logits'].argmax(1)), 1)
    drawn['confusion'] = plots.draw_confusion(confusion, names, title)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        plots.save(figure, folder / f'{name}.{form}')
    return [folder / f'{name}.{form}' for name in drawn]


def draw_neighbours(
    dataset: Any, own: dict[str, np.ndarray], names: list[str], title: str, path: Path, queries: int = 6
) -> list[Path]:
    """Draw some images of a split, chosen at random but the same at every call, with the nearest five by features.

    Args:
        dataset: the split; its ``transform`` is taken off.
        own: ``features`` (N, D), ``labels`` (N,) and ``index`` (N,) of it.
        names: of the classes.
        title: of the model.
        path: of the file.
        queries: how many images.

    Returns:
        The file written; none of a split whose images come in no order, or that is a single image.
    """
    if isinstance(dataset, IterableDataset) or len(own['labels']) < 2:
        return []
    dataset.transform = None
    labels, index = own['labels'].tolist(), own['index'].tolist()
    chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:queries])
    features = torch.from_numpy(own['features'])
    ((_, cosines, found),) = nearest(features[torch.from_numpy(chosen)], features, 6)
    examples = []
    for query, cosine, places in zip(chosen.tolist(), cosines.tolist(), found.tolist(), strict=True):
        others = [pair for pair in zip(places, cosine, strict=True) if pair[0] != query][:5]
        neighbours = [plots.Neighbour(dataset[index[place]][0], labels[place], value) for place, value in others]
        examples.append((dataset[index[query]][0], labels[query], neighbours))
    title = f'{title}\nimages chosen at random, each with the nearest five others by cosine of features'
    plots.save(plots.draw_retrieval(examples, names, title), path)
    return [path]


def _distances(split: str, own: dict[str, np.ndarray]) -> str:
    intra, inter = analysis.class_distances(own['features'], own['labels'])
    return f'{split}: mean distance to the class centre {intra:.3g}, between class centres {inter:.3g}'


def analyse(splits: dict[str, dict[str, np.ndarray]], vectors: np.ndarray | None) -> dict[str, dict[str, float]]:
    """What the features of each split show: the :data:`MEASURES` that there are of it.

    Args:
        splits: as for :func:`draw`.
        vectors: the classifier's, one a class (K, D); None if it has none.
    """
    known, found = splits['training'], {}
    for split, own in splits.items():
        features, labels = own['features'], own['labels']
        correct = own['logits'].argmax(1) == labels
        gaussian = analysis.gaussian_accuracy(known['features'], known['labels'], features, labels)
        values = [
            len(labels),
            *analysis.class_distances(features, labels),
            analysis.eigenvalue_variance(features, labels),
            *analysis.accuracy_by_norm(features, correct),
            100 * float(correct.mean()),
            analysis.cosine_accuracy(features, labels, vectors) if _fits(vectors, features) else math.nan,
            gaussian,
        ]
        if 'attention' in own:
            channels, rank = analysis.channels_by_accuracy(own['attention'], labels, correct)
            values += [own['attention'].shape[1], channels, rank]
        found[split] = {name: x for name, x in zip(MEASURES, values, strict=False) if not math.isnan(x)}
    return found


def _fits(vectors: np.ndarray | None, features: np.ndarray) -> bool:
    return vectors is not None and vectors.shape[1] == features.shape[1]


def show_measures(columns: Sequence[dict[str, list[float]]]) -> list[tuple[str, ...]]:
    """Rows of a table: the name of a measure that any column has, and its mean and standard deviation in each.

    Args:
        columns: the values of each measure, of a split or of several runs.
    """
    names = [name for name in MEASURES if any(name in own for own in columns)]
    return [(name, *(_show(own.get(name), MEASURES[name]) for own in columns)) for name in names]


def _show(values: list[float] | None, form: str) -> str:
    if not values:
        return '-'
    digits = form if form.endswith('f') else '.2g'
    spread = f' ± {format(statistics.stdev(values), digits)}' if len({*values}) > 1 else ''
    return format(statistics.fmean(values), form) + spread
