"""Credit judged by the truth: does it tell the steps that brought the task on from the others?

    truth       task truth: a step reaches a subgoal (the environment says how much is done)
                policy truth: its true advantage (`branching` plays on from before and after it)
    figures     of any credit a step: an estimator's, a critic's, a placebo's
    intervals   percentile bootstrap over episodes, which are drawn whole: the steps of an episode
                have much in common

A right sum of an episode's credits says nothing about its steps.  These figures do.  Arrays in,
numbers out; every figure that is not defined for the data is nan.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from spa_jax import evaluation
from spa_jax.attribution import credit
from spa_jax.trajectory import Trajectory

FIGURES = ("subgoal_auc", "subgoal_auc_within", "first_step_share", "step_correlation")
ADVANTAGE_FIGURES = (
    "advantage_correlation",
    "advantage_correlation_within",
    "advantage_step_correlation",
)
PLACEBOS = ("uniform", "shuffled", "random", "terminal")
DRAWS = 1000  # of the bootstrap
_RISES = 1e-9  # progress travels as JSON floats
_BLOCK = 100_000  # numbers of an array of draws x steps that is made at once: it fits a cache

Key = tuple[str, int, int]
# [D, N] how often each of N episodes is in each of D samples -> [D] the figure of each sample.
_Figure = Callable[[np.ndarray], np.ndarray]


def reached(trajectory: Trajectory) -> np.ndarray | None:
    """[n] bool: whether each step reached a subgoal; None if the environment does not say.

    A step reaches one when progress rises.  One that could not be executed does not.
    """
    progress = trajectory.progress
    if progress is None:
        return None
    grounded = np.array([step.grounded for step in trajectory.steps], bool)
    return (np.diff(np.asarray(progress, np.float64)) > _RISES) & grounded


def contributions(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """The estimator's c_k of annotated episodes: N arrays [n], float64; 0 where there is none."""
    return [np.array([s.contribution or 0.0 for s in t.steps], np.float64) for t in trajectories]


def judge_episodes(
    trajectories: Sequence[Trajectory],
    credits: Sequence[np.ndarray],
    advantages: Mapping[Key, np.ndarray] | None = None,
    *,
    draws: int = DRAWS,
) -> dict[str, float]:
    """`judge` of episodes whose environment and, by key, whose branches told the truth.

    Args:
      trajectories: N episodes.
      credits: N arrays [n], what each step got.
      advantages: key -> [n] true advantages; an episode without is judged by its subgoals alone.
      draws: of the bootstrap.
    """
    known = [(advantages or {}).get(t.key) for t in trajectories]
    truth = [reached(t) for t in trajectories]
    return judge(credits, truth, known if advantages else None, draws=draws)


