"""Runs for tests: their settings, and the files that a stage reads, where `run.Run` has them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from spa_jax import store
from spa_jax.config import RowsConfig
from spa_jax.run import Run
from spa_jax.stage_config import Settings
from spa_jax.trajectory import Status, Step, Trajectory
from tests import tiny

ROWS = RowsConfig(row_length=128, policy_slots=64, step_slots=16, rows_per_device=1)


def make(
    workdir: pathlib.Path, policy: pathlib.Path | str = "", *, seed: int = 0, **sections: Any
) -> Run:
    """A run with rows that hold `episodes`.

    Args:
      workdir: its folder.
      policy: the pretrained one.
      seed: of the run.
      **sections: of `Settings` that are not the default.
    """
    return Run(workdir, str(policy), seed, Settings(**{"rows": ROWS} | sections))


def demonstration(task: str, *steps: Step, split: str = "train") -> Trajectory:
    """A won episode of the expert, without tokens."""
    return Trajectory(
        env="alfworld",
        task=task,
        split=split,
        seed=0,
        attempt=0,
        policy="expert",
        status=Status.SUCCESS,
        final_reward=1.0,
        instruction="Do it.",
        steps=steps,
    )


def demonstrate(run: Run, counts: dict[str, int] | None = None) -> None:
    """Writes demonstrations: eight to learn from and two held out, or as many as `counts` says."""
    for part, count in (counts or {"train": 8, "valid": 2}).items():
        demos = [
            demonstration(
                f"{part}_{i}",
                *[Step(f"You see a mug {i}.", f"take mug {i}", f"take mug {i}", True)]
                * (1 + i % 2),
                split=part,
            )
            for i in range(count)
        ]
        store.write(run.demonstrations(part), demos)


def episodes(count: int = 12, *, seed: int = 1, steps: Sequence[int] = (3,)) -> list[Trajectory]:
    """Annotated episodes of random tokens, a task each.

    Args:
      count: how many.
      seed: of the tokens.
      steps: how long they are, in turn.
    """
    rng = np.random.default_rng(seed)
    return [
        tiny.random_trajectory(rng, f"task_{i}", steps=steps[i % len(steps)], context=8)
        for i in range(count)
    ]
