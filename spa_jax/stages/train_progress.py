"""Stage 3: trains the progress estimator on the explored episodes of all rounds so far.

Heads read the base policy's last hidden states (`training/estimator_update.py`).  The policy is
frozen, or trained with them: all of it (--progress_trunk=trained), or adapters on it
(--lora_stages=progress).  Reads W/iteration_I/explore of all rounds up to this one; writes
W/iteration_I/progress/{heads.safetensors,metrics.jsonl}, and trunk/ or adapter/.
"""

import os
import time

from spa_jax import files, policy, provenance
from spa_jax.config import fit_attention
from spa_jax.models.io import tensors
from spa_jax.policy import ADAPTER, TRUNK
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.training import estimation, estimator_data, scoring, trainable
from spa_jax.training.estimator_data import FrozenTrunk, TrainedTrunk
from spa_jax.training.estimator_update import PAPER


def run(run: Run, number: int, *, trunk: str = "") -> None:
    """Trains the estimator of a round.

    Args:
      run: the run.
      number: of the round.
      trunk: the policy whose hidden states are read; "": the base.

    Raises:
      UserError: no round has an episode to learn from.
    """
    out, settings = run.round(number).progress, run.settings
    explored = [run.round(i).episodes for i in range(number, -1, -1)]  # the newest first
    trunk = trunk or str(run.base)
    provenance.check_stage(
        run,
        "progress",
        out,
        inputs={
            "base policy": provenance.policy_digest(trunk),
            **{
                f"episodes of {path.parent.parent.name}": provenance.file_digest(path)
                for path in explored
            },
        },
    )
    if files.is_done(out, "progress"):
        return
    started = time.time()
    chat_format = policy.recorded_chat_format(run.round(number).explore)
    base = policy.load(trunk, chat_format, fit_attention(settings.compute, settings.rows))
    progress, paper = settings.progress, settings.progress.estimator == PAPER
    features, trajectories = estimator_data.load_features(
        base, explored, settings.rows, paper=paper, ppo_layers=settings.ppo.train_layers
    )
    lora = run.lora("progress")
    read: FrozenTrunk | TrainedTrunk = FrozenTrunk(features, progress.prefix_weight)
    if lora.rank or progress.trunk == "trained":
        read = TrainedTrunk(
            trainable.make(base, lora=lora, seed=run.seed),
            scoring.answered(trajectories, base.chat, base.config, settings.rows),
            settings.rows,
            paper=paper,
            prefixes=progress.prefix_weight,
        )
    params, figures = estimation.estimate(
        read,
        features,
        [t.task for t in trajectories],
        progress=progress,
        max_skipped_share=settings.rows.max_skipped_share,
        seed=run.seed,
        out=out,
    )
    if distributed.is_first():
        tensors.save_heads(out, {"progress": params["progress"]})
        if lora.rank:
            trainable.save_adapter(out / ADAPTER, lora, params["adapter"], base.folder)
        elif isinstance(read, TrainedTrunk):
            read.trainable.save(out / TRUNK, trained=params, heads={}, version=base.version)
    # Relative, so that a run's folder can be moved.
    folder = os.path.relpath(base.folder.resolve(), out.resolve())
    files.mark_done(out, started, trunk=folder, **figures)