def judge(
    credits: Sequence[np.ndarray],
    subgoals: Sequence[np.ndarray | None],
    advantages: Sequence[np.ndarray | None] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, float]:
    """What credit knows about the steps of N episodes.

    Args:
      credits: N arrays [n], c_k of each step.
      subgoals: N arrays [n] of bool, whether the step reached a subgoal; None where unknown.
      advantages: N arrays [n], the true advantage of each step, nan where unknown; None for an
        episode, or at all, without.
      draws: samples of N episodes, drawn with replacement, for the intervals; 0: no intervals.
      seed: of them.

    Returns:
      Each figure, and beside it the 95% percentile interval as NAME_low and NAME_high:

      subgoal_auc: area under the ROC curve of c for "the step reaches a subgoal", over all steps
        but an episode's first; 0.5 is chance.
      subgoal_auc_within: the mean over the episodes that have steps of both kinds of that area
        within the episode, over all its steps.
      first_step_share: sum_i c_i1 / sum_i sum_k |c_ik|: what the first steps got of all credit.
      step_correlation: Spearman's rank correlation of c with the step's number, over all steps.

      and where there are advantages:

      advantage_correlation: Spearman's of c with the true advantage, over the steps that have one.
      advantage_correlation_within: its mean over episodes, within each.
      advantage_step_correlation: Spearman's of the true advantage with the step's number, which
        `step_correlation` is to be compared with.

      judged_episodes: how many episodes have known subgoals; advantage_episodes: advantages.
      What is not defined is nan: all figures if a credit is not a number.

    Raises:
      ValueError: if the sequences differ in length, or the arrays of an episode do.
    """
    credits = [np.asarray(c, np.float64) for c in credits]
    _check(credits, subgoals)
    figures: dict[str, _Figure] = _subgoal_figures(credits, subgoals)
    figures |= _course_figures(credits)
    counted: dict[str, float] = {"judged_episodes": sum(s is not None for s in subgoals)}
    if advantages is not None:
        _check(credits, advantages)
        figures |= _advantage_figures(credits, advantages)
        counted["advantage_episodes"] = sum(
            a is not None and bool(np.isfinite(a).any()) for a in advantages
        )
    wrong = not credits or not all(np.isfinite(c).all() for c in credits)
    drawn = np.zeros((1, 0)) if wrong else _samples(len(credits), draws, seed)
    found: dict[str, float] = {}
    for name, figure in figures.items():
        values = np.full(1, math.nan) if wrong else figure(drawn)
        low, high = _interval(values[1:])
        found |= {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
    return found | counted


def placebos(
    credits: Sequence[np.ndarray], final_reward: Sequence[float], *, seed: int = 0
) -> dict[str, list[np.ndarray]]:
    """Credits that know nothing of the steps, of the same episodes: see `credit.credit`.

    Args:
      credits: N arrays [n], whose sums the placebos but `terminal` share.
      final_reward: [N] R.
      seed: of those that are drawn.

    Returns:
      One of `PLACEBOS` -> N arrays [n].
    """
    if not credits:
        return {kind: [] for kind in PLACEBOS}
    steps = max(len(c) for c in credits)
    padded, mask = np.zeros((2, len(credits), steps), np.float32)
    for i, c in enumerate(credits):
        padded[i, : len(c)], mask[i, : len(c)] = c, 1
    rewards, key = np.asarray(final_reward, np.float32), jax.random.key(seed)
    made = {kind: np.asarray(credit.credit(kind, padded, rewards, mask, key)) for kind in PLACEBOS}
    return {
        kind: [row[: len(c)].astype(np.float64) for row, c in zip(rows, credits, strict=True)]
        for kind, rows in made.items()
    }


def _check(credits: Sequence[np.ndarray], truth: Sequence[np.ndarray | None]) -> None:
    if len(credits) != len(truth):
        raise ValueError(f"credits of {len(credits)} episodes, the truth of {len(truth)}")
    for i, (c, known) in enumerate(zip(credits, truth, strict=True)):
        if known is not None and len(known) != len(c):
            raise ValueError(f"episode {i}: {len(c)} credits, the truth of {len(known)} steps")


def _samples(episodes: int, draws: int, seed: int) -> np.ndarray:
    """[1 + draws, N] how often each episode is in a sample; the first sample is the data itself."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(episodes, np.full(episodes, 1 / episodes), size=draws)
    return np.concatenate([np.ones((1, episodes)), drawn])


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of the samples for which the figure is defined."""
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)


# --- figures ----------------------------------------------------------------------------------


def _subgoal_figures(
    credits: Sequence[np.ndarray], subgoals: Sequence[np.ndarray | None]
) -> dict[str, _Figure]:
    none = np.zeros(0)
    pairs = [
        (c, np.asarray(s, bool)) if s is not None else (none, none.astype(bool))
        for c, s in zip(credits, subgoals, strict=True)
    ]
    within = np.array([evaluation.auc(c, s) for c, s in pairs])
    later = [(c[1:], s[1:]) for c, s in pairs]
    pooled = functools.partial(_pooled_auc, [c[s] for c, s in later], [c[~s] for c, s in later])
    return {"subgoal_auc": pooled, "subgoal_auc_within": functools.partial(_mean, within)}


def _course_figures(credits: Sequence[np.ndarray]) -> dict[str, _Figure]:
    first = np.array([c[:1].sum() for c in credits])
    every = np.array([np.abs(c).sum() for c in credits])
    return {
        "first_step_share": lambda counts: _ratio(counts @ first, counts @ every),
        "step_correlation": _spearman(credits, _numbers(credits)),
    }


