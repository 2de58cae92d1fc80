"""--redo: a stage of a run is removed with what follows from it, so that it is made anew."""

import pathlib
import shutil

from spa_jax import provenance
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.runtime import distributed


def remove(run: Run, stage: str, number: int = 0) -> list[pathlib.Path]:
    """Removes a stage and what follows from it, for the flag --redo; says what.

    Of several processes the first removes, and the others wait.

    Args:
      run: the run.
      stage: STAGE, STAGE:ROUND or evaluate:NAME.
      number: the round, if `stage` names none.

    Returns:
      What was removed.

    Raises:
      UserError: there is no such stage.
    """
    name, _, which = stage.partition(":")
    in_a_round = name in ("explore", "progress", "annotate", "ppo")
    if name not in provenance.STAGES or (which and not (in_a_round or name == "evaluate")):
        raise UserError(f"--redo={stage}: no such stage; {_redo_help()}")
    if in_a_round and which and not which.isdecimal():
        raise UserError(f"--redo={stage}: {which!r} is no round; {_redo_help()}")
    if which == ".." or pathlib.Path(which).name != which:  # would leave W/eval
        raise UserError(f"--redo={stage}: {which!r} is no evaluation; {_redo_help()}")
    doomed = _followers(run, name, int(which) if in_a_round and which else number, which)

    def remove_all() -> list[str]:
        there = [path for path in doomed if path.exists()]
        for path in there:
            print(f"--redo={stage}: removes {path}", flush=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not there:
            print(f"--redo={stage}: nothing to remove", flush=True)
        return [str(path) for path in there]

    return [pathlib.Path(path) for path in distributed.broadcast(f"--redo={stage}", remove_all)]


def _redo_help() -> str:
    return (
        "give games, demos, sft, explore:ROUND, progress:ROUND, annotate:ROUND, ppo:ROUND, "
        "evaluate, evaluate:NAME or truth"
    )


def _followers(run: Run, stage: str, number: int, name: str) -> list[pathlib.Path]:
    """A stage's files, and those of all that follows from it, the last first."""
    judged = [run.report, run.estimator]
    if stage == "truth":
        return [*judged, run.truth]
    if stage == "evaluate":
        # The truth is about the base's episodes, whatever their split.
        told = [run.truth] if not name or name.startswith(run_lib.BASE) else []
        return [*judged, *told, run.evaluation(name) if name else run.evaluations]
    order = provenance.STAGES.index(stage)
    before = [
        path
        for path, first in ((run.sft, "sft"), (run.demos, "demos"), (run.games, "games"))
        if order <= provenance.STAGES.index(first)
    ]
    if before:
        rounds = [r.folder for r in run.rounds()]
        return [*judged, run.truth, run.evaluations, *reversed(rounds), *before]
    own = run.round(number)
    parts = {
        "ppo": [own.ppo],
        "annotate": [own.annotated, run_lib.fingerprint(own.annotated)],
        "progress": [own.progress],
        "explore": [own.explore],
    }
    later = [r.folder for r in run.rounds() if r.number > number]
    trained = [p for p in run.evaluations.glob("*") if p != run.evaluation(run_lib.BASE)]
    this = [
        path for s, paths in parts.items() if order <= provenance.STAGES.index(s) for path in paths
    ]
    return [*judged, *sorted(trained), *reversed(later), *this]
