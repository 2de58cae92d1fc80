"""Stage 5: one pass of the policy's update over annotated episodes.

    python -m experiments.train_ppo --workdir=W

--objective chooses PPO, an objective without a critic, or SFT on the won episodes (rft).  Reads
W/iteration_I/annotated.jsonl and the policy that played it (W/sft/policy in round 0, the
previous round's W/iteration_{I-1}/ppo/policy after it); writes W/iteration_I/ppo/policy with its
value head if there is one, metrics.jsonl and checkpoints.  Run again, it continues.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import common
from experiments import flags as flags_lib
from experiments.train_progress import below_file, playable
from spa_jax import batching, store
from spa_jax import config as config_lib
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ComputeConfig,
    DistributedConfig,
    LoraConfig,
    PpoConfig,
    RowsConfig,
)
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import pretrained
from spa_jax.rl import objectives
from spa_jax.training import (
    distributed,
    partition,
    ppo_data,
    ppo_update,
    preemption,
    schedule,
    scoring,
    sft_update,
)
from spa_jax.training import metrics as metrics_lib
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.parts import Parts
from spa_jax.trajectory import Trajectory

RFT = "rft"
_MISMATCH = 0.01  # nats between sampler and trainer that are worth a word; float32 has 1e-5
_MISMATCH_EPISODES = 6  # scored for that where the objective needs no scores of the policy


def run(
    out: pathlib.Path,
    policy_folder: str,
    data: pathlib.Path,
    ppo: PpoConfig,
    rows: RowsConfig,
    seed: int,
    lora: LoraConfig,
    reference: pathlib.Path,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> None:
    """Trains, from the newest checkpoint if there is one, and writes out/policy.

    With adapters, `reference` is the folder of the reference policy (see `common.trainable`).
    """
    if common.is_done(out, "ppo"):
        return
    config_lib.check_trained(lora, ppo.train_layers, "--ppo_train_layers")
    compute = config_lib.fit_attention(compute, rows)
    started = time.time()
    trajectories = playable(store.read(data))
    common.agree_on(trajectories, data)
    temperature = behaviour_temperature(data, trajectories, ppo)
    if ppo.objective == RFT:
        trajectories = ppo_data.won(trajectories, data)
    else:
        check_reference(data, trajectories, reference, ppo)
    chat_format = common.recorded_chat_format(data.parent / "explore")
    policy = common.load_policy(policy_folder, chat_format, compute)
    common.check_lengths(policy, trajectories, data, rows)
    head: dict[str, Params] = {}
    scores: scoring.Scores | None = None
    read = critics_folder(policy.folder, reference, ppo)
    own = read == policy.folder
    if ppo.objective != RFT and objectives.OBJECTIVES[ppo.objective].critic:
        scores = start_scores(
            # Without a name of its own, another policy is gone before training starts.
            policy if own else common.load_policy(read, policy.chat_format, compute),
            data, trajectories, rows, ppo, temperature,
        )  # fmt: skip
        if ppo.critic == "head":
            head["value"] = value_head(policy, scores, seed)
    mismatch = sampler_mismatch(policy, trajectories, scores if own else None, rows)

    optimizer = state_lib.adamw(
        optax.constant_schedule(ppo.learning_rate),
        clip_norm=ppo.clip_norm,
        weight_decay=ppo.weight_decay,
    )
    trainable = common.trainable(policy, ppo.train_layers, lora, seed, reference)
    parts = trainable.parts
    loss = (
        sft_update.make_loss(policy.config)
        if ppo.objective == RFT
        else ppo_update.make_loss(policy.config, ppo, temperature)
    )
    frozen = parts.frozen_in(policy.config.dtype)
    trainer = partition.make(rows, parts.on_parts(loss), optimizer, frozen, compute.accum_dtype)
    kept = below_file(data.parent / "explore")
    below = states_below(kept, trainer, parts, policy.config, trajectories, rows)
    make = updates(
        trainer, parts, policy.config, trajectories, scores, ppo, rows, temperature, head, below
    )
    state = train(
        out, trainer, optimizer, parts.trained | head, make, trajectories, ppo, seed,
        {"sampler_mismatch": mismatch},
    )  # fmt: skip
    final, version = state.params, policy.version + int(state.update)
    trainable.save(out / "policy", final, {name: final[name] for name in head}, version)
    common.mark_done(
        out, started, updates=int(state.update), skipped=int(state.skipped),
        sampler_mismatch=mismatch,
    )  # fmt: skip
    if distributed.is_first():
        kept.unlink(missing_ok=True)


def critics_folder(policy: pathlib.Path, reference: pathlib.Path, ppo: PpoConfig) -> pathlib.Path:
    """The folder of the policy whose hidden states the values are made of.

    A value head reads the policy that is trained, and goes on with it.  The ridge critic is fitted
    anew in every round, so it can read the reference in all of them: the estimator has read these
    episodes with it, and its pass is kept.
    """
    ridge = ppo.critic == "ridge" and reference.exists()
    return pretrained.resolve(reference) if ridge else policy


def start_scores(
    policy: common.Policy,
    data: pathlib.Path,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    ppo: PpoConfig,
    temperature: float,
) -> scoring.Scores:
    """The scores of the episodes under the policy, and its value head if that is the critic."""
    kept = ("value",) if ppo.critic == "head" else ()
    heads_of = {name: head for name, head in policy.heads.items() if name in kept}
    return scoring.cached_score(
        # If the policy is the estimator's trunk, as in round 0, its pass is there already.
        data.parent / "explore" / "features.npz",
        policy.folder,
        policy.config,
        {"policy": policy.params} | heads_of,
        trajectories,
        rows,
        temperature=temperature,
        title="values",
        keep=False,
    )


def value_head(policy: common.Policy, scores: scoring.Scores, seed: int) -> Params:
    """The policy's value head, or a new one."""
    if "value" in policy.heads:
        return policy.heads["value"]
    fresh = jax.jit(heads.Head().init)(jax.random.key(seed), scores.value_hidden[:1, :1])
    return heads.fit_norm(fresh["params"], scores.value_hidden, scores.step_mask)