def _advantage_figures(
    credits: Sequence[np.ndarray], advantages: Sequence[np.ndarray | None]
) -> dict[str, _Figure]:
    full = [
        np.full(len(c), math.nan) if a is None else np.asarray(a, np.float64)
        for c, a in zip(credits, advantages, strict=True)
    ]
    known = [np.isfinite(a) for a in full]
    c, a, k = (
        [values[ok] for values, ok in zip(arrays, known, strict=True)]
        for arrays in (credits, full, _numbers(credits))
    )
    one = np.ones((1, 1))
    within = np.array([_spearman([x], [y])(one)[0] for x, y in zip(c, a, strict=True)])
    return {
        "advantage_correlation": _spearman(c, a),
        "advantage_correlation_within": functools.partial(_mean, within),
        "advantage_step_correlation": _spearman(a, k),
    }


def _owners(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The episode of each entry of N arrays that are joined."""
    return np.repeat(np.arange(len(arrays)), np.array([len(a) for a in arrays], int))


def _numbers(credits: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The number of each step."""
    return [np.arange(len(c), dtype=np.float64) for c in credits]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise; nan where the denominator is 0."""
    missing = np.full(np.shape(denominator), math.nan)
    return np.divide(numerator, denominator, out=missing, where=denominator > 0)


def _mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[D] the mean of [N] values over the episodes of each sample, those that are nan left out."""
    defined = np.isfinite(values)
    return _ratio(counts[:, defined] @ values[defined], counts[:, defined].sum(1))


def _pooled_auc(
    positive: Sequence[np.ndarray], negative: Sequence[np.ndarray], counts: np.ndarray
) -> np.ndarray:
    """[D] area under the ROC curve (`evaluation.auc`) over the steps of each sample's episodes.

    W_ij is how often a positive of episode i is above a negative of episode j, ties half, so a
    sample with episode i m_i times has m W m of its pairs in order, of (m P) (m N).

    Args:
      positive: N arrays, the scores of each episode's positives.
      negative: those of its negatives.
      counts: [D, N] m.
    """
    episodes = len(positive)
    scores = np.concatenate(positive)
    owner = _owners(positive)
    above = np.zeros((episodes, episodes))
    for j, others in enumerate(negative):
        others = np.sort(others)
        below = np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")
        above[:, j] = np.bincount(owner, below / 2, episodes)
    positives, negatives = (np.array([len(x) for x in side]) for side in (positive, negative))
    in_order = np.sum((counts @ above) * counts, axis=1)
    return _ratio(in_order, (counts @ positives) * (counts @ negatives))


def _spearman(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> _Figure:
    """Spearman's rank correlation over the steps of each sample's episodes.

    Ranks are those within the sample, equal values share their mean rank.

    Args:
      x: N arrays [n].
      y: N arrays [n].
    """
    owner = _owners(x)
    ranks_x, ranks_y = (_ranks(np.concatenate([np.zeros(0), *values])) for values in (x, y))

    def figure(counts: np.ndarray) -> np.ndarray:
        if not len(owner):
            return np.full(len(counts), math.nan)
        block = max(1, _BLOCK // len(owner))
        parts = [counts[i : i + block] for i in range(0, len(counts), block)]
        return np.concatenate([_weighted_correlation(p[:, owner]) for p in parts])

    def _weighted_correlation(weights: np.ndarray) -> np.ndarray:
        middle = (weights.sum(1, keepdims=True) + 1) / 2  # the mean of all ranks
        a, b = ranks_x(weights) - middle, ranks_y(weights) - middle
        spread = np.einsum("ds,ds,ds->d", weights, a, a) * np.einsum("ds,ds,ds->d", weights, b, b)
        return _ratio(np.einsum("ds,ds,ds->d", weights, a, b), np.sqrt(spread))

    return figure


def _ranks(values: np.ndarray) -> _Figure:
    """[D, S] weights -> [D, S] the mean rank, from 1, of each value in a sample.

    A value counts as often as its weight says.
    """
    levels, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))

    def ranks(weights: np.ndarray) -> np.ndarray:
        at_level = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(at_level, axis=1) - (at_level - 1) / 2)[:, level]

    return ranks
