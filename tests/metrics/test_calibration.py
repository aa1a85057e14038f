"""Best-of-N and calibration: metrics/formulas.py against enumeration and cases worked out by hand."""

import math
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from metrics.formulas import (
    best_of_n,
    brier_score,
    calibration_edges,
    expected_calibration_error,
    pass_at_k,
    reliability,
)

ANSWERS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=30)

# ---- pass_at_k and best_of_n


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            has_correct = [min(subset) < c for subset in combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(np.mean(has_correct), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """In a subset whose highest reward is that of several samples, each of these is chosen equally often."""
    generator = np.random.default_rng(n)
    for _ in range(30):
        correct, reward = generator.integers(2, size=n), generator.integers(4, size=n) / 3
        for k in range(1, n + 1):
            chosen = []
            for subset in map(list, combinations(range(n), k)):
                chosen.append(correct[subset][reward[subset] == reward[subset].max()].mean())
            assert best_of_n(correct, reward, k) == pytest.approx(np.mean(chosen), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=1, max_size=40))
def test_best_of_n_lies_between_no_sample_correct_and_any_sample_correct(samples):
    correct, reward = np.array(samples).T
    n, c = len(correct), int(correct.sum())
    rates = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert rates[0] == pytest.approx(c / n) and rates[-1] == (c > 0)
    assert all(0 <= a <= b <= 1 for a, b in pairwise(rates))
    for k, rate in enumerate(rates, 1):
        assert best_of_n(correct, correct, k) == pytest.approx(rate, abs=1e-12)  # the perfect reward
        assert best_of_n(correct, np.zeros(n), k) == pytest.approx(c / n, abs=1e-12)
        assert -1e-12 <= best_of_n(correct, reward, k) <= rate + 1e-12
        assert best_of_n(correct[::-1], reward[::-1], k) == pytest.approx(best_of_n(correct, reward, k))


@pytest.mark.parametrize(("c", "k"), [(1, 1), (1, 5000), (3, 64), (5000, 2), (5000, 5000), (9999, 1)])
def test_ten_thousand_samples_do_not_overflow(c, k):
    n = 10_000
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-9)
    correct, reward = np.zeros(n), np.arange(n)
    correct[-c] = 1  # the sample with the c-th highest reward
    exact = Fraction(math.comb(n - c, k - 1), math.comb(n, k))
    assert best_of_n(correct, reward, k) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_numbers(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("correct", "reward", "k"), [([1], [1, 2], 1), ([1, 0], [1, 2], 3), ([1], [1], 0), ([], [], 1)]
)
def test_best_of_n_refuses_impossible_numbers(correct, reward, k):
    with pytest.raises(ValueError, match=f"n = {len(correct)}, k = {k}"):
        best_of_n(correct, reward, k)


def test_best_of_n_refuses_a_reward_of_nan():
    with pytest.raises(ValueError, match="nan"):
        best_of_n([1, 0], [1, float("nan")], 1)


# ---- calibration


def test_edges_belong_to_the_bin_below_them():
    tenths = np.array([k / 10 for k in range(11)])  # as parsed from text; np.linspace gives other floats
    for k, confidence in enumerate(tenths):
        counts = reliability([confidence], [1], calibration_edges(tenths, 10))[:, 0]
        assert counts.argmax() == max(0, k - 1) and counts.sum() == 1
        above = np.nextafter(confidence, 2)
        if k < 10:
            assert reliability([above], [1], calibration_edges(tenths, 10))[k, 0] == 1


def test_calibration_error_by_hand():
    confidence, correct = np.array([0.3, 0.25, 0.7, 0, 1, 0.65]), np.array([1, 0, 1, 0, 1, 0])
    rows = reliability(confidence, correct, calibration_edges(confidence, 10))
    expected = np.full((10, 3), math.nan)
    expected[:, 0] = 0
    expected[[0, 2, 6, 9]] = [[1, 0, 0], [2, 0.275, 0.5], [2, 0.675, 0.5], [1, 1, 1]]
    np.testing.assert_allclose(rows, expected)
    error = (2 * 0.225 + 2 * 0.175) / 6
    assert expected_calibration_error(confidence, correct) == pytest.approx(error)
    # four bins: {0, 0.25}, {0.3}, {0.65, 0.7}, {1}
    error = (2 * 0.125 + 0.7 + 2 * 0.175 + 0) / 6
    assert expected_calibration_error(confidence, correct, bins=4) == pytest.approx(error)
    # three bins of equal mass: {0, 0.25}, {0.3, 0.65}, {0.7, 1}
    error = (2 * 0.125 + 2 * 0.025 + 2 * 0.15) / 6
    assert expected_calibration_error(confidence, correct, 3, equal_mass=True) == pytest.approx(error)
    for equal_mass in (False, True):
        one_bin = expected_calibration_error(confidence, correct, 1, equal_mass)
        assert one_bin == pytest.approx(abs(correct.mean() - confidence.mean()))


@pytest.mark.parametrize("n", [10, 30, 70, 230])
def test_bins_of_equal_mass_hold_equally_many_values(n):
    confidence = np.random.default_rng(n).random(n)
    rows = reliability(confidence, np.ones(n), calibration_edges(confidence, 10, equal_mass=True))
    assert rows[:, 0].tolist() == [n / 10] * 10


