"""Behaviour cloning: a policy learns to write what the demonstrations' policy wrote."""

import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spa_jax import batching
from spa_jax.config import RowsConfig
from spa_jax.models.config import ModelConfig
from spa_jax.runtime import distributed
from spa_jax.stage_config import SftConfig
from spa_jax.training import costs, metrics, partition, schedule, scoring, sft_update
from spa_jax.training import state as state_lib
from spa_jax.training.loop import Loop, Outcome
from spa_jax.training.state import TrainState
from spa_jax.training.trainable import Trainable
from spa_jax.trajectory import Trajectory

_SCHEDULES = {"cosine": schedule.warmup_cosine, "constant": schedule.warmup_constant}


def clone(
    trainable: Trainable,
    train: Sequence[Trajectory],
    valid: Sequence[Trajectory],
    *,
    sft: SftConfig,
    rows: RowsConfig,
    seed: int,
    out: pathlib.Path,
) -> tuple[float, int]:
    """All updates, from the newest checkpoint if there is one; writes out/policy.

    Args:
      trainable: what is trained of the policy that it starts from.
      train: encoded demonstrations.
      valid: those that are held out; may be empty.
      sft: the settings.
      rows: the static shape.
      seed: of the demonstrations' order.
      out: gets metrics.jsonl, checkpoints and policy/.

    Returns:
      The best held-out loss, in nats a token (inf without one), and the number of updates.
    """
    parts, config = trainable.parts, trainable.policy.config
    per_epoch = -(-len(train) // sft.batch_size)
    total = sft.updates or max(1, round(sft.epochs * per_epoch))
    rate = _SCHEDULES[sft.schedule](sft.learning_rate, total, sft.warmup_share)
    optimizer = state_lib.adamw(rate, clip_norm=state_lib.CLIP_NORM, weight_decay=0.0)
    if sft.ema:
        optimizer = state_lib.averaged(optimizer, sft.ema)
    frozen = parts.frozen_in(config.dtype)
    loss_fn = parts.on_parts(sft_update.make_loss(config))
    trainer = partition.make(rows, loss_fn, optimizer, frozen=frozen)
    evaluate = trainer.forward(parts.on_parts(sft_update.make_nll(config)))
    data, held_out = (
        Demonstrations(trajectories, rows=rows, config=config, trainer=trainer, title=title)
        for trajectories, title in ((train, "frozen layers"), (valid, "frozen layers, held-out"))
    )
    loop = Loop(
        out,
        trainer=trainer,
        params=parts.trained,
        every=sft.checkpoint_every,
        max_skipped_share=rows.max_skipped_share,
    )
    best, bad = distributed.broadcast(
        "held-out losses", lambda: held_out_so_far(out / metrics.METRICS_FILE)
    )
    lengths = [len(t.token_ids) for t in train]
    eval_every = sft.eval_every or per_epoch
    done = loop.start

    def step(update: int, state: TrainState, carry: Mapping[str, Any]) -> Outcome:
        nonlocal best, bad, done
        del carry
        chosen = schedule.batch_of(update, lengths, sft.batch_size, seed)
        tick = time.time()
        state, line = _update(trainer, state, data, chosen)
        line |= costs.of_update(
            config,
            [train[i] for i in chosen],
            time.time() - tick,
            layers=sft.train_layers,
            adapters=bool(parts.lora.rank),
        )
        line["learning_rate"] = float(rate(update))
        done = update + 1
        if valid and (done % eval_every == 0 or done == total):
            averaged = state_lib.policy_params(state)
            line["valid_loss"] = held_out.loss(evaluate, averaged)
            improved = line["valid_loss"] < best
            best, bad = (line["valid_loss"], 0) if improved else (best, bad + 1)
            if improved and sft.patience:
                trainable.save(
                    out / "policy", trained=trainer.fetch(averaged), heads={}, version=done
                )
        shown = {"loss": f"{line['loss']:.3f}"}
        if np.isfinite(best):  # from the first look at the held-out demonstrations on
            shown["valid"] = f"{best:.3f}"
        return Outcome(state, line, shown=shown, last=0 < sft.patience <= bad)

    # Killed after it stopped early and before it said so: nothing is left to train.
    end = loop.start if 0 < sft.patience <= bad else total
    state = loop.run(step, total=total, title="sft", end=end)
    if not (sft.patience and valid):
        trained = trainer.fetch(state_lib.policy_params(state))
        trainable.save(out / "policy", trained=trained, heads={}, version=done)
    return best, done


def _update(
    trainer: partition.Trainer, state: TrainState, data: "Demonstrations", chosen: np.ndarray
) -> tuple[TrainState, dict[str, float]]:
    """One update, and its metrics."""
    tick = time.time()
    packed, cut = data.batches(chosen)
    batches = list(cut)
    tokens = float(packed.token_mask.sum())
    state, sums = trainer.update(state, batches, {"tokens": tokens})
    computed = float(batching.token_count(packed))
    return state, {
        "loss": sums["nll"] / tokens,
        "grad_norm": sums["grad_norm"],
        "tokens": computed,
        "tokens_per_second": computed / (time.time() - tick),
        "padding_share": batching.padding_share(*(batch.rows for batch in batches)),
    }


class Demonstrations:
    """Encoded demonstrations, and what frozen layers make of their tokens (computed once)."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        *,
        rows: RowsConfig,
        config: ModelConfig,
        trainer: partition.Trainer,
        title: str,
    ) -> None:
        """Computes what the frozen layers say, if there are any.

        Args:
          trajectories: N encoded demonstrations.
          rows: the static shape.
          config: the model's shape.
          trainer: makes the updates.
          title: of the progress bar.
        """
        self.trajectories = trajectories
        self._rows = rows
        self._devices = trainer.devices
        self._lower_states = scoring.lower_states(config, trainer, trajectories, rows, title=title)

    def batches(
        self, chosen: Sequence[int] | np.ndarray
    ) -> tuple[batching.PackedRows, Iterator[sft_update.SftBatch]]:
        """The rows of the demonstrations with these indices, and their microbatches."""
        packed = batching.pack([self.trajectories[i] for i in chosen], **self._rows.packing)
        rows = self._rows
        cut = batching.microbatches(packed, rows.rows_per_device, self._devices, rows.row_buckets)
        return packed, (
            sft_update.SftBatch(b, scoring.lower_states_in_rows(self._lower_states, chosen, b))
            for b in cut
        )

    def loss(self, evaluate: Callable, params: Any) -> float:
        """Mean negative log-likelihood a policy token of all of them, in nats.

        Args:
          evaluate: (params, batch) -> sums of it, from `sft_update.make_nll`.
          params: on the devices.
        """
        packed, batches = self.batches(range(len(self.trajectories)))
        total = sum(float(np.sum(evaluate(params, batch))) for batch in batches)
        return total / float(packed.token_mask.sum())


def held_out_so_far(path: pathlib.Path) -> tuple[float, int]:
    """(best held-out loss, held-out losses since) of the updates before a resume.

    Args:
      path: metrics.jsonl, cut back to the checkpoint.
    """
    if not path.exists():
        return float("inf"), 0
    found = [m["valid_loss"] for m in metrics.read_metrics(path) if "valid_loss" in m]
    losses = [float("inf") if loss is None else loss for loss in found]  # None: was not finite
    if not losses:
        return float("inf"), 0
    return min(losses), len(losses) - 1 - int(np.argmin(losses))
