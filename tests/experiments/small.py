"""Small data of the training stages, and flags that train on it in seconds."""

import pathlib

import numpy as np

from spa_jax import store
from spa_jax.trajectory import Status, Step, Trajectory
from tests import tiny

ROWS = ("--row_length=128", "--policy_slots=64", "--step_slots=16", "--rows_per_device=2")


def _demos(folder: pathlib.Path) -> None:
    for split, count in (("train", 8), ("valid", 2)):
        demos = [
            Trajectory(
                env="alfworld",
                task=f"{split}_{i}",
                split=split,
                seed=0,
                attempt=0,
                policy="expert",
                status=Status.SUCCESS,
                final_reward=1.0,
                instruction="Do it.",
                steps=tuple(
                    Step(f"You see a mug {i}.", f"take mug {i}", f"take mug {i}", True)
                    for _ in range(1 + i % 2)
                ),
            )
            for i in range(count)
        ]
        store.write(folder / split / "trajectories.jsonl", demos)


def prepare(stage: str, workdir: pathlib.Path) -> pathlib.Path:
    """Writes what the stage reads; returns the folder that it writes."""
    rng = np.random.default_rng(1)
    episodes = [
        tiny.random_trajectory(rng, f"task_{i}", steps=1 + i % 3, context=8) for i in range(12)
    ]
    if stage == "sft":
        _demos(workdir / "demos")
        return workdir / "sft"
    if stage == "train_progress":
        store.write(workdir / "iteration_0" / "explore" / "trajectories.jsonl", episodes)
        return workdir / "iteration_0" / "progress"
    store.write(workdir / "iteration_0" / "annotated.jsonl", episodes)
    return workdir / "iteration_0" / "ppo"
