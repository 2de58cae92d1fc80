"""Small data of the training stages, and flags that train on it in seconds."""

import pathlib

from spa_jax import store
from tests import runs

ROWS = ("--row_length=128", "--policy_slots=64", "--step_slots=16", "--rows_per_device=2")


def prepare(stage: str, workdir: pathlib.Path) -> pathlib.Path:
    """Writes what the stage reads; returns the folder that it writes."""
    run = runs.make(workdir)
    if stage == "sft":
        runs.demonstrate(run)
        return run.sft
    episodes, first = runs.episodes(steps=(1, 2, 3)), run.round(0)
    if stage == "train_progress":
        store.write(first.episodes, episodes)
        return first.progress
    store.write(first.annotated, episodes)
    return first.ppo