def states_below(
    kept: pathlib.Path,
    trainer: partition.Trainer,
    parts: Parts,
    config: ModelConfig,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
) -> list[np.ndarray] | None:
    """What the frozen layers make of the episodes: what the estimator's pass kept, or one more.

    The estimator read them with the base policy, whose lower layers are this policy's if no round
    has trained them.
    """
    below = scoring.cached_below(kept, config, parts.frozen, trajectories)
    if below is not None:
        return below
    frozen = partition.whole_layers(trainer, parts.frozen_in(config.dtype))
    return scoring.below(
        config, frozen, trajectories, rows, devices=trainer.devices, title="frozen layers"
    )


def updates(
    trainer: partition.Trainer,
    parts: Parts,
    config: ModelConfig,
    trajectories: Sequence[Trajectory],
    scores: scoring.Scores | None,
    ppo: PpoConfig,
    rows: RowsConfig,
    temperature: float,
    head: dict[str, Params],
    below: list[np.ndarray] | None,
) -> Callable[[np.ndarray, Any], ppo_data.Update]:
    """(indices of an update's episodes, parameters on the devices) -> the update's data."""
    if ppo.objective == RFT:
        return lambda chosen, _: ppo_data.make_rft_update(
            trajectories, chosen, rows, trainer.devices, below
        )
    values = None if scores is None else scores.values
    if ppo.gae == "token":
        run = trainer.forward(parts.on_parts(ppo_update.make_token_values(config)))
        at_start = functools.partial(run, trainer.replicate(parts.trained | head))
        values = ppo_data.token_values(at_start, trajectories, rows, trainer.devices, below)
    if scores is not None and ppo.critic == "ridge":
        values = ppo_data.fitted_values(trajectories, scores.value_hidden, ppo)
    table = ppo_data.make_table(trajectories, values, ppo)
    log_probs = trainer.forward(parts.on_parts(ppo_update.make_log_probs(config, temperature)))
    return lambda chosen, now: ppo_data.make_update(
        trajectories, table, chosen, rows, ppo, trainer.devices, below,
        functools.partial(log_probs, now),
    )  # fmt: skip


