"""Credit judged by the truth: figures by hand, intervals against scipy on the same resamples."""

import dataclasses
import math
import time

import numpy as np
import pytest
from scipy import stats

from spa_jax import evaluation, judging
from spa_jax.trajectory import Status, Step, Trajectory

YES, NO = True, False


def _episode(grounded: str, progress: list[float | None], task: str = "t") -> Trajectory:
    """Steps grounded (+) or not, with progress before the first and after each."""
    steps = tuple(
        Step("", "go", "go", mark == "+", progress=p, contribution=0.25)
        for mark, p in zip(grounded, progress[1:], strict=True)
    )
    return Trajectory(
        env="custom", task=task, split="train", seed=0, attempt=0, policy="p",
        status=Status.FAILURE, final_reward=0.0, instruction="", steps=steps,
        initial_progress=progress[0],
    )


def test_a_step_reaches_a_subgoal_when_progress_rises():
    # Up, level, down, up again but not executed, up.
    t = _episode("+++-+", [0.0, 0.5, 0.5, 0.25, 0.5, 1.0])
    assert judging.reached(t).tolist() == [YES, NO, NO, NO, YES]
    # What was done before the first step is not the first step's.
    assert judging.reached(_episode("++", [0.5, 0.5, 1.0])).tolist() == [NO, YES]
    assert judging.reached(_episode("++", [None, 0.5, 1.0])) is None
    assert judging.reached(_episode("++", [0.0, None, 1.0])) is None
    assert judging.contributions([t])[0].tolist() == [0.25] * 5


def test_the_figures_by_hand():
    credits = [np.array([0.6, 0.1, 0.3]), np.array([-0.2, 0.2]), np.array([0.5, 0.1])]
    subgoals = [np.array([NO, NO, YES]), np.array([NO, YES]), np.array([NO, NO])]
    found = judging.judge(credits, subgoals, draws=0)
    # Later steps: 0.3 and 0.2 reach one, 0.1 and 0.1 do not: 4 of 4 pairs in order.
    assert found["subgoal_auc"] == 1.0
    # Within: 0.3 above 0.1 and not above 0.6, so 1/2; 0.2 above -0.2, so 1; the third has one kind.
    assert found["subgoal_auc_within"] == pytest.approx(0.75)
    # (0.6 - 0.2 + 0.5) / (1.0 + 0.4 + 0.6).
    assert found["first_step_share"] == pytest.approx(0.45)
    # Ranks of c: 7 2.5 5 1 4 6 2.5, of k: 2 5 7 2 5 2 5.
    ranks = stats.pearsonr([7, 2.5, 5, 1, 4, 6, 2.5], [2, 5, 7, 2, 5, 2, 5]).statistic
    assert found["step_correlation"] == pytest.approx(ranks)
    assert found["judged_episodes"] == 3
    assert not any(name.startswith("advantage") for name in found)
    assert math.isnan(found["subgoal_auc_low"]) and math.isnan(found["subgoal_auc_high"])


def test_ties_across_episodes_are_half_a_pair():
    credits = [np.array([0.0, 0.2, 0.2]), np.array([0.0, 0.2, 0.1])]
    subgoals = [np.array([NO, YES, NO]), np.array([NO, NO, YES])]
    # 0.2 against 0.2 and 0.2: 1/2 + 1/2; 0.1 against both: 0.  1 of 4 pairs.
    assert judging.judge(credits, subgoals, draws=0)["subgoal_auc"] == pytest.approx(0.25)


def test_credit_is_held_against_true_advantages():
    credits = [np.array([1.0, 2.0, 3.0]), np.array([5.0, 4.0]), np.array([9.0])]
    advantages = [np.array([0.1, 0.3, math.nan]), np.array([0.2, 0.5]), None]
    found = judging.judge(credits, [None] * 3, advantages, draws=0)
    # c 1 2 5 4 has ranks 1 2 4 3; the advantages .1 .3 .2 .5 ranks 1 3 2 4: 1 - 6 * 6 / (4 * 15).
    assert found["advantage_correlation"] == pytest.approx(0.4)
    assert found["advantage_correlation_within"] == pytest.approx(0.0)  # +1 and -1
    # Ranks of the advantages 1 3 2 4, of their steps 0 1 0 1: 1.5 3.5 1.5 3.5.
    assert found["advantage_step_correlation"] == pytest.approx(2 / math.sqrt(5))
    assert (found["judged_episodes"], found["advantage_episodes"]) == (0, 2)
    assert math.isnan(found["subgoal_auc"]) and math.isnan(found["subgoal_auc_within"])


def _some(episodes: int, steps: int = 6):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, steps + 1, episodes)
    credits = [np.round(rng.normal(size=n), 1) for n in lengths]
    subgoals = [rng.random(n) < 0.3 for n in lengths]
    return credits, subgoals, [np.round(c + rng.normal(size=len(c)), 1) for c in credits]


