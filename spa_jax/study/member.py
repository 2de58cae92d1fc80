"""One run of a study, in a process of its own: a base, what a seed begins with, or an arm.

    base                demonstrations -> SFT
    start/seed_S        the base's episodes of round 0, the estimator of them, the base on the
                        held-out games: all arms of the seed begin with these, which are the same in
                        each (the same policy, games and random numbers), so they are copied
    ARM/seed_S          the rounds, with the policy on the panel after each; then what `method.run`
                        does in the end: the held-out games, the estimator judged, the report

Each leaves result.json when all is done.  Run again, it goes on where it stopped.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

from spa_jax import files, method, provenance, store
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.run import BASE, SPA, Run
from spa_jax.stages import demonstrate, evaluate, explore, prepare, sft, train_progress
from spa_jax.study import plan, workdir
from spa_jax.study.arms import Chosen
from spa_jax.study.plan import Study
from spa_jax.training import metrics
from spa_jax.trajectory import Status

_LINKED = (".npz", ".safetensors")  # large, and never written twice: both folders have the same


def run(study: Study, name: str, argv: Sequence[str]) -> None:
    """Does one run of the study.

    Args:
      study: the study.
      name: its folder, below the study's.
      argv: the program's arguments, for run.json.

    Raises:
      UserError: the study has no such run.
    """
    started = time.time()
    arm, _, seed = name.partition("/seed_")
    arms = {chosen.folder for chosen in study.arms} | {workdir.BASE, workdir.START}
    number = int(seed) if seed.isdecimal() else study.seeds[0]
    if arm not in arms or number not in study.seeds or (not seed and arm != workdir.BASE):
        raise UserError(f"--only={name} is no run of this study; give ARM/seed_S")
    if arm == workdir.BASE:
        made = study.base_run(number)
    elif arm == workdir.START:
        made = study.start(number)
    else:
        made = study.run(study.arm(arm), number)
    with provenance.recorded(made, "study", argv):
        if arm == workdir.BASE:
            found = _make_base(made)
        elif arm == workdir.START:
            found = _make_start(study, made)
        else:
            found = _train_arm(study, study.arm(arm), made, number)
    found |= {"made_from": plan.made_from(study, made), "wall_s": round(time.time() - started, 1)}
    found["machine"] = json.loads(made.json.read_text())["machine"]
    files.write_json(workdir.result(made.workdir), found)


def _make_base(run: Run) -> dict[str, Any]:
    run = prepare.run(run)
    demonstrate.run(run)
    sft.run(run)
    return {"base": provenance.policy_digest(run.base)}


def _make_start(study: Study, run: Run) -> dict[str, Any]:
    run = prepare.run(run)
    explore.run(run, 0)
    train_progress.run(run, 0)
    evaluate.run(run, BASE, policy=str(run.base))
    return _result(run, BASE, [_point(run, 0, _play_panel(study, run, 0, str(run.base), BASE))])


def _train_arm(study: Study, chosen: Chosen, run: Run, seed: int) -> dict[str, Any]:
    start, made = study.start(seed), study.base_run(seed)
    share(start, run)
    points = json.loads(workdir.result(start.workdir).read_text())["curve"]
    if chosen.arm.kind == "sft":
        if made.demos.exists():
            _copy(made.demos, run.demos)
        points.append(_continue_sft(study, run, made, seed))
    else:

        def after_round(run: Run, number: int) -> None:
            done = number + 1
            policy = str(run.round(number).policy)
            last = done == run.settings.method.iterations
            name = _play_panel(study, run, done, policy, SPA if last else "")
            points.append(_point(run, done, name))

        method.run(run, after_round)
    return _result(run, SPA, points)


def _continue_sft(study: Study, run: Run, made: Run, seed: int) -> dict[str, Any]:
    """SFT goes on from the base, on the same demonstrations, for as many tokens as the partner."""
    partner = study.partner()
    if partner is None:
        raise UserError(
            "continued_sft gets as many tokens as an arm with rounds; add one to --arms"
        )
    other = json.loads(workdir.result(study.run(partner, seed).workdir).read_text())
    spent = metrics.read_metrics(made.sft / metrics.METRICS_FILE)
    a_update = sum(m["tokens"] for m in spent) / len(spent)
    updates = max(1, round(other["curve"][-1]["tokens"] / a_update))
    settings = dataclasses.replace(
        run.settings.sft, updates=updates, patience=0, eval_every=updates
    )
    sft.train(run, out=run.sft, start=str(run.base), sft=settings, seed=seed + 1)
    evaluate.run(run, SPA, policy=str(run.sft / "policy"))
    name = _play_panel(study, run, run.settings.method.iterations, str(run.sft / "policy"), SPA)
    tokens = sum(m["tokens"] for m in metrics.read_metrics(run.sft / metrics.METRICS_FILE))
    return {
        "round": run.settings.method.iterations,
        "episodes": 0,
        "tokens": tokens,
        "seconds": _seconds(run.sft),
        "estimator_seconds": 0.0,
        **_outcomes(run, name),
    }


def _play_panel(study: Study, run: Run, done: int, policy: str, whole: str) -> str:
    """Plays the panel after so many rounds; the name of its evaluation.

    Args:
      study: the study.
      run: of the arm.
      done: rounds.
      policy: that plays.
      whole: the evaluation of all held-out games by this policy; "" if there is none.  Where the
        panel is all of them, it is the panel, and nothing is played twice.
    """
    name = workdir.round_name(done)
    if whole and not study.panel:
        if not run.evaluation(whole).exists():
            evaluate.run(run, name, policy=policy)
            _copy(run.evaluation(name), run.evaluation(whole))
        return whole
    evaluate.run(run, name, policy=policy, games=study.panel or None)
    return name


# --- what all arms begin with -----------------------------------------------------------------


def share(start: Run, run: Run) -> None:
    """Gives a run what is the same in all arms, as far as its settings make it the same."""

    def same(*stages: str) -> bool:
        return all(
            provenance.stage_settings(start, stage) == provenance.stage_settings(run, stage)
            for stage in stages
        )

    if same("explore"):
        _copy(start.round(0).explore, run.round(0).explore)
    if same("explore", "progress"):
        _copy(start.round(0).progress, run.round(0).progress)
    one, other = start.settings, run.settings
    if same("evaluate") and one.method.eval_temperature == other.method.eval_temperature:
        _copy(start.evaluation(BASE), run.evaluation(BASE))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a folder under a temporary name, then renames it; nothing if the target is there."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def copy(one: str, other: str) -> None:
        if one.endswith(_LINKED):
            try:
                os.link(one, other)
                return
            except OSError:  # another disk, or one without links
                pass
        shutil.copy2(one, other)

    shutil.copytree(source, partial, copy_function=copy)
    partial.rename(target)


# --- what a run has found ---------------------------------------------------------------------


def _result(run: Run, name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """What the study reads of a run.

    Args:
      run: the run.
      name: its evaluation on all held-out games.
      points: the curve; the last point's costs are the run's.
    """
    summary = json.loads((run.evaluation(name) / "summary.json").read_text())
    credit = json.loads(run.estimator.read_text()) if run.estimator.exists() else None
    return {
        **_outcomes(run, name),
        "grounding": summary["grounding"],
        "steps": summary["mean_steps"],
        "curve": points,
        "credit": credit,
    }


def _outcomes(run: Run, name: str) -> dict[str, list[str]]:
    """The games of an evaluation that were won, and those that were lost."""
    played = store.read(run.evaluation(name) / run_lib.EPISODES)
    played = [t for t in played if t.status is not Status.ENV_ERROR]
    return {
        "won": [t.task for t in played if t.success],
        "lost": [t.task for t in played if not t.success],
    }


def _point(run: Run, done: int, name: str) -> dict[str, Any]:
    """A point of the curve: what the rounds so far took, and the panel after them."""
    rounds = [run.round(number) for number in range(done)]
    estimator = sum(_seconds(r.progress) for r in rounds)
    return {
        "round": done,
        "episodes": sum(_done(r.explore)["episodes"] for r in rounds),
        "tokens": sum(
            m.get("tokens", 0.0)
            for r in rounds
            for m in metrics.read_metrics(r.ppo / metrics.METRICS_FILE)
        ),
        "seconds": sum(_seconds(r.explore) + _seconds(r.ppo) for r in rounds) + estimator,
        "estimator_seconds": estimator,
        **_outcomes(run, name),
    }


def _done(folder: pathlib.Path) -> dict[str, Any]:
    return files.read_done(folder)


def _seconds(folder: pathlib.Path) -> float:
    """How long the stage of a folder took."""
    return float(_done(folder)["seconds"])
