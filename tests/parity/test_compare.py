"""Errors measured by their tolerances."""

import math

import numpy as np
import pytest

from spa_jax.parity import compare
from spa_jax.parity.compare import EXACT, Comparison, Tolerance, largest_error

NAN, INF = math.nan, math.inf


def test_the_element_that_takes_most_of_its_tolerance():
    recorded = np.array([[1.0, 100.0], [0.0, 2.0]])
    ours = recorded + [[0.01, 0.1], [0.0, 0.02]]
    error = largest_error("x", ours, recorded, Tolerance(absolute=0.01, relative=0.01))
    assert error.name == "x[1, 1]"
    assert error.error == pytest.approx(0.02)
    assert error.allowed == pytest.approx(0.03)
    assert error.share == pytest.approx(2 / 3)
    largest = largest_error("x", ours, recorded, Tolerance(of_largest=0.001))
    assert (largest.name, largest.allowed) == ("x[0, 1]", pytest.approx(0.1))
    loose = largest_error("x", ours, recorded, EXACT, slack=np.full((2, 2), 0.2))
    assert loose.share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ours", "recorded", "share"),
    [
        ([NAN, INF, 1.0], [NAN, INF, 1.0], 0),
        ([NAN, 1.0], [0.0, 1.0], INF),
        ([0.0, 1.0], [NAN, 1.0], INF),
        ([INF], [-INF], INF),
        ([1.0, 2.0], [1.0], INF),
        (["a", "b"], ["a", "b"], 0),
        (["a", "c"], ["a", "b"], INF),
        ([], [], 0),
        ([3], [4], INF),
    ],
)
def test_not_a_number_equals_itself_only(ours, recorded, share):
    assert largest_error("x", ours, recorded, EXACT).share == share


def test_what_makes_a_case_miss():
    found = Comparison()
    assert found.misses  # nothing was compared
    found.add("a", 1.0, 1.0, EXACT)
    assert not found.misses
    other = found.copy()
    other.add("b", [1.0, 1.5], [1.0, 1.0], compare.FORWARD)
    assert [line.split(":")[0] for line in other.misses] == ["b[1]"]
    assert other.compared == {"a", "b"}
    assert not found.misses
    found.failures.append("wrong")
    assert found.misses == ["wrong"]


def test_behind_the_scores_there_is_nothing():
    found = Comparison()
    scores = np.array([[1.0, 2.0], [3.0, NAN]])
    compare.check_padding(found, "scores", scores, np.array([2, 1]))
    assert not found.misses
    compare.check_padding(found, "scores", scores, np.array([1, 1]))
    assert found.misses
