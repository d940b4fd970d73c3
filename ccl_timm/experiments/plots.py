"""Pictures, with matplotlib: features in the plane, attention of classes, confusion, curves over the epochs."""

import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ccl_timm.errors import UserError
from ccl_timm.experiments.analysis import class_centres

__all__ = ['as_svg', 'draw_attention', 'draw_confusion', 'draw_curves', 'draw_features', 'in_the_plane', 'save']

_READABLE = 20  # classes of which each can have its name in a picture


def _matplotlib() -> ModuleType:
    """matplotlib's module of figures, which needs no display.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError("Pictures need matplotlib: `pip install 'ccl-timm[pictures]'`.") from error
    return matplotlib


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, over an older one."""
    figure.savefig(path, dpi=120, metadata={'Software': None})


def as_svg(figure: Any) -> str:
    """A figure as an ``<svg>`` element, the same for the same figure."""
    matplotlib, file = _matplotlib(), io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': 'ccl-timm', 'svg.fonttype': 'none', 'font.family': 'sans-serif'}):
        figure.savefig(file, format='svg', metadata={'Date': None})
    text = file.getvalue()
    return text[text.index('<svg') :]


def _colours(count: int) -> list:
    maps = _matplotlib().colormaps
    name = 'tab10' if count <= 10 else 'tab20'
    return [maps[name](i) for i in range(count)] if count <= 20 else list(maps['hsv'](np.linspace(0, 0.95, count)))


def draw_features(
    splits: dict[str, tuple[np.ndarray, np.ndarray]], names: Sequence[str], title: str, caption: str
) -> Any:
    """Points in the plane, coloured by class, with the classes' centres; one panel per split, all of the same scale.

    Args:
        splits: for each split its points (N, 2) and labels (N,).
        names: of the classes, by label.
        title: above.
        caption: below.
    """
    figure = _matplotlib().figure.Figure(figsize=(6 * len(splits), 7), layout='constrained')
    axes = figure.subplots(1, len(splits), sharex=True, sharey=True, squeeze=False)[0]
    colours = _colours(len(names))
    for axis, (split, (points, labels)) in zip(axes, splits.items(), strict=True):
        classes, centres = class_centres(points, labels)
        for k, centre in zip(classes, centres, strict=True):
            own = points[labels == k]
            axis.scatter(*own.T, s=8, color=colours[k], alpha=0.6, linewidths=0, label=names[k])
            axis.scatter(*centre, s=70, marker='X', color=colours[k], edgecolors='black', zorder=3)
            if len(classes) <= _READABLE:
                box = {'boxstyle': 'round,pad=0.15', 'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.75}
                axis.annotate(names[k], centre, (6, 6), textcoords='offset points', zorder=4, fontsize=9, bbox=box)
        axis.set_title(f'{split}, {len(points)} images')
        axis.set_aspect('equal')
    everything = np.concatenate([points for points, _ in splits.values()])
    middle = (everything.min(0) + everything.max(0)) / 2
    reach = 0.53 * (everything.max(0) - everything.min(0)).max() or 1.0
    axes[0].set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize=9)
    return figure


def in_the_plane(splits: dict[str, tuple[np.ndarray, np.ndarray]], limit: int) -> tuple[dict, str]:
    """Features as points: as they are if they are two wide, else by t-SNE of all splits together.

    Args:
        splits: for each split its features (N, D) and labels (N,).
        limit: images of a split for t-SNE, drawn at random (the same at every call).

    Returns:
        The splits with points (N, 2), and how these were computed.
    """
    if all(features.shape[1] == 2 for features, _ in splits.values()):
        return splits, 'the two features themselves'
    from sklearn.manifold import TSNE

    chosen = {}
    for name, (features, labels) in splits.items():
        order = np.sort(np.random.default_rng(0).permutation(len(labels))[:limit])
        chosen[name] = features[order], labels[order]
    together = np.concatenate([features for features, _ in chosen.values()])
    perplexity = min(30.0, (len(together) - 1) / 3)
    points = TSNE(init='pca', perplexity=perplexity, random_state=0).fit_transform(together)
    ends = np.cumsum([len(labels) for _, labels in chosen.values()])[:-1]
    placed = dict(zip(chosen, np.split(points, ends), strict=True))
    how = f't-SNE of {together.shape[1]} features: near points are alike, far distances and sizes mean nothing'
    return {name: (placed[name], chosen[name][1]) for name in chosen}, how


def draw_attention(attention: np.ndarray, labels: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Mean attention of each class (row) to each channel (column); channels by the class that attends to them most.

    Args:
        attention: (N, C) in (0, 1).
        labels: (N,).
        names: of the classes, by label.
        title: above.
    """
    classes, means = class_centres(attention, labels)
    order = np.lexsort((-means.max(0), means.argmax(0)))
    figure = _matplotlib().figure.Figure(figsize=(11, max(3, min(12, 1.5 + 0.3 * len(classes)))), layout='constrained')
    axis = figure.subplots()
    image = axis.imshow(means[:, order], aspect='auto', cmap='viridis', interpolation='nearest')
    figure.colorbar(image, label='mean attention')
    _name_classes(axis.yaxis, [names[k] for k in classes])
    axis.set(title=title, xlabel='channel, by the class that attends to it most', ylabel='class')
    return figure


def _name_classes(axis: Any, names: list[str]) -> None:
    if len(names) <= 2 * _READABLE:
        axis.set_ticks(range(len(names)), names)


def draw_confusion(confusion: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Counts (K, K) of images by class (row) and prediction (column), coloured by their share of the class."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = min(12, 3 + 0.25 * len(names))
    figure = _matplotlib().figure.Figure(figsize=(size + 1, size), layout='constrained')
    axis = figure.subplots()
    image = axis.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, label='share of the class')
    if len(names) <= _READABLE:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            colour = 'white' if shares[row, column] > 0.5 else 'black'
            axis.text(column, row, confusion[row, column], ha='center', va='center', color=colour, fontsize=8)
    _name_classes(axis.xaxis, list(names))
    _name_classes(axis.yaxis, list(names))
    if max(map(len, names)) > 3:
        axis.tick_params('x', rotation=90)
    axis.set(title=title, xlabel='prediction', ylabel='class')
    return figure


def draw_curves(title: str, curves: dict[str, list[list[tuple[int, float]]]]) -> Any:
    """A value over the epochs: for each name the mean of its runs, between their smallest and their largest.

    Args:
        title: of the value axis.
        curves: for each name, for each run, epochs and values. Where runs were measured at different epochs, those
            that all of them have count.
    """
    figure = _matplotlib().figure.Figure(figsize=(9, 5), layout='constrained')
    axis = figure.subplots()
    for (name, of_runs), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        values = [dict(curve) for curve in of_runs]
        epochs = sorted(set.intersection(*(set(own) for own in values)))
        grid = np.array([[own[epoch] for epoch in epochs] for own in values])
        label = f'{name} (n={len(values)})' if len(values) > 1 else name
        axis.plot(epochs, grid.mean(0), color=colour, label=label, marker='o' if len(epochs) == 1 else None)
        axis.fill_between(epochs, grid.min(0), grid.max(0), color=colour, alpha=0.2, linewidth=0)
    axis.set(xlabel='epoch', ylabel=title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
