"""Tests over seeds: against scipy's own functions, against numbers computed by hand, and what is never claimed."""

import math
import re

import numpy as np
import pytest

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
    assert statistics.show_values([90.0, 91.0, 95.0]) == '92.00 ± 3.00'
    assert statistics.show_values([90.126]) == '90.13' and statistics.show_values([]) == '-'


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
