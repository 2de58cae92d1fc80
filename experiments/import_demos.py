"""Demonstrations of your own: a ShareGPT-style log instead of our expert's episodes.

    python -m experiments.import_demos --file=alfworld_sft.json --env=alfworld --workdir=W

FILE is a JSON list of {"conversations": [{"from": "human" | "gpt", "value": text}, ...]}, the
format of the SPA-RL authors' data.  Writes W/demos/{train,valid}/trajectories.jsonl, which
`sft` reads; the conversations of a task go to one of the two.  `run_spa --demonstrations=FILE`
does the same and goes on from there.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import flags as flags_lib
from spa_jax import importers, store
from spa_jax.envs.benchmarks import BENCHMARKS
from spa_jax.errors import UserError
from spa_jax.trajectory import Trajectory

VALID_SHARE = 0.1


def run(
    out: pathlib.Path, file: str, env: str, valid_share: float, seed: int
) -> dict[str, list[Trajectory]]:
    """Writes out/{train,valid}/trajectories.jsonl; returns the episodes by split.

    Only episodes whose reward is 1 are demonstrations.

    Raises:
      UserError: the file is not such a log, or does not hold two tasks that were solved.
    """
    solved = [t for t in importers.read_sharegpt(file, env=env) if t.success]
    tasks = sorted({t.task for t in solved})
    if len(tasks) < 2:
        raise UserError(
            f"{file}: holds {len(tasks)} tasks that were solved; some are held out to stop SFT by "
            "their loss, so at least 2 are needed"
        )
    if not 0 < valid_share < 1:
        raise UserError(f"--valid_share={valid_share}: give a share between 0 and 1")
    held_out = min(max(1, round(valid_share * len(tasks))), len(tasks) - 1)
    shuffled = np.random.default_rng(seed).permutation(len(tasks))
    valid = {tasks[i] for i in shuffled[:held_out]}
    demos: dict[str, list[Trajectory]] = {"train": [], "valid": []}
    for t in solved:
        split = "valid" if t.task in valid else "train"
        demos[split].append(dataclasses.replace(t, split=split))
    for split, episodes in demos.items():
        store.write(out / split / "trajectories.jsonl", episodes)
    return demos


def main(argv: Sequence[str]) -> None:
    del argv
    out = pathlib.Path(flags_lib.WORKDIR.value) / "demos"
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or give another --workdir")
    demos = run(out, _FILE.value, _ENV.value, _VALID.value, flags_lib.SEED.value)
    counts = " ".join(f"{split}={len(episodes)}" for split, episodes in demos.items())
    print(f"RESULT {counts} out={out}")


if __name__ == "__main__":
    _FILE = flags.DEFINE_string("file", None, "The log.", required=True)
    _ENV = flags.DEFINE_enum("env", "alfworld", sorted(BENCHMARKS), "What was played in it.")
    _VALID = flags.DEFINE_float(
        "valid_share", VALID_SHARE, "Share of the tasks for the held-out loss."
    )
    flags_lib.run(main, flags_lib.WORKDIR, flags_lib.SEED)
