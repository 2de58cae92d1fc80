"""True advantages by hand, and their records."""

import json

import numpy as np
import pytest

from spa_jax import truth
from spa_jax.errors import UserError
from spa_jax.truth import Branch, StepTruth


def test_advantages_by_hand():
    rewards = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    first, second = truth.estimate(rewards, final_reward=1.0)
    # V: 1/2, 3/4, 1.  Sample variances 1/3 and 1/4, of means of four 1/12 and 1/16.
    assert (first.value, second.value) == (0.5, 0.75)
    assert (first.advantage, second.advantage) == (0.25, 0.25)
    assert first.value_error == pytest.approx((1 / 12) ** 0.5)
    assert first.advantage_error == pytest.approx((1 / 12 + 1 / 16) ** 0.5)
    assert second.advantage_error == second.value_error == pytest.approx(0.25)  # R is exact
    # An episode that a limit ended has the value 0 then.
    (lost,) = truth.estimate(np.array([[1.0, 0.0]]), final_reward=0.0)
    assert lost.advantage == -0.5
    assert truth.estimate(np.array([[0.5, 0.0]]), 0.25)[0].advantage == 0.0  # paid in part


def test_the_share_of_the_variance_that_is_no_noise():
    def step(advantage: float, error: float) -> StepTruth:
        return StepTruth(0.5, 0.0, advantage, error)

    # Advantages 0.4 and 0: variance 0.04; mean squared error (0.01 + 0.03) / 2 = 0.02.
    assert truth.reliability([[step(0.4, 0.1)], [step(0.0, 0.03**0.5)]]) == pytest.approx(0.5)
    assert truth.reliability([[step(0.2, 0.9), step(0.1, 0.9)]]) == 0.0
    assert np.isnan(truth.reliability([[step(0.2, 0.1)]])) and np.isnan(truth.reliability([]))


def test_records_are_read_back(tmp_path):
    path = tmp_path / "branches.jsonl"
    assert truth.read_branches(path) == []
    some = [Branch("t \u00e9", 0, 0, 3, b, 0.5, "failure") for b in range(2)]
    path.write_bytes(b"".join(b.line() for b in some))
    assert truth.read_branches(path) == some and some[1].key == ("t \u00e9", 0, 0, 3, 1)
    path.write_bytes(some[0].line() * 2)
    with pytest.raises(UserError, match=r"branches.jsonl:2: the branch .* is there twice"):
        truth.read_branches(path)
    path.write_bytes(some[0].line() + b'{"task": "t"}\n')
    with pytest.raises(UserError, match="branches.jsonl:2: not a branch"):
        truth.read_branches(path)


def test_advantages_are_of_one_evaluation_alone(tmp_path):
    """Two evaluations play the same games: their episodes have the same keys."""
    path = tmp_path / "truth.json"
    assert truth.read_advantages(path, "sft") == {}
    told = {("t", 0, 1): truth.estimate(np.array([[0.0, 1.0], [1.0, 1.0]]), 1.0)}
    path.write_text(json.dumps(truth.to_json(told, evaluation="sft", branches=2)))
    found = truth.read_advantages(path, "sft")
    assert found.keys() == told.keys() and found["t", 0, 1].tolist() == [0.5, 0.0]
    assert truth.read_advantages(path, "spa") == {}
    path.write_text("{}")
    with pytest.raises(UserError, match="not the truth of an evaluation"):
        truth.read_advantages(path, "sft")


def test_what_the_game_decides_by_hand():
    """Games that are won always or never, or none of which is like another: all, or nothing."""
    def starts(*values):
        return [truth.estimate(np.array([rewards]), 1.0) for rewards in values]

    assert truth.decided_at_start(starts([1, 1], [0, 0], [1, 1]), 2) == 1.0
    # V 1/2, 1/2: se^2 = 0.5 / 2, between max(0, 0 - 0.25), within 2 * 0.25.
    assert truth.decided_at_start(starts([1, 0], [0, 1]), 2) == 0.0
    # V 1, 1/2, 0: Var 1/4, mean se^2 = 0.25 / 3, between 1/6, within 1/6.
    assert truth.decided_at_start(starts([1, 1], [1, 0], [0, 0]), 2) == pytest.approx(0.5)
    assert np.isnan(truth.decided_at_start(starts([1, 0]), 2))
    assert np.isnan(truth.decided_at_start(starts([1, 1], [1, 1]), 2))
