"""Tests over seeds: against scipy's own functions, against numbers computed by hand, and what is never claimed."""

import math

import numpy as np
import pytest
from scipy import stats

from ccl_timm.experiments import statistics
from ccl_timm.experiments.statistics import differ, holm, show_difference, verdicts


def by_seed(*values, first=0):
    return dict(enumerate(values, first))


@pytest.mark.parametrize(
    'first, second, shown',
    [
        ((90.0, 90.1, 90.2), (80.0, 80.1, 80.3), '+9.97 [+9.82, +10.11] better'),
        ((80.0, 80.2), (90.0, 90.15), '-9.98 [-10.29, -9.66] worse'),
        ((90.0, 91.0, 92.0), (90.5, 91.0, 91.5), '+0.00 [-1.24, +1.24] no difference shown; 1.63 would have been'),
        ((90.1, 90.2, 90.3), (90.1, 90.25, 90.25), '+0.00 [-0.12, +0.12] equal within 0.5'),
        ((90.0,), (10.0,), 'one seed, no test'),
        ((90.0, 90.0), (80.0, 80.0), 'no spread, no test'),
        ((90.1, 90.2), (90.0, 90.1), 'no spread, no test'),  # but for rounding
        ((90.0, 90.0), (90.0, 90.0), 'identical'),
    ],
)
def test_difference_is_claimed_only_where_it_shows(first, second, shown):
    (found,) = verdicts([differ(by_seed(*first), by_seed(*second))])
    assert show_difference(found) == shown


def test_values_are_shown_with_their_standard_deviation():
    assert statistics.show_values([90.0, 91.0, 95.0]) == '92.00 ± 2.65'  # sqrt((4 + 1 + 9) / 2)
    assert statistics.show_values([90.126]) == '90.13' and statistics.show_values([]) == '-'


def test_one_sample_by_hand():
    """Values 1, 2, 3 against 0: t = 2 / (1 / sqrt 3), and with two degrees of freedom p = 1 - t / sqrt(2 + t^2)."""
    t = 2 * math.sqrt(3)
    assert statistics.one_sample([1.0, 2.0, 3.0], 0.0) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert statistics.one_sample([3.0], 0.0) is None and statistics.one_sample([3.0, 3.0], 0.0) is None


def test_pairs_are_tested_by_student_and_others_by_welch():
    random = np.random.default_rng(0)
    first, second = random.normal(1, 2, 5), random.normal(0, 1, 5)
    paired, unpaired = differ(by_seed(*first), by_seed(*second)), differ(by_seed(*first), by_seed(*second, first=3))
    expected = stats.ttest_rel(first, second)
    assert paired.p == pytest.approx(expected.pvalue)
    assert paired.interval == pytest.approx(expected.confidence_interval(0.95))
    expected = stats.ttest_ind(first, second, equal_var=False)
    assert unpaired.p == pytest.approx(expected.pvalue)
    assert unpaired.interval == pytest.approx(expected.confidence_interval(0.95))


def test_equivalence_is_two_one_sided_tests():
    random = np.random.default_rng(0)
    first, second = random.normal(0.1, 0.2, 6), random.normal(0, 0.2, 6)
    sides = [
        stats.ttest_1samp(first - second, limit, alternative=side).pvalue
        for limit, side in ((-0.5, 'greater'), (0.5, 'less'))
    ]
    assert differ(by_seed(*first), by_seed(*second)).p_unequal == pytest.approx(max(sides))
    wide = differ(by_seed(*first), by_seed(*second), within=5.0)
    assert wide.p_unequal < 1e-5 < differ(by_seed(*first), by_seed(*second), within=0.1).p_unequal


def test_holm_by_hand():
    """Of 0.01, 0.04, 0.03: three times the least, twice the next, and never less than the one before."""
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


def test_more_tests_make_a_claim_harder():
    """p is 0.03: shown by itself, and not among four."""
    some, other = by_seed(90.0, 90.5, 91.2, 90.6), by_seed(89.0, 89.9, 89.5, 89.8)
    alone = verdicts([differ(some, other)])[0]
    assert 0.0125 < alone.p < 0.05
    same = by_seed(89.5, 89.1, 90.1, 89.8)
    among = verdicts([differ(some, other), *[differ(same, other)] * 3])[0]
    assert alone.verdict == 'better' and among.verdict == 'no difference shown'
    assert among.p == pytest.approx(4 * alone.p) and among.detectable > alone.detectable


def test_a_detectable_difference_is_found_in_four_of_five_cases():
    random, size, spread = np.random.default_rng(0), 6, 0.7
    least = statistics.detectable(spread / math.sqrt(size), size - 1)
    drawn = random.normal(least, spread, (20_000, size))
    assert np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)
