"""Stage 3: trains the progress estimator on the explored episodes of all rounds so far.

The trunk is the frozen base policy; a head reads its last hidden state at the last token of every
step.  With adapters (--lora_stages=progress) the trunk is trained with the head.  Reads
W/iteration_I/explore of all rounds up to this one; writes
W/iteration_I/progress/{heads.safetensors,metrics.jsonl} and adapter/.
"""

import os
import time

from spa_jax import files, policy, provenance
from spa_jax.config import fit_attention
from spa_jax.models.io import tensors
from spa_jax.policy import ADAPTER
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.training import estimation, estimator_data, trainable
from spa_jax.training.estimator_data import AdaptedTrunk, FrozenTrunk


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
    base = policy.load(trunk, compute=fit_attention(settings.compute, settings.rows))
    features, trajectories = estimator_data.load_features(
        base, explored, settings.rows, ppo_layers=settings.ppo.train_layers
    )
    lora = run.lora("progress")
    read: FrozenTrunk | AdaptedTrunk = FrozenTrunk(features)
    if lora.rank:
        adapters = trainable.make(base, lora=lora, seed=run.seed)
        read = AdaptedTrunk(adapters, trajectories, settings.rows)
    params, figures = estimation.estimate(
        read,
        features,
        [t.task for t in trajectories],
        progress=settings.progress,
        seed=run.seed,
        out=out,
    )
    if distributed.is_first():
        tensors.save_heads(out, {"progress": params["progress"]})
        if lora.rank:
            trainable.save_adapter(out / ADAPTER, lora, params["adapter"], base.folder)
    # Relative, so that a run's folder can be moved.
    folder = os.path.relpath(base.folder.resolve(), out.resolve())
    files.mark_done(out, started, trunk=folder, **figures)
