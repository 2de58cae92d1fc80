"""Credits that the estimator's contributions do not make: from episodes and what a trunk reads.

`--credit` names one; `annotation.annotate` asks here, and shares contributions out if there is
none.  The functions that compute them are pure, in `attribution/`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from spa_jax.attribution import branching, prm4a, subgoal
from spa_jax.errors import UserError
from spa_jax.training import ppo_data, scoring
from spa_jax.trajectory import Trajectory
from spa_jax.truth import Key


def of(
    kind: str,
    trajectories: Sequence[Trajectory],
    scores: scoring.Scores,
    branches: Mapping[Key, np.ndarray] | None = None,
) -> np.ndarray | None:
    """[N, S] the credit of each step; None if `kind` is made of contributions.

    Args:
      kind: `CreditConfig.credit`.
      trajectories: N episodes.
      scores: of them under the reference policy.
      branches: for `branching`: an episode's key -> [n, K] final rewards of the branches from
        before each of its steps.

    Raises:
      UserError: the episodes do not say what this credit is made of.
    """
    if kind == "subgoal":
        return np.asarray(subgoal.subgoal_credit(progress_of(trajectories), scores.step_mask))
    if kind == "prm4a":
        fold, folds = ppo_data.folds_of(trajectories, "--credit=prm4a", "another --credit")
        final = np.array([t.final_reward for t in trajectories], np.float32)
        q, first = prm4a.process_values(
            scores.value_hidden, scores.end_hidden, final, scores.step_mask, fold, folds=folds
        )
        return np.asarray(prm4a.process_credit(q, first, scores.step_mask))
    if kind == "branching":
        assert branches is not None
        returns = _returns(trajectories, branches, scores.step_mask.shape)
        count = np.full(scores.step_mask.shape, returns.shape[-1])
        final = np.array([t.final_reward for t in trajectories], np.float32)
        given, _ = branching.branching_credit(returns, count, final, scores.step_mask)
        return np.asarray(given)
    return None


def _returns(
    trajectories: Sequence[Trajectory], branches: Mapping[Key, np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """[N, S, K] final rewards of the branches from before each step; 0 where there is none."""
    table = np.zeros((*shape, branches[trajectories[0].key].shape[1]), np.float32)
    for i, t in enumerate(trajectories):
        table[i, : len(t.steps)] = branches[t.key]
    return table


def progress_of(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[N, S + 1] float32, how much was done before the first step and after each; then 0.

    Raises:
      UserError: names an episode whose environment did not say.
    """
    table = np.zeros((len(trajectories), scoring.max_steps(trajectories) + 1), np.float32)
    for i, t in enumerate(trajectories):
        if t.progress is None:
            raise UserError(
                f"--credit=subgoal: the episode of task {t.task} (seed {t.seed}, attempt "
                f"{t.attempt}) has no progress: {t.env} did not say it when it was played. Explore "
                "again with an environment that does (Observation.progress), or choose another "
                "--credit"
            )
        table[i, : len(t.progress)] = t.progress
    return table
