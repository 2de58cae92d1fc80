"""Stage 4: gives every step its contribution and its reward.

Reads W/iteration_I/explore/trajectories.jsonl and W/iteration_I/progress; writes
W/iteration_I/annotated.jsonl: the same episodes with contributions, fused rewards
(alpha * c + beta * grounding) and the reference policy's log-probabilities.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping

import numpy as np

from spa_jax import annotation, continuations, episodes, policy, provenance, store
from spa_jax.config import fit_attention
from spa_jax.errors import UserError
from spa_jax.run import EPISODES, Run
from spa_jax.runtime import distributed
from spa_jax.stage_config import ROUND_CREDITS
from spa_jax.store import Key
from spa_jax.training import estimator_data
from spa_jax.trajectory import Trajectory


def run(
    run: Run, number: int, *, base: str = "", data: pathlib.Path | None = None
) -> list[Trajectory]:
    """Annotates a round's episodes; returns them.

    Args:
      run: the run.
      number: of the round.
      base: the reference policy, whose hidden states the estimator reads; "": the run's base.
      data: the episodes; None: what the round explored.

    Raises:
      UserError: there is no estimator, or no episode to annotate.
    """
    files = run.round(number)
    data, base = data or files.episodes, base or str(run.base)
    estimator = annotation.head_folder(files.progress, base)
    same = provenance.check_stage(
        run,
        "annotate",
        files.annotated,
        inputs={
            "base policy": provenance.policy_digest(base),
            "estimator": provenance.estimator_digest(estimator),
            "episodes": provenance.file_digest(data),
        },
    )
    if same and distributed.broadcast(f"{files.annotated}: is there", files.annotated.exists):
        print(f"annotate: already done ({files.annotated})", flush=True)
        return store.read(files.annotated)
    branches = continuations.of_round(run, number, data)
    return annotate_file(
        run, data, out=files.annotated, progress=files.progress, base=base, branches=branches
    )


def run_evaluation(run: Run, name: str, keys: Collection[Key] | None = None) -> list[Trajectory]:
    """Annotates an evaluation's episodes in place, by the last round's estimator.

    Args:
      run: the run.
      name: of the evaluation.
      keys: the episodes that are annotated; None: all.  The others are written as they are.
    """
    path = run.evaluation(name) / EPISODES
    last = run.round(run.settings.method.iterations - 1)
    if run.settings.credit.credit in ROUND_CREDITS:
        # Nobody learns from these rewards: the contributions stand for what a round is needed for.
        credit = dataclasses.replace(run.settings.credit, credit="spa")
        run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, credit=credit))
    return annotate_file(run, path, out=path, progress=last.progress, base=str(run.base), keys=keys)


def annotate_file(
    run: Run,
    data: pathlib.Path,
    *,
    out: pathlib.Path,
    progress: pathlib.Path,
    base: str,
    keys: Collection[Key] | None = None,
    branches: Mapping[Key, np.ndarray] | None = None,
) -> list[Trajectory]:
    """Writes the episodes of `data` to the file `out`, annotated; returns those.

    `branches` is as in `annotation.annotate`. With `keys`, only the episodes with these keys are
    annotated; the others are written as they are, and environment errors are left out either way.
    """
    settings = run.settings
    chat_format = policy.recorded_chat_format(data.parent)
    reference = policy.load(base, chat_format, fit_attention(settings.compute, settings.rows))
    annotation.progress_head(reference, progress)  # before the long pass: is there one?
    played = episodes.completed(store.read(data))
    trajectories = [t for t in played if keys is None or t.key in keys]
    episodes.assert_same_everywhere(trajectories, data)
    if not trajectories:
        raise UserError(f"{data}: holds no episode to annotate")
    scores = estimator_data.scores_of(reference, data, trajectories, settings.rows)
    given, expected = annotation.contributions(
        reference, progress, trajectories, scores, settings.rows
    )
    annotated = annotation.annotate(
        trajectories,
        scores,
        given,
        expected=expected,
        settings=settings.credit,
        seed=run.seed,
        reference=provenance.policy_digest(reference.folder),
        branches=branches,
    )
    by_key = {t.key: t for t in annotated}
    every = [by_key.get(t.key, t) for t in played]
    distributed.first_alone(f"write {out}", lambda: store.write(out, every))
    return annotated