def train(
    out: pathlib.Path,
    trainer: partition.Trainer,
    optimizer: optax.GradientTransformation,
    params: dict[str, Params],
    make: Callable[[np.ndarray, Any], ppo_data.Update],
    trajectories: Sequence[Trajectory],
    ppo: PpoConfig,
    seed: int,
    constants: Mapping[str, float],
) -> state_lib.TrainState:
    """All updates, from the newest checkpoint if there is one; the last state, on the host.

    Args:
      out: gets metrics.jsonl and checkpoints.
      trainer: of the objective's loss.
      optimizer: the trainer's.
      params: what is trained.
      make: makes an update's data, see `updates`.
      trajectories: all.
      ppo: the objective.
      seed: of the order of the trajectories.
      constants: metrics that are the same for every update.
    """
    lengths = [len(t.token_ids) for t in trajectories]
    total = ppo.epochs * -(-len(trajectories) // ppo.batch_size)
    checkpoints = Checkpoints(out / "checkpoints", every=ppo.checkpoint_every)
    state = state_lib.create(params, optimizer)
    state = checkpoints.restore(state) or state
    start = int(state.update)
    state = trainer.replicate(state)
    writer = metrics_lib.MetricsWriter(out, enabled=distributed.is_first())
    with writer, preemption.deferred():
        writer.truncate_after(start)
        for update in tqdm.tqdm(range(start, total), initial=start, total=total, desc="ppo"):
            tick = time.time()
            chosen = schedule.batch_of(update, lengths, ppo.batch_size, seed)
            made = make(chosen, state.params)
            state, sums = trainer.update(state, made.batches, made.counts)
            tokens = float(batching.token_count(made.packed))
            metrics = ppo_data.update_metrics(sums, made, [trajectories[i] for i in chosen])
            metrics |= {
                "tokens": tokens,
                "tokens_per_second": tokens / (time.time() - tick),
                "padding_share": batching.padding_share(*(b.rows for b in made.batches)),
                **constants,
            }
            writer.write(update + 1, metrics)
            asked = preemption.asked()
            last, now = update + 1 == total, trainer.unreplicate(state)
            checkpoints.maybe_save(update + 1, now, last=last, force=asked)
            if asked:
                preemption.stop(update + 1, total)
    checkpoints.close()
    return trainer.fetch(state)


def behaviour_temperature(
    data: pathlib.Path, trajectories: Sequence[Trajectory], ppo: PpoConfig
) -> float:
    """The temperature that the episodes were sampled at.

    Raises:
      UserError: if there is none, or PPO's ratio would not be that of the sampler.
    """
    if not trajectories:
        raise UserError(f"{data}: holds no episode to train on")
    for t in trajectories:
        if t.sampling is None or any(step.reward is None for step in t.steps):
            raise UserError(
                f"{data}: episode {t.key} has no "
                + ("recorded sampling" if t.sampling is None else "rewards: run annotate first")
            )
    kinds = {t.sampling for t in trajectories if t.sampling is not None}
    temperatures = {kind.temperature for kind in kinds}
    if ppo.objective == RFT:
        return 1.0  # no ratio is taken to the policy that sampled
    if len(temperatures) > 1:
        raise UserError(f"{data}: episodes of several temperatures: {sorted(temperatures)}")
    truncated = any(k.temperature == 0 or k.top_k or k.top_p < 1 for k in kinds)
    if truncated and not ppo.allow_truncated_behaviour:
        raise UserError(
            f"{data}: sampled greedily or with top-k/top-p, so its log-probabilities are not those "
            "of the distribution it was drawn from; explore with --temperature=1 --top_k=0 "
            "--top_p=1, or give --allow_truncated_behaviour"
        )
    return temperatures.pop() or 1.0


def check_reference(
    data: pathlib.Path, trajectories: Sequence[Trajectory], reference: pathlib.Path, ppo: PpoConfig
) -> None:
    """Refuses log-probabilities of a reference policy that has been replaced since.

    Episodes that were annotated before their reference was noted are taken as they are.

    Raises:
      UserError: they are of another policy than the one in the folder `reference`, or the KL to it
        is wanted and they are missing.
    """
    if ppo.kl_coef and any(t.ref_log_probs is None for t in trajectories):
        raise UserError(f"{data}: holds no reference log-probabilities: run annotate first")
    noted = {t.ref_policy for t in trajectories} - {""}
    if noted and reference.exists():
        folder = pretrained.resolve(reference)
        if noted != {scoring.policy_key(folder)}:
            raise UserError(
                f"{data}: its reference log-probabilities are not of {reference} as it is now: "
                "run annotate again"
            )


def sampler_mismatch(
    policy: common.Policy,
    trajectories: Sequence[Trajectory],
    scores: scoring.Scores | None,
    rows: RowsConfig,
) -> float:
    """Largest |log-prob recorded while sampling - log-prob of the forward pass|, in nats.

    Args:
      policy: that sampled.
      trajectories: the episodes.
      scores: of them under the policy; None: a few of them are scored for this.
      rows: the static shape.
    """
    if scores is None:
        assert trajectories[0].sampling is not None  # see behaviour_temperature
        drawn = trajectories[0].sampling.temperature
        trajectories = [t for t in trajectories if t.sampling and t.sampling.temperature == drawn]
        trajectories = trajectories[:_MISMATCH_EPISODES]
        scores = scoring.score(
            policy.config, {"policy": policy.params}, trajectories, rows,
            temperature=drawn or 1.0, title="sampler mismatch",
        )  # fmt: skip
    found = max(
        float(np.max(np.abs(np.asarray(t.log_probs, np.float32) - log_probs)))
        for t, log_probs in zip(trajectories, scores.log_probs, strict=True)
    )
    if found > _MISMATCH:
        tqdm.tqdm.write(
            f"the log-probabilities recorded while sampling differ from the trainer's by up to "
            f"{found:.3f} nats: the first update's ratios are wrong by as much"
        )
    return found


def policy_before(workdir: pathlib.Path, iteration: int) -> pathlib.Path:
    """The policy that plays and is trained in a round."""
    if iteration == 0:
        return workdir / "sft" / "policy"
    return workdir / f"iteration_{iteration - 1}" / "ppo" / "policy"


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    folder = workdir / f"iteration_{_ITERATION.value}"
    run(
        folder / "ppo",
        _POLICY.value or str(policy_before(workdir, _ITERATION.value)),
        folder / "annotated.jsonl",
        flags_lib.read(PpoConfig),
        flags_lib.read(RowsConfig),
        flags_lib.SEED.value,
        flags_lib.read(LoraConfig),
        policy_before(workdir, 0),
        flags_lib.read(ComputeConfig),
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string("policy", "", "Folder of the policy that played the episodes.")
    _ITERATION = flags.DEFINE_integer("iteration", 0, "The round.")
    flags_lib.define(PpoConfig, RowsConfig, LoraConfig, ComputeConfig, DistributedConfig)
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
