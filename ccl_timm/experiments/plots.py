"""Pictures, with matplotlib: features in the plane, attention of classes, confusion, curves over the epochs."""

import io
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ccl_timm.console.escape import terminal_text
from ccl_timm.errors import UserError
from ccl_timm.experiments.analysis import class_centres

__all__ = [
    'ForestRow', 'Neighbour', 'as_svg', 'check_name', 'draw_attention', 'draw_confusion', 'draw_curves',
    'draw_features', 'draw_forest', 'draw_reliability', 'draw_retrieval', 'in_the_plane', 'save',
]  # fmt: skip

_READABLE = 20  # classes of which each can have its name in a picture
_MARKERS = 'os^DvP'  # times ten colours: as many classes look different in a picture of features
_LONGEST_NAME = 30


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


def check_name(path: str | Path) -> None:
    """Raise a UserError unless a picture can be written under this name."""
    if Path(path).suffix.lower() not in ('.png', '.svg'):
        raise UserError(f"'{path}' must end in .png or .svg: those are the pictures that can be written.")
    _matplotlib()


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG or, under a name that ends in ``.svg``, as SVG, over an older one."""
    if path.suffix.lower() == '.svg':
        path.write_text(as_svg(figure), encoding='utf-8')
    else:
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
    panels: dict[str, tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    title: str,
    caption: str,
    shared: bool = True,
) -> Any:
    """Points in the plane, coloured by class, with the classes' centres; one panel per split or run, three in a row.

    Classes are named in a legend beside the panels. Up to 60 have a colour and marker of their own; of more, some look
    alike, and there is no legend.

    Args:
        panels: for each split or run its points (N, 2) and labels (N,).
        names: of the classes, by label.
        title: above.
        caption: below.
        shared: whether all panels have the same scale.
    """
    styles = _styles()
    shown = sorted({int(k) for _, labels in panels.values() for k in labels}) if len(names) <= len(styles) else []
    columns = -(-len(shown) // 30)
    legend_width = columns * (0.5 + 0.08 * max((len(_label(names[k])) for k in shown), default=0))
    in_row = min(len(panels), 3)
    rows, width = -(-len(panels) // in_row), 6 * in_row
    figure = _matplotlib().figure.Figure(figsize=(width + legend_width, 6 * rows + 1), layout='constrained')
    axes = figure.subplots(rows, in_row, sharex=shared, sharey=shared, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    centre_of, everything = {}, np.concatenate([points for points, _ in panels.values()])
    for axis, (panel, (points, labels)) in zip(axes, panels.items(), strict=False):
        for k, centre in zip(*class_centres(points, labels), strict=True):
            style = styles[k % len(styles)]
            axis.scatter(*points[labels == k].T, s=10, alpha=0.6, linewidths=0, **style)
            centre_of[k] = axis.scatter(*centre, s=60, edgecolors='black', zorder=3, **style)
        axis.set_title(f'{_label(panel)}, {len(points)} images')
        axis.set_aspect('equal')
        _square(axis, everything if shared else points)
    if shown:
        handles, labels = [centre_of[k] for k in shown], [_label(names[k]) for k in shown]
        figure.legend(handles, labels, loc='outside right upper', ncols=columns, fontsize=9)
    middle_of_panels = 0.5 * width / (width + legend_width)
    figure.suptitle(_wrapped(title, width), x=middle_of_panels)
    figure.supxlabel(caption, x=middle_of_panels, fontsize=9)
    return figure


def _square(axis: Any, points: np.ndarray) -> None:
    middle = (points.min(0) + points.max(0)) / 2
    reach = 0.53 * (points.max(0) - points.min(0)).max() or 1.0
    axis.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))


def _styles() -> list[dict[str, Any]]:
    """A colour and a marker each for 60 classes."""
    return [{'color': colour, 'marker': marker} for marker, colour in itertools.product(_MARKERS, _colours(10))]


def _wrapped(title: str, inches: float) -> str:
    """A title in lines that fit on a figure of this width."""
    return '\n'.join(textwrap.fill(line, int(9 * inches)) for line in title.splitlines())


def _label(name: str) -> str:
    """A name as matplotlib shows it: one line, not too long, no formula."""
    text = terminal_text(name)
    text = text if len(text) <= _LONGEST_NAME else f'{text[: _LONGEST_NAME - 8]}...{text[-5:]}'
    return text.replace('$', r'\$')


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
    chosen = {}
    for name, (features, labels) in splits.items():
        order = np.sort(np.random.default_rng(0).permutation(len(labels))[:limit])
        chosen[name] = features[order], labels[order]
    if all(features.shape[1] == 1 for features, _ in chosen.values()):
        line = {name: (np.pad(features, ((0, 0), (0, 1))), labels) for name, (features, labels) in chosen.items()}
        return line, 'the one feature, from left to right'
    from sklearn.manifold import TSNE  # takes a second: only when it is drawn

    together = np.concatenate([features for features, _ in chosen.values()])
    perplexity = min(30.0, (len(together) - 1) / 3)
    points = TSNE(init='pca', perplexity=perplexity, random_state=0).fit_transform(together)
    ends = np.cumsum([len(labels) for _, labels in chosen.values()])[:-1]
    placed = dict(zip(chosen, np.split(points, ends), strict=True))
    how = f't-SNE of {together.shape[1]} features: close points are similar; large distances and sizes mean nothing'
    return {name: (placed[name], chosen[name][1]) for name in chosen}, how


def draw_attention(attention: np.ndarray, labels: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Attention of each class (row) to each channel (column): its mean, and how that deviates from the channel's mean.

    The channel's mean is that over the classes, each of which counts alike. Channels stand by the class that attends
    to them most, and of one class those first in which it exceeds the channel's mean most.

    Args:
        attention: (N, C) in (0, 1).
        labels: (N,).
        names: of the classes, by label.
        title: above.
    """
    classes, means = class_centres(attention, labels)
    deviations = means - means.mean(0)
    order = np.lexsort((-deviations.max(0), deviations.argmax(0)))
    reach = np.abs(deviations).max() or 1.0
    height = max(3, min(12, 1.8 + 0.25 * len(classes)))
    figure = _matplotlib().figure.Figure(figsize=(16, height), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    images = [
        left.imshow(means[:, order], aspect='auto', cmap='viridis', interpolation='nearest'),
        right.imshow(
            deviations[:, order], aspect='auto', cmap='RdBu_r', vmin=-reach, vmax=reach, interpolation='nearest'
        ),
    ]
    titles = ('mean attention', "deviation from the channel's mean")
    for axis, image, what in zip((left, right), images, titles, strict=True):
        figure.colorbar(image, ax=axis)
        axis.set(title=what, xlabel='channel, by the class that attends to it most')
    left.set_ylabel('class')
    _name_classes(left.yaxis, [names[k] for k in classes])
    figure.suptitle(title)
    return figure


def _name_classes(axis: Any, names: list[str]) -> None:
    if len(names) <= 2 * _READABLE:
        axis.set_ticks(range(len(names)), map(_label, names))


def draw_confusion(confusion: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Counts (K, K) of images by class (row) and prediction (column), coloured by their share of the class."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = min(12, max(5, 3 + 0.25 * len(names)))
    figure = _matplotlib().figure.Figure(figsize=(size + 1.5, size), layout='compressed')
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
    axis.set(xlabel='prediction', ylabel='class')
    figure.suptitle(_wrapped(title, size + 1.5))
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


def draw_reliability(series: dict[str, tuple[Any, Any, Any]], title: str) -> Any:
    """Reliability diagrams: accuracy over confidence, and below how many images have which confidence.

    Args:
        series: for each name mean confidence, accuracy and number of images of each bin, as
            :func:`ccl_timm.training.measures.reliability` gives them.
        title: above.
    """
    figure = _matplotlib().figure.Figure(figsize=(5.5, 7), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.plot([0, 1], [0, 1], color='grey', linestyle='--', linewidth=1, label='perfectly calibrated')
    width = 0.9 / len(next(iter(series.values()))[0]) / len(series)
    for place, ((name, (confidence, accuracy, counts)), colour) in enumerate(
        zip(series.items(), _colours(len(series)), strict=True)
    ):
        confidence, accuracy, counts = map(np.asarray, (confidence, accuracy, counts))
        used, total = counts > 0, counts.sum()
        error = 100 * (np.abs(confidence - accuracy)[used] * counts[used]).sum() / total
        top.plot(confidence[used], accuracy[used], color=colour, label=f'{name}: ECE {error:.2f}%')
        sizes = 12 + 150 * counts[used] / total
        top.scatter(confidence[used], accuracy[used], sizes, color=colour, zorder=3, clip_on=False)
        centres = (np.arange(len(counts)) + 0.5) / len(counts) + (place - (len(series) - 1) / 2) * width
        bottom.bar(centres, 100 * counts / total, width, color=colour)
    top.set(ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
    top.grid(alpha=0.3)
    figure.legend(fontsize=9, loc='outside lower center')
    bottom.set(xlabel='confidence: probability of the predicted class', ylabel='% of images')
    figure.suptitle(_wrapped(title, 5.5))
    return figure


class ForestRow(NamedTuple):
    """A difference in a forest plot.

    Attributes:
        label: of what, such as a loss.
        difference: to the control, in points.
        low: lower end of its interval; NaN for none.
        high: upper end; NaN for none.
        verdict: what follows from it, such as ``'no difference shown'``.
    """

    label: str
    difference: float
    low: float
    high: float
    verdict: str


def draw_forest(rows: Sequence[ForestRow], title: str, equivalence: float = 0.5) -> Any:
    """Differences to a control with their intervals, one below the other: blue above 0, orange below, else black.

    Args:
        rows: from top to bottom.
        title: above.
        equivalence: differences of up to this many points count as none, in the shaded band; 0 for no band.
    """
    figure = _matplotlib().figure.Figure(figsize=(10, 1.6 + 0.38 * len(rows)), layout='constrained')
    axis = figure.subplots()
    places = range(len(rows))
    if equivalence:
        label = f'equivalent: within ±{equivalence:g} points'
        axis.axvspan(-equivalence, equivalence, color='grey', alpha=0.15, linewidth=0, label=label)
        figure.legend(fontsize=9, loc='outside lower center')
    axis.axvline(0, color='grey', linewidth=1)
    for place, row in zip(places, rows, strict=True):
        colour = '#0072b2' if row.low > 0 else '#d55e00' if row.high < 0 else 'black'
        axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2, solid_capstyle='butt')
        axis.plot(row.difference, place, 's', color=colour, markersize=6)
    ends = [x for row in rows for x in row[1:4] if np.isfinite(x)]
    low, high = min(-equivalence, *ends, -0.01), max(equivalence, *ends, 0.01)
    margin = 0.08 * (high - low)
    axis.set(
        xlim=(low - margin, high + margin), ylim=(len(rows) - 0.4, -0.6), xlabel='difference to the control, points'
    )
    axis.set_yticks(places, [_label(row.label) for row in rows])
    right = axis.secondary_yaxis('right')
    right.set_yticks(places, [_forest_text(row) for row in rows])
    right.tick_params(length=0)
    axis.grid(axis='x', alpha=0.3)
    figure.suptitle(_wrapped(title, 10))
    return figure


def _forest_text(row: ForestRow) -> str:
    interval = f' [{row.low:+.2f}, {row.high:+.2f}]' if np.isfinite(row.low) else ''
    return f'{row.difference:+.2f}{interval}  {terminal_text(row.verdict)}'.rstrip()


class Neighbour(NamedTuple):
    """An image found for a query.

    Attributes:
        image: PIL image.
        label: its class.
        cosine: with the query.
    """

    image: Any
    label: int
    cosine: float


def draw_retrieval(examples: Sequence[tuple[Any, int, list[Neighbour]]], names: Sequence[str], title: str) -> Any:
    """Queries, one per row, and the images nearest to them: framed in green if of the query's class, else in red.

    Args:
        examples: for each query its PIL image, its label, and the images found, the nearest first.
        names: of the classes, by label.
        title: above.
    """
    columns = 1 + max(len(found) for _, _, found in examples)
    figure = _matplotlib().figure.Figure(figsize=(1.5 * columns, 1.8 * len(examples) + 0.8), layout='constrained')
    for row, (image, label, found) in zip(
        figure.subplots(len(examples), columns, squeeze=False), examples, strict=True
    ):
        cells = [(image, _short(names[label]), 'black')]
        for own in found:
            colour = '#009e73' if own.label == label else '#d55e00'  # distinct to colour-blind people, too
            cells.append((own.image, f'{_short(names[own.label])}\n{own.cosine:.3f}', colour))
        for axis in row[len(cells) :]:
            axis.set_axis_off()
        for axis, (picture, text, colour) in zip(row, cells, strict=False):
            axis.imshow(np.asarray(picture.convert('RGB')))
            axis.set(xticks=[], yticks=[])
            axis.set_title(text, fontsize=8, color=colour)
            axis.spines[:].set(color=colour, linewidth=1 if colour == 'black' else 4)
        row[0].set_ylabel('query', fontsize=9)
    figure.suptitle(_wrapped(title, 1.5 * columns))
    return figure


def _short(name: str) -> str:
    return '\n'.join(textwrap.wrap(_label(name), 18, max_lines=2, placeholder='...')) or '?'
