"""The true advantage of a step: the policy that played goes on from before and from after it.

        state     s_0 ---a_0--- s_1 ---a_1--- s_2 ... s_{n-1} ---a_{n-1}--- end: R
        branches  K             K             K        K                    none: V = R

    V_k = mean of the K final rewards from s_k          A_k = V_{k+1} - V_k,   V_n = R

The branches after a step are those before the next one, so the advantages of an episode add up to
R - V_0.  Source: Monte-Carlo values of a language model's states, VinePPO, arXiv 2410.01679.

This module holds the records and the estimate; `spa_jax.branching` plays.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import Field

from spa_jax import schema
from spa_jax.errors import UserError

Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One episode that went on from a state of another one: a line of branches.jsonl.

    Attributes:
      task: the key of the episode that it leaves.
      seed: of the same.
      attempt: of the same.
      step: the first step that was played anew, from 0.
      branch: which of the branches from there, from 0.
      final_reward: R of the branch, in [0, 1].
      status: how it ended, `trajectory.Status`.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    task: schema.Text
    seed: Annotated[int, Field(strict=True)]
    attempt: schema.Count
    step: schema.Count
    branch: schema.Count
    final_reward: schema.Share
    status: schema.Text

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        """What is played once: (task, seed, attempt, step, branch)."""
        return (self.task, self.seed, self.attempt, self.step, self.branch)

    def line(self) -> bytes:
        """The line, with its end."""
        text = json.dumps(dataclasses.asdict(self), allow_nan=False, separators=(",", ":"))
        return text.encode("ascii") + b"\n"


@dataclasses.dataclass(frozen=True)
class StepTruth:
    """What the branches say of one step.

    Attributes:
      value: V of the state before the step: the mean final reward of its branches.
      value_error: the standard error of that.
      advantage: V after the step - V before it.
      advantage_error: the standard error of that.
    """

    value: float
    value_error: float
    advantage: float
    advantage_error: float


def estimate(rewards: np.ndarray, final_reward: float) -> tuple[StepTruth, ...]:
    """The truth of an episode's n steps.

        V_k = mean_b R_kb     se(V_k)^2 = s_k^2 / K,  s_k^2 the sample variance (K - 1)
        A_k = V_{k+1} - V_k   se(A_k)^2 = se(V_k)^2 + se(V_{k+1})^2

    The end of an episode has the value R, exactly, however it ended: nothing follows it.  K
    branches that all end alike have the standard error 0, which is too small.

    Args:
      rewards: [n, K] final rewards of the branches before each step, K at least 2.
      final_reward: R of the episode.
    """
    count = rewards.shape[1]
    values = np.append(rewards.mean(axis=1), final_reward)
    squares = np.append(rewards.var(axis=1, ddof=1) / count, 0.0)
    errors = np.sqrt(squares)
    advantages = np.diff(values)
    advantage_errors = np.sqrt(squares[:-1] + squares[1:])
    columns = (values[:-1], errors[:-1], advantages, advantage_errors)
    return tuple(StepTruth(*map(float, row)) for row in zip(*columns, strict=True))


def reliability(episodes: Sequence[Sequence[StepTruth]]) -> float:
    """The share of the advantages' variance that is not the noise of their branches.

        1 - mean(se(A)^2) / Var(A)

    The square root bounds what the correlation of any credit with them can be, as in classical
    test theory.  nan without variance; at least 0.
    """
    steps = [step for episode in episodes for step in episode]
    spread = float(np.var([step.advantage for step in steps])) if steps else 0.0
    if not spread:
        return float("nan")
    noise = float(np.mean([step.advantage_error**2 for step in steps]))
    return max(0.0, 1.0 - noise / spread)


def decided_at_start(episodes: Sequence[Sequence[StepTruth]], branches: int) -> float:
    """The share of the outcome's variance that is settled before the first step: by the game.

        between = Var(V_0) - mean(se(V_0)^2)        over episodes
        within  = mean(K se(V_0)^2)                 over the K branches of one start
        share   = between / (between + within)

    The intraclass correlation of the final rewards, with the branches' noise taken off.  What is
    left, 1 - share, is all that credit for steps can be about: under a policy that wins some games
    always and the others never, every step's true advantage is 0.  Source: the one-way random
    effects model, Shrout and Fleiss 1979, ICC(1).

    Args:
      episodes: the truth of each; at least two of other games.
      branches: K.

    Returns:
      In [0, 1]; nan for fewer than two episodes, or if all ended alike.
    """
    starts = [steps[0] for steps in episodes if steps]
    if len(starts) < 2:
        return float("nan")
    noise = float(np.mean([start.value_error**2 for start in starts]))
    between = max(0.0, float(np.var([start.value for start in starts], ddof=1)) - noise)
    every = between + branches * noise
    return between / every if every else float("nan")


def to_json(
    told: Mapping[Key, Sequence[StepTruth]], *, branches: int, **about: Any
) -> dict[str, Any]:
    """The content of truth.json.

    Args:
      told: the truth of each episode, by its key.
      branches: from before each step.
      **about: what else is to be said of them; `evaluation` names the folder of the episodes.
    """
    return about | {
        "branches": branches,
        "reliability": reliability(list(told.values())),
        "decided_at_start": decided_at_start(list(told.values()), branches),
        "truth": [
            {
                "task": task,
                "seed": seed,
                "attempt": attempt,
                "steps": [dataclasses.asdict(step) for step in steps],
            }
            for (task, seed, attempt), steps in told.items()
        ],
    }


def read_branches(path: pathlib.Path) -> list[Branch]:
    """The branches of a file, in its order; none if it is not there.

    Raises:
      UserError: a line is none, or two are the same branch; names file and line.
    """
    if not path.exists():
        return []
    found: dict[tuple, Branch] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            branch = schema.check(Branch, json.loads(line), "a field")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: not a branch ({error}); delete the line to play it again"
            ) from error
        if branch.key in found:
            raise UserError(f"{path}:{number}: the branch {branch.key} is there twice; delete one")
        found[branch.key] = branch
    return list(found.values())


def read_advantages(path: pathlib.Path, evaluation: str) -> dict[Key, np.ndarray]:
    """Key -> [n] true advantages of the episodes of an evaluation; {} if nobody found them out.

    Args:
      path: truth.json.
      evaluation: the name of the evaluation; truth about another one's episodes is none of it.

    Raises:
      UserError: the file is not what `to_json` makes.
    """
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
        if told["evaluation"] != evaluation:
            return {}
        return {
            (e["task"], e["seed"], e["attempt"]): np.array([s["advantage"] for s in e["steps"]])
            for e in told["truth"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the truth of an evaluation ({error}); remove it, and run judge_credit"
        ) from error
