import dataclasses
import json
import math

import numpy as np
import pytest

from spa_jax import evaluation
from spa_jax.trajectory import Status, Step, Trajectory


def episode(task, status, *, grounded=(True,), reward=None, task_type="look", seed=0):
    steps = tuple(Step("You see a mug.", "look", "look", grounded=g) for g in grounded)
    if reward is None:
        reward = 1.0 if status is Status.SUCCESS else 0.0
    return Trajectory(
        env="alfworld", task=task, split="valid", seed=seed, attempt=0, policy="p",
        status=status, final_reward=reward, instruction="", steps=steps, task_type=task_type,
    )


WON, LOST, BROKEN = Status.SUCCESS, Status.FAILURE, Status.ENV_ERROR


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # p = 0.8, n = 10: (0.8 + 0.19208 -+ 0.24791) / 1.38416.
        (8, 10, 0.4902, 0.9433),
        # z^2 / (n + z^2) = 3.8416 / 13.8416.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        # 0.5 -+ 1.96 / sqrt(100 + 3.8416) / 2.
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval_by_hand(successes, n, low, high):
    assert evaluation.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_of_nothing_is_everything():
    assert evaluation.wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_stays_inside_and_holds_the_rate():
    for n in (1, 2, 7, 500):
        for k in range(n + 1):
            low, high = evaluation.wilson_interval(k, n)
            assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize("successes, n", [(-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        evaluation.wilson_interval(successes, n)


def test_summary_by_hand():
    summary = evaluation.summarize([
        episode("a", WON, grounded=(True, False, True), task_type="pick"),
        episode("b", LOST, grounded=(False,), task_type="pick"),
        episode("c", Status.MAX_STEPS, grounded=(True,) * 4, task_type="heat", reward=0.5),
        episode("d", BROKEN, grounded=(False,) * 9, task_type="cool", reward=0.0),
    ])
    assert summary.games == 3
    assert summary.success_rate == pytest.approx(1 / 3)
    assert summary.mean_reward == pytest.approx(0.5)
    # Over steps, not a mean of the episodes' means: 6 of 8.
    assert (summary.grounded_steps, summary.steps) == (6, 8)
    assert summary.grounding == pytest.approx(0.75)
    assert summary.mean_steps == pytest.approx(8 / 3)
    assert summary.env_errors == 1
    assert summary.by_status == {"success": 1, "failure": 1, "max_steps": 1}
    assert summary.by_task_type == {
        "heat": evaluation.Proportion(0, 1), "pick": evaluation.Proportion(1, 2)
    }


def test_full_reward_without_success_is_no_win():
    assert evaluation.summarize([episode("a", LOST, reward=1.0)]).success_rate == 0


def test_summary_survives_json_even_when_empty():
    empty = evaluation.summarize([episode("a", BROKEN)]).to_dict()
    assert json.loads(json.dumps(empty, allow_nan=False)) == empty
    assert empty["games"] == 0 and empty["success"]["rate"] is None and empty["env_errors"] == 1
    one = evaluation.summarize([episode("a", WON)]).to_dict()
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert one["success"]["rate"] == 1 and one["grounding"] == 1


def test_table_is_markdown_in_the_given_order():
    rows = {
        "base": evaluation.summarize([episode("a", WON), episode("b", LOST, grounded=(False,))]),
        "SPA": evaluation.summarize([episode("a", WON), episode("b", WON)]),
    }
    lines = evaluation.table(rows).split("\n")
    titles = "| policy | games | played | failed | success | 95% interval | reward |"
    assert lines[0].split() == titles.split() + [
        "grounding", "|", "steps", "|"
    ]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "base", "2", "2", "0", "50.0%", "9.5 - 90.5%", "0.500", "50.0%", "1.0"
    ]
    assert lines[3].startswith("| SPA ")
    assert len({len(line) for line in lines}) == 1


def test_the_table_counts_what_has_no_outcome():
    rows = {
        "base": evaluation.summarize([episode("a", BROKEN)], failed=2, left_out=1),
        "SPA": evaluation.summarize([episode("a", WON)]),
    }
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in evaluation.table(rows).split("\n")
    ]
    assert lines[0][:4] == ["policy", "games", "played", "failed"] and lines[0][-1] == "left out"
    assert lines[2][:5] == ["base", "4", "0", "3", "-"] and lines[2][-1] == "1"
    assert lines[3][:5] == ["SPA", "1", "1", "0", "100.0%"] and lines[3][-1] == "0"
    told = rows["base"].to_dict()
    assert (told["asked"], told["games"], told["env_errors"], told["left_out"]) == (4, 0, 3, 1)


def test_paired_counts_and_exact_p_value():
    first = list(map(episode, "abcdefg", [WON, LOST, LOST, LOST, LOST, WON, WON]))
    second = list(map(episode, "fedcba", [BROKEN, WON, WON, WON, LOST, WON]))
    counts = evaluation.paired(first, second)
    # a both; b neither; c, d, e only the second; f broke for the second, who never met g.
    assert counts == evaluation.Paired(both=1, only_first=0, only_second=3, neither=1)
    assert counts.p_value == pytest.approx(2 * 1 / 8)
    assert evaluation.Paired(5, 0, 0, 5).p_value == 1
    assert evaluation.Paired(0, 1, 4, 0).p_value == pytest.approx(2 * 6 / 32)


def test_paired_needs_a_game_that_both_played():
    assert evaluation.paired([episode("a", WON)], [episode("b", WON)]) is None
    assert evaluation.paired([episode("a", WON)], [episode("a", WON, seed=1)]) is None
    assert evaluation.paired([], []) is None


@pytest.mark.parametrize(
    "scores, positive, expected",
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),  # 3 of the 4 pairs are in order
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([5, 5, 5, 5], [1, 0, 1, 0], 0.5),  # all tied
        ([1, 2, 2, 3], [0, 1, 0, 1], 0.875),  # pairs: 1, 1, 1, one tie of one half
    ],
)
def test_auc_by_hand(scores, positive, expected):
    assert evaluation.auc(np.array(scores), np.array(positive)) == pytest.approx(expected)


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 60).astype(float)
    positive = rng.random(60) < 0.4
    difference = scores[positive][:, None] - scores[~positive][None, :]
    expected = np.mean((difference > 0) + 0.5 * (difference == 0))
    assert evaluation.auc(scores, positive) == pytest.approx(expected)


