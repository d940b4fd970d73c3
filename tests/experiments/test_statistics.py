"""Tests over seeds: against scipy's own functions, against numbers computed by hand, and what is never claimed."""

import math
import re

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from ccl_timm.experiments import statistics


@pytest.mark.parametrize(
    'first, second, comparisons, words',
    [
        ([90.0, 90.1, 90.2], [80.0, 80.1, 80.3], 1, r'\+9\.97 \(p = .*\)'),
        ([80.0, 80.2], [90.0, 90.1], 1, r'-9\.95 \(p = .*\)'),
        ([90.0, 91.0, 92.0], [90.5, 91.0, 91.5], 1, r'no difference shown \(p = 1\)'),
        ([90.0, 90.5, 91.2], [88.0, 89.4, 89.2], 1, r'\+1\.70 \(p = 0\.041\)'),
        ([90.0, 90.5, 91.2], [88.0, 89.4, 89.2], 4, r'no difference shown \(p = 0\.041\)'),
        ([90.0], [10.0], 1, 'one seed, no test'),
        ([90.0, 90.0], [80.0, 80.0], 1, r'no difference shown.*'),
    ],
)
def test_difference_is_claimed_only_where_it_shows(first, second, comparisons, words):
    assert re.fullmatch(words, statistics.difference(first, second, comparisons))


def test_margin_is_the_largest_deviation():
    assert statistics.margin([90.0, 91.0, 95.0]) == 3.0  # mean 92
    assert statistics.show_figures([90.0, 91.0, 95.0]) == '92.00 ± 3.00'
    assert statistics.show_figures([90.126]) == '90.13' and statistics.show_figures([]) == '-'


def test_one_sample_by_hand():
    """Values 1, 2, 3 against 0: t = 2 / (1 / sqrt 3), and with two degrees of freedom p = 1 - t / sqrt(2 + t^2)."""
    t = 2 * math.sqrt(3)
    assert statistics.one_sample([1.0, 2.0, 3.0], 0.0) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert statistics.one_sample([3.0], 0.0) is None and statistics.one_sample([3.0, 3.0], 0.0) is None


def test_welch_by_hand():
    """Equal spreads and sizes: Student's t with 2 n - 2 degrees of freedom, here t = 2 and p from its integral."""
    first, second = (
        [1.0, 2.0, 3.0],
        [1.0 - 2 * math.sqrt(2 / 3), 2.0 - 2 * math.sqrt(2 / 3), 3.0 - 2 * math.sqrt(2 / 3)],
    )
    x = np.linspace(2, 2000, 4_000_001)
    tail = np.trapezoid(3 / 8 * (1 + x**2 / 4) ** -2.5, x)  # density of Student's t with four degrees of freedom
    assert statistics.welch(first, second) == pytest.approx(2 * tail, rel=1e-4)
    assert statistics.welch([1.0], second) is None and statistics.welch([1.0, 1.0], [2.0, 2.0]) is None


@pytest.mark.parametrize('count', [2, 3, 4, 5, 6])
def test_p_bounds_hold_every_p_of_that_mean_and_margin(count):
    """Deviations are drawn at random, and the extremes are sought by a general optimizer."""
    mean, margin, constant = 98.5, 0.09, 98.45
    low, high = statistics.p_bounds(mean, margin, constant, count)
    random, found = np.random.default_rng(0), []
    for _ in range(500):
        deviations = random.normal(size=count)
        deviations -= deviations.mean()
        values = mean + margin * deviations / np.abs(deviations).max()
        found.append(stats.ttest_1samp(values, constant).pvalue)
    assert low * (1 - 1e-9) <= min(found) and max(found) <= high * (1 + 1e-9)
    for bound, sign in ((low, 1), (high, -1)):
        best = min(_extreme_squares(count, sign, random) for _ in range(20))
        spread = margin * math.sqrt(sign * best / (count - 1))
        p = 2 * stats.t.sf(abs(mean - constant) / (spread / math.sqrt(count)), count - 1)
        assert p == pytest.approx(bound, rel=1e-4)


def _extreme_squares(count, sign, random):
    """Smallest (sign 1) or largest (-1) sum of squares, times the sign, of deviations whose first is 1."""
    constraints = [{'type': 'eq', 'fun': lambda d: d.sum()}, {'type': 'eq', 'fun': lambda d: d[0] - 1}]
    start = random.uniform(-1, 1, count)
    found = minimize(lambda d: sign * (d**2).sum(), start, bounds=[(-1, 1)] * count, constraints=constraints)
    return found.fun if found.success else math.inf
