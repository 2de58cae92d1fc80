"""Stage 1: clones a base agent from expert demonstrations.

    python -m experiments.sft --workdir=W --policy=models/smollm2-135m-instruct

Reads W/demos/{train,valid}/trajectories.jsonl; writes W/sft/policy (a Hugging Face folder: the
last weights, with --sft_ema their average, with --sft_patience those of the best held-out loss),
metrics.jsonl and checkpoints.  Run again, it continues.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import optax
import tqdm
from absl import flags

from experiments import common
from experiments import flags as flags_lib
from spa_jax import batching, chat, store
from spa_jax import config as config_lib
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ChatConfig,
    ComputeConfig,
    DistributedConfig,
    LoraConfig,
    RowsConfig,
    SftConfig,
)
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params
from spa_jax.training import (
    distributed,
    partition,
    preemption,
    schedule,
    scoring,
    sft_update,
)
from spa_jax.training import metrics as metrics_lib
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.trajectory import Trajectory


def run(
    out: pathlib.Path,
    policy_folder: str,
    train: list[Trajectory],
    valid: list[Trajectory],
    sft: SftConfig,
    rows: RowsConfig,
    seed: int,
    lora: LoraConfig,
    chat_format: str = chat.TEMPLATE,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> None:
    """Trains, from the newest checkpoint if there is one, and writes out/policy."""
    if common.is_done(out, "sft"):
        return
    config_lib.check_trained(lora, sft.train_layers, "--sft_train_layers")
    rows = dataclasses.replace(rows, row_buckets=sft.row_buckets or rows.row_buckets)
    compute = config_lib.fit_attention(compute, rows)
    started = time.time()
    if not train:
        raise UserError(
            f"{out}: no demonstration to learn from; the expert must win within --max_steps"
        )
    policy = common.load_policy(policy_folder, chat_format, compute)
    train = [chat.encode_trajectory(policy.chat, t) for t in train]
    valid = [chat.encode_trajectory(policy.chat, t) for t in valid]
    common.check_lengths(policy, [*train, *valid], "demonstrations", rows)
    common.agree_on([*train, *valid], "demonstrations")
    per_epoch = -(-len(train) // sft.batch_size)
    total = sft.updates or max(1, round(sft.epochs * per_epoch))
    schedules = {"cosine": schedule.warmup_cosine, "constant": schedule.warmup_constant}
    rate = schedules[sft.schedule](sft.learning_rate, total, sft.warmup_share)
    optimizer = state_lib.adamw(rate, clip_norm=sft.clip_norm, weight_decay=sft.weight_decay)
    if sft.ema:
        optimizer = state_lib.averaged(optimizer, sft.ema)
    trainable = common.trainable(policy, sft.train_layers, lora, seed)
    parts = trainable.parts
    loss_fn = parts.on_parts(sft_update.make_loss(policy.config))
    frozen = parts.frozen_in(policy.config.dtype)
    trainer = partition.make(rows, loss_fn, optimizer, frozen, compute.accum_dtype)
    evaluate = trainer.forward(parts.on_parts(sft_update.make_nll(policy.config)))
    layers = partition.whole_layers(trainer, frozen)
    train_data = Demonstrations(
        train, rows, policy.config, layers, trainer.devices, "frozen layers"
    )
    valid_data = Demonstrations(
        valid, rows, policy.config, layers, trainer.devices, "frozen layers, held-out"
    )
    del layers  # on a mesh a copy of the trainer's own
    best, done = _train(
        out, trainable, trainer, optimizer, rate, train_data, valid_data, evaluate, sft, total, seed
    )
    common.mark_done(out, started, updates=done, best_valid_loss=best)


def _train(
    out: pathlib.Path,
    trainable: common.Trainable,
    trainer: partition.Trainer,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    train: "Demonstrations",
    valid: "Demonstrations",
    evaluate: Callable,
    sft: SftConfig,
    total: int,
    seed: int,
) -> tuple[float, int]:
    """All updates, and out/policy; the best held-out loss, and how many updates there were."""
    lengths = [len(t.token_ids) for t in train.trajectories]
    eval_every = sft.eval_every or -(-len(lengths) // sft.batch_size)
    checkpoints = Checkpoints(out / "checkpoints", every=sft.checkpoint_every)
    writer = metrics_lib.MetricsWriter(out, enabled=distributed.is_first())
    state = state_lib.create(trainable.parts.trained, optimizer)
    state = checkpoints.restore(state) or state
    done = int(state.update)
    writer.truncate_after(done)
    best, bad = distributed.told("held-out losses", lambda: _held_out_so_far(writer.path))
    state = trainer.replicate(state)
    # Killed after it stopped early and before it said so: nothing is left to train.
    end = done if sft.patience and bad >= sft.patience else total
    bar = tqdm.tqdm(range(done, end), initial=done, total=total, desc="sft", unit="update")
    with writer, bar, preemption.deferred():
        for update in bar:
            chosen = schedule.batch_of(update, lengths, sft.batch_size, seed)
            state, metrics = _update(trainer, state, train, chosen)
            metrics["learning_rate"] = float(rate(update))
            done = update + 1
            if valid.trajectories and (done % eval_every == 0 or done == total):
                kept = state_lib.kept(state)
                metrics["valid_loss"] = held_out_loss(evaluate, kept, valid)
                improved = metrics["valid_loss"] < best
                best, bad = (metrics["valid_loss"], 0) if improved else (best, bad + 1)
                if improved and sft.patience:
                    trainable.save(out / "policy", trainer.fetch(kept), {}, done)
            writer.write(done, metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", valid=f"{best:.3f}")
            stop, asked = bool(sft.patience) and bad >= sft.patience, preemption.asked()
            last = done == total or stop
            checkpoints.maybe_save(done, trainer.unreplicate(state), last=last, force=asked)
            if asked:
                preemption.stop(done, total)
            if stop:
                break
    if not (sft.patience and valid.trajectories):
        trainable.save(out / "policy", trainer.fetch(state_lib.kept(state)), {}, done)
    checkpoints.close()
    return best, done


def _update(
    trainer: partition.Trainer, state: Any, train: "Demonstrations", chosen: np.ndarray
) -> tuple[Any, dict[str, float]]:
    """One update, and its metrics."""
    tick = time.time()
    packed, cut = train.batches(chosen)
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
        rows: RowsConfig,
        config: ModelConfig,
        layers: Params,
        devices: int,
        title: str,
    ) -> None:
        self.trajectories = trajectories
        self._rows = rows
        self._devices = devices
        self._below = scoring.below(
            config, layers, trajectories, rows, devices=devices, title=title
        )

    def batches(
        self, chosen: Sequence[int] | np.ndarray
    ) -> tuple[batching.PackedRows, Iterator[sft_update.SftBatch]]:
        """The rows of the demonstrations with these indices, and their microbatches."""
        packed = batching.pack([self.trajectories[i] for i in chosen], **self._rows.packing)
        rows = self._rows
        cut = batching.microbatches(packed, rows.rows_per_device, self._devices, rows.row_buckets)
        return packed, (
            sft_update.SftBatch(b, scoring.below_in_rows(self._below, chosen, b)) for b in cut
        )


def held_out_loss(evaluate: Callable, params: Any, data: Demonstrations) -> float:
    """Mean negative log-likelihood a policy token, in nats."""
    packed, batches = data.batches(range(len(data.trajectories)))
    total = sum(float(np.sum(evaluate(params, batch))) for batch in batches)
    return total / float(packed.token_mask.sum())


def _held_out_so_far(path: pathlib.Path) -> tuple[float, int]:
    """(best held-out loss, held-out losses since) of the updates before a resume."""
    if not path.exists():
        return float("inf"), 0
    found = [m["valid_loss"] for m in metrics_lib.read_metrics(path) if "valid_loss" in m]
    losses = [float("inf") if loss is None else loss for loss in found]  # None: was not finite
    if not losses:
        return float("inf"), 0
    return min(losses), len(losses) - 1 - int(np.argmin(losses))


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    run(
        workdir / "sft",
        _POLICY.value,
        store.read(workdir / "demos" / "train" / "trajectories.jsonl"),
        store.read(workdir / "demos" / "valid" / "trajectories.jsonl"),
        flags_lib.read(SftConfig),
        flags_lib.read(RowsConfig),
        flags_lib.SEED.value,
        flags_lib.read(LoraConfig),
        flags_lib.read(ChatConfig).chat_format,
        flags_lib.read(ComputeConfig),
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string("policy", "models/smollm2-135m-instruct", common.POLICY_HELP)
    flags_lib.define(
        SftConfig, RowsConfig, LoraConfig, ChatConfig, ComputeConfig, DistributedConfig
    )
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
