"""What a run has left in its workdir so far; a stage that has not run is simply not there.

W/demos/{train,valid}/trajectories.jsonl
W/sft/metrics.jsonl
W/iteration_i/{explore/trajectories.jsonl, progress/metrics.jsonl, ppo/metrics.jsonl}
W/eval/NAME/trajectories.jsonl
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spa_jax import evaluation, store
from spa_jax.errors import UserError
from spa_jax.run import BASE, EPISODES, SPA, Round, Run
from spa_jax.stage_config import Settings
from spa_jax.training import metrics
from spa_jax.trajectory import Trajectory

# The order of the rows: the base, what it became, then the others by name.
_FIRST_EVALUATIONS = (BASE, SPA)


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
    run = Run(folder, policy="", seed=0, settings=Settings())
    rounds = run.rounds()
    found = Workdir(
        name=folder.resolve().name,
        played=_played(run, rounds),
        stages={
            "sft": _metrics([(0, run.sft)]),
            "progress": _metrics([(r.number, r.progress) for r in rounds]),
            "ppo": _metrics([(r.number, r.ppo) for r in rounds]),
        },
        evaluations=_evaluations(run),
    )
    if not (found.played or found.evaluations or any(found.stages.values())):
        raise UserError(
            f"--workdir={folder}: nothing to report: no demonstrations, metrics or evaluations; "
            "run a stage with this --workdir first"
        )
    return found


def _played(run: Run, rounds: list[Round]) -> dict[str, evaluation.Summary]:
    paths = {
        "Demonstrations": run.demonstrations("train"),
        "Demonstrations held out": run.demonstrations("valid"),
    }
    for r in rounds:
        name = "Exploration" if len(rounds) == 1 else f"Exploration, round {r.number + 1}"
        paths[name] = r.episodes
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


def _evaluations(run: Run) -> dict[str, list[Trajectory]]:
    names = {path.parent.name for path in run.evaluations.glob(f"*/{EPISODES}")}
    ordered = [name for name in _FIRST_EVALUATIONS if name in names]
    ordered += sorted(names - set(ordered))
    read = {name: store.read(run.evaluation(name) / EPISODES) for name in ordered}
    return {name: trajectories for name, trajectories in read.items() if trajectories}