def test_every_sample_is_the_figure_of_its_episodes():
    """What the bootstrap computes with weights is what scipy says of the drawn episodes."""
    credits, subgoals, advantages = _some(12)
    counts = judging._samples(12, 40, seed=5)
    assert (counts[0] == 1).all() and (counts.sum(1) == 12).all() and (counts[1:] == 0).any()
    figures = judging._subgoal_figures(credits, subgoals) | judging._course_figures(credits)
    figures |= judging._advantage_figures(credits, advantages)
    found = {name: figure(counts) for name, figure in figures.items()}
    for number, sample in enumerate(counts):
        drawn = np.repeat(np.arange(12), sample.astype(int))
        c, s, a = ([x[i] for i in drawn] for x in (credits, subgoals, advantages))
        step = np.concatenate([np.arange(len(x)) for x in c])
        every, truth = np.concatenate(c), np.concatenate(a)
        within = [evaluation.auc(x, y) for x, y in zip(c, s, strict=True)]
        expected = {
            "subgoal_auc": evaluation.auc(
                np.concatenate([x[1:] for x in c]), np.concatenate([x[1:] for x in s])
            ),
            "subgoal_auc_within": np.nanmean(within),
            "first_step_share": sum(x[0] for x in c) / np.abs(every).sum(),
            "step_correlation": stats.spearmanr(every, step).statistic,
            "advantage_correlation": stats.spearmanr(every, truth).statistic,
            "advantage_step_correlation": stats.spearmanr(truth, step).statistic,
        }
        for name, value in expected.items():
            assert found[name][number] == pytest.approx(value, nan_ok=True), name


def test_intervals_hold_the_figure_and_are_seeded_and_fast():
    credits, subgoals, advantages = _some(200, 20)
    judging.judge(credits, subgoals, advantages, draws=2)  # what is imported when first needed
    started = time.process_time()
    found = judging.judge(credits, subgoals, advantages)
    assert time.process_time() - started < 10  # about one second
    for name in (*judging.FIGURES, *judging.ADVANTAGE_FIGURES):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"], name
    assert found["advantage_correlation_low"] > 0.5  # they have half their variance in common
    assert found == judging.judge(credits, subgoals, advantages)
    assert found != judging.judge(credits, subgoals, advantages, seed=1)


def test_what_is_not_defined_is_nan():
    nothing = judging.judge([], [], [])
    assert nothing.pop("judged_episodes") == nothing.pop("advantage_episodes") == 0
    assert nothing and all(math.isnan(value) for value in nothing.values())
    flat = judging.judge([np.zeros(3)] * 4, [np.array([NO, NO, YES])] * 4, [None] * 4)
    assert flat["subgoal_auc"] == flat["subgoal_auc_within"] == 0.5
    for name in ("first_step_share", "step_correlation", "advantage_correlation"):
        assert math.isnan(flat[name]) and math.isnan(flat[f"{name}_low"]), name
    diverged = judging.judge([np.array([0.1, math.nan])], [np.array([NO, YES])])
    assert math.isnan(diverged["subgoal_auc"]) and math.isnan(diverged["first_step_share"])
    with pytest.raises(ValueError, match="episode 0: 2 credits, the truth of 1 steps"):
        judging.judge([np.zeros(2)], [np.array([YES])])
    with pytest.raises(ValueError, match="credits of 1 episodes, the truth of 2"):
        judging.judge([np.zeros(2)], [None], [None, None])


def test_placebos_are_chance_within_an_episode_and_keep_the_total():
    rng = np.random.default_rng(0)
    credits = [rng.normal(size=n) for n in rng.integers(2, 9, 300)]
    rewards = rng.integers(0, 2, 300)
    subgoals = [c == c.max() for c in credits]  # the estimator is right within each episode
    found = {"spa": credits} | judging.placebos(credits, rewards)
    assert tuple(found)[1:] == judging.PLACEBOS
    within = {
        kind: judging.judge(c, subgoals, draws=0)["subgoal_auc_within"] for kind, c in found.items()
    }
    assert within["spa"] == 1.0 and within["uniform"] == 0.5
    assert within["shuffled"] == pytest.approx(0.5, abs=0.06)
    for kind in ("uniform", "shuffled", "random"):
        for c, placebo in zip(credits, found[kind], strict=True):
            assert len(c) == len(placebo) and placebo.sum() == pytest.approx(c.sum(), abs=1e-5)
    assert [c[-1] for c in found["terminal"]] == rewards.tolist()
    assert judging.placebos([], []) == {kind: [] for kind in judging.PLACEBOS}


def test_episodes_are_joined_with_their_advantages_by_key():
    first = _episode("++", [0.0, 0.5, 1.0], task="a")
    second = _episode("++", [None, None, None], task="b")
    third = dataclasses.replace(first, attempt=1)
    credits = [np.array([0.1, 0.2]), np.array([0.5, 0.4]), np.array([0.3, 0.6])]
    told = {second.key: np.array([0.2, -0.1]), ("elsewhere", 0, 0): np.array([1.0])}
    found = judging.judge_episodes([first, second, third], credits, told, draws=0)
    assert (found["judged_episodes"], found["advantage_episodes"]) == (2, 1)
    assert found["advantage_correlation"] == pytest.approx(1.0)
    assert "advantage_correlation" not in judging.judge_episodes([first], credits[:1], {})