def test_auc_of_one_class_or_of_nan_is_nan():
    assert math.isnan(evaluation.auc(np.array([1.0, 2.0]), np.array([True, True])))
    assert math.isnan(evaluation.auc(np.array([1.0, np.nan]), np.array([True, False])))


def test_estimator_validity_by_hand():
    contributions = [[0.5, 0.3], [0.2], [0.1, 0.1], [0.0, 0.4]]
    result = evaluation.estimator_validity([0.8, 0.2, 0.2, 0.4], [1, 0, 0, 1], contributions)
    assert result["trajectories"] == 4
    assert result["mse"] == pytest.approx((0.04 + 0.04 + 0.04 + 0.36) / 4)
    assert result["var"] == pytest.approx(0.25)
    assert result["mse_over_var"] == pytest.approx(0.48)
    assert result["auc"] == 1.0
    # Standard deviations 0.1, 0 and 0.2; the single step has none.
    assert result["spread"] == pytest.approx(0.1)
    # Deviations 0.4, -0.2, -0.2, 0 against +-0.5: 0.4 / sqrt(0.24 * 1).
    assert result["correlation"] == pytest.approx(0.4 / math.sqrt(0.24))


def test_a_constant_estimator_passes_nothing():
    rewards = np.array([1.0, 0, 0, 1, 1])
    contributions = [[rewards.mean() / 4] * 4] * 5
    result = evaluation.estimator_validity([sum(c) for c in contributions], rewards, contributions)
    assert result["mse_over_var"] == pytest.approx(1.0)
    assert result["auc"] == 0.5
    assert result["spread"] == pytest.approx(0.0)
    assert math.isnan(result["correlation"])


def test_partial_reward_is_no_success_for_the_auc():
    result = evaluation.estimator_validity([0.9, 0.1], [0.5, 1.0], [[0.9], [0.1]])
    assert result["auc"] == 0.0
    assert math.isnan(result["spread"])


def test_estimator_validity_of_nothing_is_nan_and_of_unequal_lengths_an_error():
    result = evaluation.estimator_validity([], [], [])
    assert result.pop("trajectories") == 0
    assert all(math.isnan(value) for value in result.values())
    with pytest.raises(ValueError, match="2 predictions, 1 rewards and 2"):
        evaluation.estimator_validity([1, 2], [1], [[1], [2]])


def test_the_choice_depends_on_keys_alone():
    played = [
        episode(f"t{i}", WON if i % 2 else LOST) for i in range(20)
    ]
    played += [episode("broken", BROKEN), episode("empty", LOST, grounded=())]
    wins, failures = evaluation.examples(played, 4)
    assert all(t.success for t in wins) and not any(t.success for t in failures)
    assert (len(wins), len(failures)) == (4, 4)
    assert not {"broken", "empty"} & {t.task for t in failures}
    again = evaluation.examples(
        [dataclasses.replace(t, final_observation="other") for t in played[::-1]], 4
    )
    assert [[t.task for t in group] for group in again] == [
        [t.task for t in group] for group in (wins, failures)
    ]
    # Not simply the first ones by name.
    assert [t.task for t in wins] != sorted(t.task for t in played if t.success)[:4]


def test_scipy_s_statistics_are_those_of_earlier_reports():
    """To twelve digits; the numbers were written down before scipy computed them."""
    exact = {"rel": 1e-12, "abs": 1e-12}
    for (won, games), interval in {
        (66, 100): (0.5627754565831095, 0.74538620502457),
        (75, 100): (0.6569535362992417, 0.8245490599627573),
        (1, 1): (0.2065432914738929, 1.0),
        (0, 32): (0.0, 0.1071827150573635),
        (200, 200): (0.9811539940816791, 1.0),
        (3, 7): (0.15821692226262685, 0.7495457695909742),
    }.items():
        assert evaluation.wilson_interval(won, games) == pytest.approx(interval, **exact)
    for (first, second), p in {
        (42, 38): 0.7375543089843226, (13, 5): 0.09625244140625, (0, 9): 0.00390625, (7, 7): 1.0,
    }.items():
        assert evaluation.Paired(0, first, second, 0).p_value == pytest.approx(p, **exact)
    rng = np.random.default_rng(11)
    scores, positive, reward = rng.integers(0, 9, 40) / 8, rng.random(40) < 0.6, rng.random(40)
    assert evaluation.auc(scores, positive) == pytest.approx(0.622257053291536, **exact)
    correlation = evaluation.estimator_validity(scores, reward, [[]] * 40)["correlation"]
    assert correlation == pytest.approx(0.03696789592807842, **exact)
