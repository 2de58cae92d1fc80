"""Stage 5: one PPO pass over annotated episodes.

    python -m experiments.train_ppo --workdir=W

Reads W/iteration_I/annotated.jsonl and the policy that played it (W/sft/policy in round 0, the
previous round's W/iteration_{I-1}/ppo/policy after it); writes W/iteration_I/ppo/policy with its
value head, metrics.jsonl and checkpoints.  Run again, it continues.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import common
from experiments import flags as flags_lib
from experiments.train_progress import playable
from spa_jax import batching, store
from spa_jax.config import PpoConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, transformer
from spa_jax.rl import advantages
from spa_jax.training import metrics as metrics_lib
from spa_jax.training import partition, ppo_update, schedule, scoring
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class StepTable:
    """What GAE needs and makes, by (trajectory, step): arrays [N, S].

    Attributes:
      rewards: r_k.
      values: V_k of the policy at the stage's start.
      advantages: A_k, not whitened.
      returns: G_k.
      mask: 1 where a step is.
    """

    rewards: np.ndarray
    values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    mask: np.ndarray


def run(
    out: pathlib.Path,
    policy_folder: str,
    data: pathlib.Path,
    ppo: PpoConfig,
    rows: RowsConfig,
    seed: int,
) -> None:
    """Trains, from the newest checkpoint if there is one, and writes out/policy."""
    if common.is_done(out, "ppo"):
        return
    started = time.time()
    trajectories = playable(store.read(data))
    temperature = behaviour_temperature(data, trajectories, ppo)
    policy = common.load_policy(policy_folder, common.recorded_chat_format(data.parent / "explore"))
    common.check_lengths(policy, trajectories, data)
    params = {"policy": policy.params, "value": policy.heads.get("value")}
    scores = scoring.cached_score(
        # In round 0 the policy is the estimator's trunk, whose pass is there already.
        data.parent / "explore" / "features.npz",
        policy.folder,
        policy.config,
        {name: value for name, value in params.items() if value is not None},
        trajectories,
        rows,
        temperature=temperature,
        title="values",
        keep=False,
    )
    if params["value"] is None:
        head = heads.ValueHead()
        fresh = jax.jit(head.init)(jax.random.key(seed), scores.value_hidden[:1, :1])["params"]
        params["value"] = heads.fit_norm(fresh, scores.value_hidden, scores.step_mask)
    table = step_table(trajectories, scores, ppo)

    optimizer = state_lib.adamw(
        optax.constant_schedule(ppo.learning_rate),
        clip_norm=ppo.clip_norm,
        weight_decay=ppo.weight_decay,
    )
    trained, frozen = transformer.split(policy.config, policy.params, ppo.train_layers)
    params["policy"] = trained
    trainer = partition.Pmap(
        ppo_update.make_loss(policy.config, ppo, temperature),
        optimizer,
        frozen={"policy": frozen},
    )
    below = scoring.below(
        policy.config, trainer.frozen, trajectories, rows,
        devices=trainer.devices, title="frozen layers",
    )  # fmt: skip
    lengths = [len(t.token_ids) for t in trajectories]
    per_epoch = -(-len(trajectories) // ppo.batch_size)
    total = ppo.epochs * per_epoch
    checkpoints = Checkpoints(out / "checkpoints", every=ppo.checkpoint_every)
    state = state_lib.create(params, optimizer)
    state = checkpoints.restore(state) or state
    start = int(state.update)
    writer = metrics_lib.MetricsWriter(out)
    writer.truncate_after(start)
    state = trainer.replicate(state)
    for update in tqdm.tqdm(range(start, total), initial=start, total=total, desc="ppo"):
        tick = time.time()
        chosen = schedule.batch_of(update, lengths, ppo.batch_size, seed)
        packed, batches, counts = make_batches(
            trajectories, table, chosen, rows, trainer.devices, below
        )
        state, sums = trainer.update(state, batches, counts)
        metrics = update_metrics(sums, counts, trajectories, table, chosen)
        tokens = float(batching.token_count(packed))
        metrics |= {
            "tokens": tokens,
            "tokens_per_second": tokens / (time.time() - tick),
            "padding_share": batching.padding_share(packed),
        }
        writer.write(update + 1, metrics)
        checkpoints.maybe_save(update + 1, partition.unreplicate(state), force=update + 1 == total)
    final = jax.device_get(partition.unreplicate(state.params))
    version = policy.version + total
    whole = transformer.join(final["policy"], frozen)
    common.save_policy(out / "policy", policy, whole, {"value": final["value"]}, version)
    writer.close()
    checkpoints.close()
    mismatch = sampler_mismatch(trajectories, scores)
    common.mark_done(
        out, started, updates=total, skipped=int(state.skipped[0]), sampler_mismatch=mismatch
    )


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


def step_table(
    trajectories: Sequence[Trajectory], scores: scoring.Scores, ppo: PpoConfig
) -> StepTable:
    """GAE over steps of all episodes, with the values of the stage's start.

    --step_baseline changes the advantages alone: the critic still learns the returns.
    """
    rewards = np.zeros_like(scores.values)
    for i, trajectory in enumerate(trajectories):
        rewards[i, : len(trajectory.steps)] = [step.reward for step in trajectory.steps]
    advantage, returns = advantages.step_gae(
        rewards, scores.values, scores.step_mask, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda
    )
    if ppo.step_baseline:
        advantage = advantages.less_step_mean(advantage, scores.step_mask)
    return StepTable(
        rewards, scores.values, np.asarray(advantage), np.asarray(returns), scores.step_mask
    )


def make_batches(
    trajectories: Sequence[Trajectory],
    table: StepTable,
    chosen: np.ndarray,
    rows: RowsConfig,
    devices: int,
    below: Sequence[np.ndarray] | None = None,
) -> tuple[batching.PackedRows, list[ppo_update.PpoBatch], dict[str, float]]:
    """The microbatches of an update, whitened over all its steps, and its global counts.

    `below` is what frozen layers made of each trajectory's tokens (`scoring.below`).
    """
    packed = batching.pack([trajectories[i] for i in chosen], **rows.packing)
    white = np.asarray(advantages.whiten(table.advantages[chosen], table.mask[chosen]))
    counts = {"tokens": float(packed.token_mask.sum()), "steps": float(packed.step_mask.sum())}
    batches = [
        ppo_update.PpoBatch(
            rows=batch,
            advantages=batching.scatter_steps(white, batch),
            returns=batching.scatter_steps(table.returns[chosen], batch),
            old_values=batching.scatter_steps(table.values[chosen], batch),
            below=scoring.below_in_rows(below, chosen, batch),
        )
        for batch in batching.microbatches(packed, rows.rows_per_device, devices)
    ]
    return packed, batches, counts


def update_metrics(
    sums: Mapping[str, float],
    counts: Mapping[str, float],
    trajectories: Sequence[Trajectory],
    table: StepTable,
    chosen: np.ndarray,
) -> dict[str, float]:
    """Means of an update, from its sums and global counts."""
    tokens, steps = counts["tokens"], counts["steps"]
    used = table.mask[chosen] > 0
    returns, values = table.returns[chosen][used], table.values[chosen][used]
    return {
        "policy_loss": sums["policy_loss"] / tokens,
        "value_loss": sums["value_loss"] / steps,
        "kl": sums["kl"] / tokens,
        "approx_kl": sums["approx_kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "mean_ratio": sums["ratio"] / tokens,
        "grad_norm": sums["grad_norm"],
        "explained_variance": 1 - float(np.var(returns - values) / max(np.var(returns), 1e-8)),
        "step_reward": float(table.rewards[chosen][used].mean()),
        "rollout_success": float(np.mean([trajectories[i].success for i in chosen])),
        "mean_steps": float(np.mean([len(trajectories[i].steps) for i in chosen])),
    }


def sampler_mismatch(trajectories: Sequence[Trajectory], scores: scoring.Scores) -> float:
    """Largest |log-prob recorded while sampling - log-prob of the forward pass|, in nats."""
    return max(
        float(np.max(np.abs(np.asarray(t.log_probs, np.float32) - log_probs)))
        for t, log_probs in zip(trajectories, scores.log_probs, strict=True)
    )


def policy_before(workdir: pathlib.Path, iteration: int) -> pathlib.Path:
    """The policy that plays and is trained in a round."""
    if iteration == 0:
        return workdir / "sft" / "policy"
    return workdir / f"iteration_{iteration - 1}" / "ppo" / "policy"


def main(argv: Sequence[str]) -> None:
    del argv
    common.prepare_jax()
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    folder = workdir / f"iteration_{_ITERATION.value}"
    run(
        folder / "ppo",
        _POLICY.value or str(policy_before(workdir, _ITERATION.value)),
        folder / "annotated.jsonl",
        flags_lib.read(PpoConfig),
        flags_lib.read(RowsConfig),
        flags_lib.SEED.value,
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string("policy", "", "Folder of the policy that played the episodes.")
    _ITERATION = flags.DEFINE_integer("iteration", 0, "The round.")
    flags_lib.define(PpoConfig, RowsConfig)
    flags_lib.run(main)
