"""Values over several seeds: how they are printed, and whether they differ from others by more than chance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import optimize, stats

__all__ = [
    'EQUIVALENCE', 'LEVEL', 'POWER', 'Difference', 'detectable', 'differ', 'holm', 'one_sample',
    'show_difference', 'show_printed', 'show_values', 'verdicts',
]  # fmt: skip

LEVEL = 0.05  # how often a difference may be claimed where there is none
POWER = 0.8  # how often a difference that is as large as stated is found
_HUGE = 20.0  # points: nobody needs a test to see such a difference
EQUIVALENCE = 0.5  # points of accuracy within which two losses count as equal


def show_values(values: Sequence[float]) -> str:
    """Mean and standard deviation; a single value as it is, ``'-'`` for none."""
    return show_printed(
        (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None) if values else None
    )


def show_printed(value: tuple[float, float | None] | None) -> str:
    """A mean and what stands behind the ±, where a paper prints one: ``'98.52 ± 0.09'``; ``'-'`` for none."""
    if value is None:
        return '-'
    mean, spread = value
    return f'{mean:.2f}' + (f' ± {spread:.2f}' if spread is not None else '')


def one_sample(values: Sequence[float], constant: float) -> float | None:
    """Two-sided p of Student's t-test that the mean of what the values are drawn from is a constant.

    None from fewer than two values, or if all are equal, which says nothing about their spread.
    """
    if len({*values}) < 2:
        return None
    return float(stats.ttest_1samp(values, constant).pvalue)


@dataclass(frozen=True)
class Difference:
    """By how much one set of values is above another, and what can be said about that.

    Attributes:
        mean: of the difference.
        error: its standard error; None from fewer than two values a side.
        freedom: degrees of freedom of the test.
        p: two-sided, that there is no difference; None without a test. :func:`verdicts` adjusts it for all tests made.
        p_unequal: that the difference is at least as large as the margin of equivalence; likewise.
        detectable: the smallest difference that this number of runs finds with a probability of 80%; likewise.
        verdict: ``'better'``, ``'worse'``, ``'equal'`` (within the margin), ``'no difference shown'``, or why there is
            no test.
    """

    mean: float
    error: float | None = None
    freedom: float = 0.0
    p: float | None = None
    p_unequal: float | None = None
    detectable: float | None = None
    verdict: str = 'one seed, no test'

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of this difference by itself."""
        if not self.error:
            return None
        reach = float(stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.error
        return self.mean - reach, self.mean + reach


def differ(first: Mapping[int, float], second: Mapping[int, float], within: float = EQUIVALENCE) -> Difference:
    """Compare values by seed: runs of the same seed are pairs, as they share data order and initial weights.

    Student's t-test of the differences where every seed has its pair, Welch's test otherwise. Equivalence is tested by
    two one-sided tests (TOST). Nothing is claimed from fewer than two values a side, or from values without spread.

    Args:
        first: values by seed.
        second: of the control.
        within: margin of equivalence.
    """
    mean = statistics.fmean(first.values()) - statistics.fmean(second.values())
    error, freedom = _standard_error(first, second)
    if not error:
        without = 'no spread, no test' if mean else 'identical'
        return Difference(mean, error, verdict='one seed, no test' if error is None else without)
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    p_unequal = float(stats.t.sf((within - abs(mean)) / error, freedom))
    return Difference(mean, error, freedom, p, p_unequal, detectable(error, freedom), 'no difference shown')


def _standard_error(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float | None, float]:
    """Standard error of the difference of the means, and its degrees of freedom; None from too few values."""
    if min(len(first), len(second)) < 2:
        return None, 0
    if first.keys() == second.keys():
        pairs = [round(value - second[seed], 9) for seed, value in first.items()]  # 90.1 - 90.0 is not 90.2 - 90.1
        return statistics.stdev(pairs) / math.sqrt(len(pairs)), len(pairs) - 1
    parts = [statistics.variance(values.values()) / len(values) for values in (first, second)]
    if not sum(parts):
        return 0.0, 0
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return math.sqrt(sum(parts)), sum(parts) ** 2 / below


def detectable(error: float, freedom: float, level: float = LEVEL) -> float:
    """The smallest difference that a two-sided t-test finds with a probability of 80%.

    Args:
        error: standard error of the difference.
        freedom: degrees of freedom.
        level: of the test.
    """
    critical = stats.t.ppf(1 - level / 2, freedom)
    found = optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - POWER, 0, 10 * critical + 10)
    return float(found) * error


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of the p values of one family; None stays, and does not count."""
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def verdicts(differences: Sequence[Difference]) -> list[Difference]:
    """Say what each difference shows, all of them as one family: p values are Holm's.

    Differences and equivalences are two families, each at 5%. ``detectable`` becomes that of the strictest test.
    """
    tests = sum(difference.p is not None for difference in differences)
    ps, unequal = holm([d.p for d in differences]), holm([d.p_unequal for d in differences])
    return [_judged(d, p, q, tests) for d, p, q in zip(differences, ps, unequal, strict=True)]


def _judged(found: Difference, p: float | None, p_unequal: float | None, tests: int) -> Difference:
    if not found.error or p is None or p_unequal is None:
        return found
    verdict = 'equal' if p_unequal < LEVEL else 'no difference shown'
    if p < LEVEL:
        verdict = 'better' if found.mean > 0 else 'worse'
    least = detectable(found.error, found.freedom, LEVEL / tests)
    return replace(found, p=p, p_unequal=p_unequal, detectable=least, verdict=verdict)


def show_difference(found: Difference, within: float = EQUIVALENCE) -> str:
    """A difference, its interval and its verdict as text."""
    if found.interval is None:
        return found.verdict
    low, high = found.interval
    verdict = f'equal within {within:g}' if found.verdict == 'equal' else found.verdict
    if found.verdict == 'no difference shown':
        verdict += f'; {found.detectable:.2f} would have been' if found.detectable < _HUGE else '; too few seeds'
    return f'{found.mean:+.2f} [{low:+.2f}, {high:+.2f}] {verdict}'