def test_equal_values_share_a_bin_of_equal_mass():
    confidence, correct = np.repeat([0.1, 0.2, 0.9], [4, 2, 2]), np.array([1, 0, 0, 0, 1, 0, 1, 1])
    edges = calibration_edges(confidence, 4, equal_mass=True)
    assert edges.tolist() == [0, 0.1, 0.2, 1]
    assert reliability(confidence, correct, edges)[:, 0].tolist() == [4, 2, 2]
    error = (4 * 0.15 + 2 * 0.3 + 2 * 0.1) / 8
    assert expected_calibration_error(confidence, correct, 4, equal_mass=True) == pytest.approx(error)
    for value in (0.0, 0.5, 1.0):
        same = np.full(3, value)
        rows = reliability(same, same, calibration_edges(same, 10, equal_mass=True))
        assert rows[rows[:, 0] > 0].tolist() == [[3, value, value]]


def test_calibrated_confidences_have_no_error():
    """Of ten answers given with confidence j/10, j are right."""
    confidence = np.repeat(np.arange(11) / 10, 10)
    correct = np.concatenate([np.arange(10) < j for j in range(11)])
    for equal_mass in (False, True):
        assert expected_calibration_error(confidence, correct, 10, equal_mass) == pytest.approx(0, abs=1e-12)
        wrong = expected_calibration_error(confidence, ~correct, 10, equal_mass)
        assert wrong == pytest.approx(np.abs(1 - 2 * confidence).mean())


@given(ANSWERS, st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_calibration_error_is_a_mean_over_the_rows_of_reliability(answers, bins, equal_mass, random):
    confidence, correct = np.array(answers).T
    edges = calibration_edges(confidence, bins, equal_mass)
    assert edges[0] == 0 and edges[-1] == 1 and (np.diff(edges) > 0).all() and len(edges) <= bins + 1
    count, mean, share = reliability(confidence, correct, edges).T
    used = count > 0
    assert count.sum() == len(answers) and np.isnan(mean[~used]).all() and np.isnan(share[~used]).all()
    assert count[used] @ mean[used] == pytest.approx(confidence.sum())
    assert count[used] @ share[used] == pytest.approx(correct.sum())
    in_bin = (mean[used] <= edges[1:][used] + 1e-12) & (mean[used] >= edges[:-1][used] - 1e-12)
    assert in_bin.all()
    error = expected_calibration_error(confidence, correct, bins, equal_mass)
    assert 0 <= error <= 1
    assert error == pytest.approx(sum(count[used] * abs(share - mean)[used]) / len(answers))
    shuffled = np.array(random.sample(answers, len(answers))).T
    assert expected_calibration_error(*shuffled, bins, equal_mass) == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("confidence", [-0.1, 1.1, math.nan])
def test_confidences_outside_the_unit_interval_are_refused(confidence):
    with pytest.raises(ValueError, match="outside"):
        expected_calibration_error(np.array([0.5, confidence]), np.array([0, 1]))
    with pytest.raises(ValueError, match="at least one"):
        expected_calibration_error(np.array([]), np.array([]))


# ---- Brier score


def test_brier_score_is_that_of_scikit_learn():
    probs = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0, 0.05, 0.95], [1 / 3, 1 / 3, 1 / 3]])
    labels = np.array([0, 1, 2, 2])
    assert brier_score(probs, labels) == pytest.approx(
        brier_score_loss(labels, probs, scale_by_half=False), abs=1e-12
    )
    p, is_one = np.array([0.1, 0.8, 0.35, 1, 0.6]), np.array([0, 1, 1, 1, 0])
    binary = brier_score(np.stack([1 - p, p], 1), is_one)
    assert binary == pytest.approx(2 * brier_score_loss(is_one, p), abs=1e-12)


@given(st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=8), st.data())
def test_brier_score_equals_its_definition(weights, data):
    probs = np.array([np.array(w) / sum(w) for w in weights])
    labels = np.array([data.draw(st.integers(0, 3)) for _ in weights])
    squares = [
        (p - (k == label)) ** 2 for row, label in zip(probs, labels, strict=True) for k, p in enumerate(row)
    ]
    score = brier_score(probs, labels)
    assert score == pytest.approx(sum(squares) / len(probs)) and 0 <= score <= 2
    assert brier_score(np.full((1, 4), 1 / 4), labels[:1]) == pytest.approx(1 - 1 / 4)


def test_brier_score_of_certain_answers_and_of_no_probabilities():
    certain = np.eye(3)
    assert brier_score(certain, np.array([0, 1, 2])) == 0
    assert brier_score(certain, np.array([1, 2, 0])) == 2
    for label in (-1, 3):  # a label counted from 1, for example
        with pytest.raises(ValueError, match="label"):
            brier_score(certain, np.array([0, 1, label]))
    with pytest.raises(ValueError, match="distribution"):
        brier_score(np.array([[1.5, -0.5]]), np.array([0]))
    with pytest.raises(ValueError, match="distribution"):
        brier_score(np.array([[0.5, 0.4]]), np.array([0]))
