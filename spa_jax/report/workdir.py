"""What a run has left in its workdir so far; a stage that has not run is simply not there.

W/demos/{train,valid}/trajectories.jsonl
W/sft/metrics.jsonl
W/iteration_i/{explore/trajectories.jsonl, progress/metrics.jsonl, ppo/metrics.jsonl}
W/eval/NAME/trajectories.jsonl
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spa_jax import evaluation, store
from spa_jax.errors import UserError
from spa_jax.training import metrics
from spa_jax.trajectory import Trajectory

# The order of the rows: the base, what it became, then the others by name.
_FIRST_EVALUATIONS = (evaluation.BASE, evaluation.SPA)


@dataclasses.dataclass(frozen=True)
class StageMetrics:
    """One training stage of one round: the lines of its metrics, `round` from 0."""

    round: int
    records: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's files, read.

    Attributes:
      name: the folder's own name.
      played: what the training stages saw, name -> figures, in order.
      stages: "sft", "progress" and "ppo" -> its metrics, one a round, those that have a line.
      evaluations: name -> episodes, the base ("sft") first and "spa" after it.
    """

    name: str
    played: Mapping[str, evaluation.Summary]
    stages: Mapping[str, list[StageMetrics]]
    evaluations: Mapping[str, list[Trajectory]]


def read_workdir(folder: Path) -> Workdir:
    """Reads what is there.

    Raises:
      UserError: if the folder is not there, holds nothing to report, or a file in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--workdir={folder}: no such folder; give the --workdir of a run")
    rounds = sorted(
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(r"iteration_(\d+)", path.name))
    )
    found = Workdir(
        name=folder.resolve().name,
        played=_played(folder, rounds),
        stages={
            "sft": _metrics([(0, folder / "sft")]),
            "progress": _metrics([(i, path / "progress") for i, path in rounds]),
            "ppo": _metrics([(i, path / "ppo") for i, path in rounds]),
        },
        evaluations=_evaluations(folder / "eval"),
    )
    if not (found.played or found.evaluations or any(found.stages.values())):
        raise UserError(
            f"--workdir={folder}: nothing to report: no demonstrations, metrics or evaluations; "
            "run a stage with this --workdir first"
        )
    return found


def _played(folder: Path, rounds: list[tuple[int, Path]]) -> dict[str, evaluation.Summary]:
    paths = {
        "Demonstrations": folder / "demos" / "train" / "trajectories.jsonl",
        "Demonstrations held out": folder / "demos" / "valid" / "trajectories.jsonl",
    }
    for number, path in rounds:
        name = "Exploration" if len(rounds) == 1 else f"Exploration, round {number + 1}"
        paths[name] = path / "explore" / "trajectories.jsonl"
    return {
        name: evaluation.summarize(store.read(path))
        for name, path in paths.items()
        if path.exists()
    }


def _metrics(folders: list[tuple[int, Path]]) -> list[StageMetrics]:
    found = []
    for number, folder in folders:
        path = folder / metrics.METRICS_FILE
        records = metrics.read_metrics(path) if path.exists() else []
        if records:
            found.append(StageMetrics(number, records))
    return found


def _evaluations(folder: Path) -> dict[str, list[Trajectory]]:
    names = {path.parent.name for path in folder.glob("*/trajectories.jsonl")}
    ordered = [name for name in _FIRST_EVALUATIONS if name in names]
    ordered += sorted(names - set(ordered))
    read = {name: store.read(folder / name / "trajectories.jsonl") for name in ordered}
    return {name: trajectories for name, trajectories in read.items() if trajectories}
