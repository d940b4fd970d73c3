"""Values over several seeds: how they are printed, and whether they differ from others by more than chance."""

import statistics
import warnings

from scipy import stats

__all__ = ['LEVEL', 'difference', 'margin', 'one_sample', 'show_values', 'show_printed', 'welch']

LEVEL = 0.05  # how often a difference may be claimed where there is none


def show_values(values: list[float]) -> str:
    """Mean and largest deviation from it, as the papers print them; a single value as it is."""
    return show_printed((statistics.fmean(values), margin(values) if len(values) > 1 else None) if values else None)


def show_printed(value: tuple[float, float | None] | None) -> str:
    """A mean and the largest deviation from it, where a paper prints one: ``'98.52 ± 0.09'``; ``'-'`` for none."""
    if value is None:
        return '-'
    mean, largest = value
    return f'{mean:.2f}' + (f' ± {largest:.2f}' if largest is not None else '')


def margin(values: list[float]) -> float:
    """Largest deviation from the mean: what CC-Loss prints behind the ±."""
    mean = statistics.fmean(values)
    return max(abs(value - mean) for value in values)


def one_sample(values: list[float], constant: float) -> float | None:
    """Two-sided p of Student's t-test that the mean of what the values are drawn from is a constant.

    None from fewer than two values, or if all are equal, which says nothing about their spread.
    """
    if len({*values}) < 2:
        return None
    return float(stats.ttest_1samp(values, constant).pvalue)


def welch(first: list[float], second: list[float]) -> float | None:
    """Two-sided p of Welch's t-test that two sets of values are drawn from distributions of one mean.

    None from fewer than two values a side, or if all are equal on both sides.
    """
    if min(len(first), len(second)) < 2 or len({*first}) == len({*second}) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of values that are almost equal
        return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def difference(first: list[float], second: list[float], comparisons: int = 1) -> str:
    """Whether the means of two sets of values differ, as text.

    Welch's t-test at 5 % divided by the number of comparisons (Bonferroni). Nothing is claimed from fewer than two
    values a side, nor where all of them are equal on both sides.
    """
    if min(len(first), len(second)) < 2:
        return 'one seed, no test'
    p = welch(first, second)
    if p is None or not p < LEVEL / comparisons:
        return 'no difference shown' + (f' (p = {p:.2g})' if p is not None else '')
    return f'{statistics.fmean(first) - statistics.fmean(second):+.2f} (p = {p:.2g})'
