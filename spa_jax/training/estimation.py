"""The progress estimator is trained: a head on the features of the explored episodes."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spa_jax.models.config import Params
from spa_jax.stage_config import ProgressConfig
from spa_jax.training import estimator_data, estimator_update, schedule
from spa_jax.training import state as state_lib
from spa_jax.training.estimator_data import FrozenTrunk, TrainedTrunk
from spa_jax.training.estimator_update import StepFeatures
from spa_jax.training.loop import Loop, Outcome
from spa_jax.training.state import TrainState

_WARMUP_SHARE = 0.03
_VALID_SHARE = 0.1  # of the tasks, held out


def estimate(
    trunk: FrozenTrunk | TrainedTrunk,
    features: StepFeatures,
    tasks: Sequence[str],
    *,
    progress: ProgressConfig,
    max_skipped_share: float,
    seed: int,
    out: pathlib.Path,
) -> tuple[Params, dict[str, float]]:
    """All updates, from the newest checkpoint if there is one.

    Args:
      trunk: what the heads read.
      features: of all N episodes under the frozen trunk: they scale the heads' input.
      tasks: [N] the episodes' tasks; all episodes of a task are learnt from, or held out.
      progress: the settings.
      max_skipped_share: as in `Loop`.
      seed: of the head, the held-out tasks and the order.
      out: gets metrics.jsonl (a line an epoch) and checkpoints.

    Returns:
      The trained parameters on the host: {"progress": heads} and what was trained of the trunk;
      and the figures of the held-out episodes with the number of updates.
    """
    train, valid = estimator_data.split_by_task(tasks, _VALID_SHARE, seed)
    learnt_from = jax.tree.map(lambda x: x[train], features)
    clock = jax.device_get(estimator_update.make_clock(progress.estimator, learnt_from))
    params = estimator_update.init(
        progress.estimator,
        progress.width,
        progress.heads,
        key=jax.random.key(seed),
        features=learnt_from,
        clock=clock,
    )
    per_epoch = -(-len(train) // progress.batch_size)
    total = progress.epochs * per_epoch
    rate = schedule.warmup_cosine(progress.learning_rate, total, _WARMUP_SHARE)
    optimizer = state_lib.adamw(
        rate, clip_norm=progress.clip_norm, weight_decay=progress.weight_decay
    )
    trainer = trunk.trainer(optimizer, clock)
    loop = Loop(
        out,
        trainer=trainer,
        params={"progress": params} | trunk.trained,
        carry={"epoch": np.zeros(2)},  # squared error and episodes of the epoch so far
        every=max(1, progress.epochs // 2) * per_epoch,
        max_skipped_share=max_skipped_share,
    )
    equal = [1] * len(train)

    def step(update: int, state: TrainState, carry: Mapping[str, Any]) -> Outcome:
        chosen = train[schedule.batch_of(update, equal, progress.batch_size, seed)]
        batches = trunk.batches(chosen, progress.batch_size, trainer.devices)
        state, sums = trainer.update(state, batches, {"trajectories": len(chosen)})
        epoch = carry["epoch"] + [sums["squared_error"], len(chosen)]
        if (update + 1) % per_epoch:
            return Outcome(state, None, carry={"epoch": epoch})
        now = _clocked(trainer.fetch(state.params), clock)
        judged = estimator_data.judge(now, trunk, valid)
        line = {"loss": epoch[0] / epoch[1], **judged}
        return Outcome(state, line, carry={"epoch": np.zeros(2)})

    state = loop.run(step, total=total, title="progress")
    params = _clocked(trainer.fetch(state.params), clock)
    return params, {"updates": total, **estimator_data.judge(params, trunk, valid)}


def _clocked(params: Params, clock: Params) -> Params:
    """The heads with their clock, which is not trained."""
    return {**params, "progress": {**params["progress"], **clock}}
