"""Intervals of a study: known cases, degenerate ones, and how often they hold the truth."""

import math

import numpy as np
import pytest

from spa_jax.study import statistics


def _won(*counts: int, games: int = 100) -> list[np.ndarray]:
    """A seed each: so many won of so many games."""
    return [np.repeat([1.0, 0.0], [count, games - count]) for count in counts]


def test_the_mean_weighs_seeds_alike():
    found = statistics.hierarchical([np.array([1.0, 1.0]), np.array([0.0, 0.0, 0.0, 1.0])])
    assert found.value == pytest.approx((1 + 0.25) / 2)
    assert (found.seeds, found.games) == (2, 6)


def test_one_seed_is_a_binomial():
    """30 of 100: the error is sqrt(0.3 * 0.7 / 100) = 0.0458, the interval 0.30 -+ 1.96 of it."""
    found = statistics.hierarchical(_won(30))
    assert found.value == 0.3
    assert found.error == pytest.approx(0.0458, rel=0.03)
    assert (found.low, found.high) == pytest.approx((0.21, 0.39), abs=0.011)
    assert found.could_see == pytest.approx(2.8 * 0.0458, rel=0.03)


def test_seeds_that_differ_widen_it():
    """Two seeds with the means 0 and 1: a draw is 0, 1/2 or 1 with shares 1/4, 1/2 and 1/4."""
    found = statistics.hierarchical(_won(0, 100))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.error == pytest.approx(math.sqrt(1 / 8), rel=0.03)


def test_it_is_the_same_whenever_it_is_asked():
    assert statistics.hierarchical(_won(30, 40)) == statistics.hierarchical(_won(30, 40))
    assert statistics.hierarchical(_won(30, 40)) != statistics.hierarchical(_won(30, 40), seed=1)


def test_nothing_known_and_nothing_that_varies():
    nothing = statistics.hierarchical([])
    broken = statistics.hierarchical([np.array([math.nan, math.nan])])
    for found in (nothing, broken):
        assert math.isnan(found.value) and math.isnan(found.low) and (found.games == 0)
    every = statistics.hierarchical(_won(5, 5, games=5))
    assert (every.value, every.low, every.high, every.error) == (1.0, 1.0, 1.0, 0.0)
    assert math.isnan(every.could_see)  # five won games of five say nothing about the spread


def test_broken_games_are_in_no_figure():
    nan = math.nan
    one, other = np.array([1.0, nan, 0.0, 1.0]), np.array([0.0, 1.0, nan, 1.0])
    assert statistics.hierarchical([one]).value == pytest.approx(2 / 3)
    found = statistics.difference([one], [other])
    assert found.estimate.value == 0.5  # of the first and the last game
    assert (found.pairs.only_second, found.pairs.both, found.pairs.only_first) == (1, 1, 0)


def test_a_difference_is_paired():
    """The arm wins one game more in each seed, and loses none: no seed could say otherwise."""
    reference = _won(30, 60)
    arm = [values.copy() for values in reference]
    for values in arm:
        values[-5:] = 1
    found = statistics.difference(arm, reference)
    assert found.estimate.value == pytest.approx(0.05)
    assert 0 < found.estimate.low < 0.05 < found.estimate.high < 0.1
    # Ten pairs, all to one side: 2 * 2^-10.
    assert (found.pairs.only_second, found.pairs.only_first) == (10, 0)
    assert found.pairs.p_value == pytest.approx(2 * 0.5**10)
    # Unpaired, seeds of 30 and of 60 would hide it.
    assert found.estimate.error < statistics.hierarchical(reference).error / 4
    said = found.to_dict()
    assert (said["gained"], said["lost"], said["games"]) == (10, 0, 200)
    assert said["could_see"] == pytest.approx(2.8 * said["error"])


def test_an_arm_against_itself():
    found = statistics.difference(_won(3, 7, games=10), _won(3, 7, games=10))
    assert (found.estimate.value, found.estimate.low, found.estimate.high) == (0, 0, 0)
    assert found.pairs.p_value == 1


def test_arms_of_other_games_are_refused():
    with pytest.raises(ValueError, match="number of games"):
        statistics.difference(_won(3), _won(3, games=10))
    with pytest.raises(ValueError):
        statistics.difference(_won(3, 4), _won(3))


@pytest.mark.parametrize(("seeds", "least"), [(10, 0.93), (3, 0.85)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, least):
    """Arms that differ by 4 points on the mean, by more or less in a seed (spread 3 points).

    Ten seeds hold it at least 95% of the time, with room for chance; three, which a bootstrap
    cannot know well, somewhat less often.
    """
    rng = np.random.default_rng(5)
    truth, studies, held = 0.04, 300, 0
    for study in range(studies):
        shift = rng.normal(truth, 0.03, seeds)
        reference = (rng.random((seeds, 100)) < 0.5).astype(float)
        arm = (rng.random((seeds, 100)) < 0.5 + shift[:, None]).astype(float)
        found = statistics.difference(list(arm), list(reference), draws=1000, seed=study)
        held += found.estimate.low <= truth <= found.estimate.high
    assert least <= held / studies
    assert held / studies < 1  # it is no interval that holds everything
