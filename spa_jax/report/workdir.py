"""What a run has left in its workdir so far; a stage that has not run is simply not there."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spa_jax import evaluation, failures, store, truth
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.store import Key
from spa_jax.training import metrics
from spa_jax.trajectory import Trajectory

# The order of the rows: the base, what it became, then the others by name.
_FIRST_EVALUATIONS = (run_lib.BASE, run_lib.SPA)


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
      summaries: name -> their figures.
      ran: what W/run.json says: settings, command, versions, machine; {} without one.
      advantages: name of an evaluation -> the true advantages of its episodes' steps, by key.
      critic: name of an evaluation -> the figures of the ridge critic's credit of its episodes.
    """

    name: str
    played: Mapping[str, evaluation.Summary]
    stages: Mapping[str, list[StageMetrics]]
    evaluations: Mapping[str, list[Trajectory]]
    summaries: Mapping[str, evaluation.Summary]
    ran: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    advantages: Mapping[str, Mapping[Key, np.ndarray]] = dataclasses.field(default_factory=dict)
    critic: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def read_workdir(folder: pathlib.Path) -> Workdir:
    """Reads what is there.

    Raises:
      UserError: if the folder is not there, holds nothing to report, or a file in it is broken.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--workdir={folder}: no such folder; give the --workdir of a run")
    run = run_lib.at(folder)
    rounds = run.rounds()
    evaluations = _evaluations(run.evaluations)
    found = Workdir(
        name=folder.resolve().name,
        played=_played(run),
        stages={
            "sft": _metrics([(0, run.sft)]),
            "progress": _metrics((r.number, r.progress) for r in rounds),
            "ppo": _metrics((r.number, r.ppo) for r in rounds),
        },
        evaluations=evaluations,
        summaries={
            name: summary_of(episodes, run.evaluation(name))
            for name, episodes in evaluations.items()
        },
        ran=_ran(run),
        advantages={name: truth.read_advantages(run.advantages, name) for name in evaluations},
        critic=_critic(run),
    )
    if not (found.played or found.evaluations or any(found.stages.values())):
        raise UserError(
            f"--workdir={folder}: nothing to report: no demonstrations, metrics or evaluations; "
            "run a stage with this --workdir first"
        )
    return found


def _played(run: Run) -> dict[str, evaluation.Summary]:
    paths = {
        "Demonstrations": run.demonstrations("train"),
        "Demonstrations held out": run.demonstrations("valid"),
    }
    rounds = run.rounds()
    for r in rounds:
        name = "Exploration" if len(rounds) == 1 else f"Exploration, round {r.number + 1}"
        paths[name] = r.episodes
    return {
        name: summary_of(store.read(path), path.parent)
        for name, path in paths.items()
        if path.exists()
    }


def summary_of(trajectories: list[Trajectory], folder: pathlib.Path) -> evaluation.Summary:
    """The figures of a folder's episodes, with those that have no outcome counted."""
    failed, left_out = failures.count(folder, {t.key for t in trajectories})
    return evaluation.summarize(trajectories, failed=failed, left_out=left_out)


def _metrics(folders: Iterable[tuple[int, pathlib.Path]]) -> list[StageMetrics]:
    found = []
    for number, folder in folders:
        path = folder / metrics.METRICS_FILE
        records = metrics.read_metrics(path) if path.exists() else []
        if records:
            found.append(StageMetrics(number, records))
    return found


def _evaluations(folder: pathlib.Path) -> dict[str, list[Trajectory]]:
    names = {path.parent.name for path in folder.glob(f"*/{run_lib.EPISODES}")}
    ordered = [name for name in _FIRST_EVALUATIONS if name in names]
    ordered += sorted(names - set(ordered))
    read = {name: store.read(folder / name / run_lib.EPISODES) for name in ordered}
    return {name: trajectories for name, trajectories in read.items() if trajectories}


def _critic(run: Run) -> dict[str, dict[str, float]]:
    """What judge_credit found of the ridge critic, by the evaluation that it was judged on."""
    if not run.credits.exists():
        return {}
    try:
        judged = json.loads(run.credits.read_text())
        figures = judged["credits"].get("ridge critic")
        return {judged["evaluation"]: figures} if figures else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.credits}: not what judge_credit writes ({error}); remove it, and run it again"
        ) from error


def _ran(run: Run) -> dict[str, Any]:
    """W/run.json.

    Raises:
      UserError: it is no JSON object.
    """
    if not run.json.exists():
        return {}
    try:
        return dict(json.loads(run.json.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{run.json}: not a record of a run ({error}); remove it, and the next stage writes it"
        ) from error
