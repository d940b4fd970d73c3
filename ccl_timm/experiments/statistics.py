"""Figures of several seeds: how they are printed, and whether they differ from others by more than chance."""

import math
import statistics
import warnings

__all__ = ['LEVEL', 'difference', 'margin', 'one_sample', 'p_bounds', 'show_figures', 'show_printed', 'welch']

LEVEL = 0.05  # how often a difference may be claimed where there is none


def show_figures(values: list[float]) -> str:
    """Mean and largest deviation from it, as the papers print them; one figure as it is."""
    return show_printed((statistics.fmean(values), margin(values) if len(values) > 1 else None) if values else None)


def show_printed(figure: tuple[float, float | None] | None) -> str:
    """A mean and the largest deviation from it, where a paper prints one: ``'98.52 ± 0.09'``; ``'-'`` for none."""
    if figure is None:
        return '-'
    mean, largest = figure
    return f'{mean:.2f}' + (f' ± {largest:.2f}' if largest is not None else '')


def margin(values: list[float]) -> float:
    """Largest deviation from the mean: what CC-Loss prints behind the ±."""
    mean = statistics.fmean(values)
    return max(abs(value - mean) for value in values)


def one_sample(values: list[float], constant: float) -> float | None:
    """Two-sided p of Student's t-test that the mean of what the values are drawn from is a constant.

    None from fewer than two values, or if all are equal, which tells nothing about their spread.
    """
    if len({*values}) < 2:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(values, constant).pvalue)


def welch(first: list[float], second: list[float]) -> float | None:
    """Two-sided p of Welch's t-test that two sets of values are drawn from distributions of one mean.

    None from fewer than two values a side, or if all are equal on both sides.
    """
    if min(len(first), len(second)) < 2 or len({*first}) == len({*second}) == 1:
        return None
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of figures that are almost equal
        return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def difference(first: list[float], second: list[float], comparisons: int = 1) -> str:
    """Whether the means of two sets of values differ, in words.

    Welch's t-test at 5 % divided by the number of comparisons (Bonferroni). Nothing is claimed from fewer than two
    values a side, nor where all of them are equal on both sides.
    """
    if min(len(first), len(second)) < 2:
        return 'one seed, no test'
    p = welch(first, second)
    if p is None or not p < LEVEL / comparisons:
        return 'no difference shown' + (f' (p = {p:.2g})' if p is not None else '')
    return f'{statistics.fmean(first) - statistics.fmean(second):+.2f} (p = {p:.2g})'


def p_bounds(mean: float, margin: float, constant: float, count: int) -> tuple[float, float]:
    """Smallest and largest p of :func:`one_sample` that values of a printed mean and largest deviation can have.

    The deviations d sum to 0 and the largest is m, so that their squares sum to m^2 n / (n - 1) at least (one is m, the
    others share -m) and to m^2 n, or m^2 (n - 1) for odd n, at most (half are m, half are -m). From the sum S of
    squares, t = (mean - constant) / sqrt(S / (n - 1) / n).

    Args:
        mean: of the values.
        margin: m > 0.
        constant: what they are tested against.
        count: n >= 2, how many there are.
    """
    from scipy import stats

    squares = margin**2 * count / (count - 1), margin**2 * (count - count % 2)
    errors = [math.sqrt(total / (count - 1) / count) for total in squares]
    low, high = (float(2 * stats.t.sf(abs(mean - constant) / error, count - 1)) for error in errors)
    return low, high
