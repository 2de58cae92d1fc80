"""Stage 3: trains the progress estimator on exploration episodes.

    python -m experiments.train_progress --workdir=W

The trunk is the frozen base policy (W/sft/policy); a head reads its last hidden state at the
last token of every step.  With --lora_rank the trunk gets adapters, which are trained with the
head.  Reads W/iteration_I/explore of all rounds up to --iteration; writes
W/iteration_I/progress/{heads.safetensors,metrics.jsonl} and adapter/.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import common
from experiments import flags as flags_lib
from spa_jax import batching, evaluation, store
from spa_jax import config as config_lib
from spa_jax.attribution import estimator
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ComputeConfig,
    DistributedConfig,
    LoraConfig,
    ProgressConfig,
    RowsConfig,
)
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.models.config import Params
from spa_jax.models.io import tensors
from spa_jax.training import (
    distributed,
    estimator_update,
    partition,
    preemption,
    schedule,
    scoring,
)
from spa_jax.training import metrics as metrics_lib
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.estimator_update import EstimatorRows, StepFeatures
from spa_jax.trajectory import Status, Trajectory


def run(
    out: pathlib.Path,
    policy_folder: str,
    data: Sequence[pathlib.Path],
    progress: ProgressConfig,
    rows: RowsConfig,
    seed: int,
    lora: LoraConfig,
    compute: ComputeConfig = DEFAULT_COMPUTE,
    ppo_layers: int = 0,
) -> None:
    """Trains the head, from the newest checkpoint if there is one, and writes it to `out`.

    `ppo_layers`: how many of the policy's layers PPO will train, see `scores_of`; 0: all, or none.
    """
    if common.is_done(out, "progress"):
        return
    compute = config_lib.fit_attention(compute, rows)
    started = time.time()
    policy = common.load_policy(policy_folder, compute=compute)
    features, trajectories = load_features(policy, data, rows, ppo_layers)
    trunk: FrozenTrunk | AdaptedTrunk = FrozenTrunk(features)
    if lora.rank:
        trunk = AdaptedTrunk(common.trainable(policy, 0, lora, seed), trajectories, rows)
    train, valid = split_by_task([t.task for t in trajectories], progress.valid_share, seed)
    head = heads.Head(width=progress.width)
    params = jax.jit(head.init)(jax.random.key(seed), features.hidden[:1, :1])["params"]
    params = heads.fit_norm(params, features.hidden[train], features.step_mask[train])
    per_epoch = -(-len(train) // progress.batch_size)
    total = progress.epochs * per_epoch
    rate = schedule.warmup_cosine(progress.learning_rate, total, 0.03)
    optimizer = state_lib.adamw(
        rate, clip_norm=progress.clip_norm, weight_decay=progress.weight_decay
    )
    trainer = trunk.trainer(optimizer)
    checkpoints = Checkpoints(out / "checkpoints", every=max(1, progress.epochs // 2) * per_epoch)
    state = state_lib.create({"progress": params} | trunk.trained, optimizer)
    epoch = np.zeros(2)  # squared error and episodes of the epoch so far
    saved = checkpoints.restore({"state": state, "epoch": epoch})
    state, epoch = (saved["state"], saved["epoch"]) if saved else (state, epoch)
    start = int(state.update)
    writer = metrics_lib.MetricsWriter(out, enabled=distributed.is_first())
    writer.truncate_after(start)
    state = trainer.replicate(state)
    equal = [1] * len(train)
    bar = tqdm.tqdm(range(start, total), initial=start, total=total, desc="progress")
    with writer, bar, preemption.deferred():
        for update in bar:
            chosen = train[schedule.batch_of(update, equal, progress.batch_size, seed)]
            batches = trunk.batches(chosen, progress.batch_size, trainer.devices)
            state, sums = trainer.update(state, batches, {"trajectories": len(chosen)})
            epoch = epoch + [sums["squared_error"], len(chosen)]
            if (update + 1) % per_epoch == 0:
                judged = judge(partition.unreplicate(state.params), trunk, valid)
                writer.write(update + 1, {"loss": epoch[0] / epoch[1], **judged})
                epoch = np.zeros(2)
            asked = preemption.asked()
            now = {"state": partition.unreplicate(state), "epoch": epoch}
            checkpoints.maybe_save(update + 1, now, force=asked)
            if asked:
                preemption.stop(update + 1, total)
    params = trainer.fetch(state.params)
    if distributed.is_first():
        tensors.save_heads(out, {"progress": params["progress"]})
        if lora.rank:
            common.save_adapter(out / common.ADAPTER, lora, params["adapter"], policy.folder)
    checkpoints.close()
    # Relative, so that a run's folder can be moved.
    folder = os.path.relpath(policy.folder.resolve(), out.resolve())
    common.mark_done(out, started, updates=total, trunk=folder, **judge(params, trunk, valid))


@dataclasses.dataclass(frozen=True)
class FrozenTrunk:
    """The base model as it is: what it makes of the episodes is computed once.

    Attributes:
      features: of all episodes.
    """

    features: StepFeatures

    @property
    def trained(self) -> Params:
        """What is trained of it: nothing."""
        return {}

    def trainer(self, optimizer: optax.GradientTransformation) -> partition.Pmap:
        """The trainer of a head on it."""
        return partition.Pmap(estimator_update.estimator_loss, optimizer)

    def batches(self, chosen: np.ndarray, size: int, devices: int) -> list[StepFeatures]:
        """The chosen episodes, as batches of `size` episodes for the trainer."""
        return [_batch(self.features, chosen, size, devices)]

    def features_of(self, params: Params, chosen: np.ndarray) -> StepFeatures:
        """What a head under `params` sees of the chosen episodes."""
        del params
        return jax.tree.map(lambda x: x[chosen], self.features)


@dataclasses.dataclass(frozen=True)
class AdaptedTrunk:
    """The base model with adapters that are trained: it reads the tokens in every update.

    Attributes:
      trainable: the adapters on the base model.
      trajectories: all episodes.
      rows: the static shape.
    """

    trainable: common.Trainable
    trajectories: Sequence[Trajectory]
    rows: RowsConfig

    @property
    def trained(self) -> Params:
        """What is trained of it: {"adapter": tree}."""
        return self.trainable.parts.trained

    def trainer(self, optimizer: optax.GradientTransformation) -> partition.Pmap:
        """The trainer of a head and the adapters."""
        parts = self.trainable.parts
        loss_fn = parts.on_parts(estimator_update.make_trunk_loss(self.trainable.policy.config))
        config = self.trainable.policy.config
        return partition.Pmap(
            loss_fn, optimizer, None, parts.frozen_in(config.dtype), config.compute.accum_dtype
        )

    def batches(self, chosen: np.ndarray, size: int, devices: int) -> list[EstimatorRows]:
        """The chosen episodes, packed into the trainer's microbatches."""
        del size  # the rows' shape is static, however many episodes they hold
        episodes = [self.trajectories[i] for i in chosen]
        packed = batching.pack(episodes, **self.rows.packing)
        rewards = np.repeat(_rewards(episodes)[:, None], scoring.max_steps(episodes), 1)
        return [
            EstimatorRows(rows=batch, final_reward=batching.scatter_steps(rewards, batch))
            for batch in batching.microbatches(
                packed, self.rows.rows_per_device, devices, self.rows.row_buckets
            )
        ]

    def features_of(self, params: Params, chosen: np.ndarray) -> StepFeatures:
        """What a head under `params` sees of the chosen episodes."""
        episodes = [self.trajectories[i] for i in chosen]
        whole = {"policy": self.trainable.parts.whole(params)}
        scores = scoring.score(
            self.trainable.policy.config, whole, episodes, self.rows,
            temperature=1.0, title="held-out",
        )  # fmt: skip
        return StepFeatures(scores.end_hidden, scores.step_mask, _rewards(episodes))


def load_features(
    policy: common.Policy, data: Sequence[pathlib.Path], rows: RowsConfig, ppo_layers: int = 0
) -> tuple[StepFeatures, list[Trajectory]]:
    """The features of all episodes of the files, and the episodes; see `scores_of`.

    Raises:
      UserError: if no file holds an episode.
    """
    parts, every = [], []
    for path in data:
        trajectories = playable(store.read(path))
        common.agree_on(trajectories, path)
        if trajectories:
            parts.append(_features(policy, path, trajectories, rows, ppo_layers))
            every += trajectories
    if not parts:
        raise UserError(f"{data[0]}: holds no episode to learn from; explore first")
    steps = max(part.step_mask.shape[1] for part in parts)

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, steps - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    joined = StepFeatures(
        hidden=np.concatenate([pad(part.hidden) for part in parts]),
        step_mask=np.concatenate([pad(part.step_mask) for part in parts]),
        final_reward=np.concatenate([part.final_reward for part in parts]),
    )
    return joined, every


def playable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those that somebody played to an end: an environment error is no outcome."""
    return [t for t in trajectories if t.status is not Status.ENV_ERROR and t.steps]


def scores_of(
    policy: common.Policy,
    path: pathlib.Path,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    ppo_layers: int = 0,
) -> scoring.Scores:
    """The trunk's scores of a file's episodes, computed once and kept beside the file.

    With `ppo_layers`, so is what the layers below say, which PPO needs if it trains only these.
    """
    common.check_lengths(policy, trajectories, path, rows)
    sampling = trajectories[0].sampling
    return scoring.cached_score(
        path.with_name("features.npz"),
        policy.folder,
        policy.config,
        {"policy": policy.params},
        trajectories,
        rows,
        temperature=(sampling.temperature if sampling else 1.0) or 1.0,
        title="features",
        below=below_file(path.parent),
        train_layers=ppo_layers,
    )


def below_file(explored: pathlib.Path) -> pathlib.Path:
    """Where a folder of episodes keeps the states of lower layers for PPO, which deletes them."""
    return explored / "below.npz"


def _features(
    policy: common.Policy,
    path: pathlib.Path,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    ppo_layers: int,
) -> StepFeatures:
    scores = scores_of(policy, path, trajectories, rows, ppo_layers)
    return StepFeatures(
        hidden=scores.end_hidden,
        step_mask=scores.step_mask,
        final_reward=_rewards(trajectories),
    )


def _rewards(trajectories: Sequence[Trajectory]) -> np.ndarray:
    return np.array([t.final_reward for t in trajectories], np.float32)


def split_by_task(tasks: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, valid) indices; all episodes of a task are on one side."""
    names = sorted(set(tasks))
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[i] for i in order[: int(share * len(names))]}
    is_valid = np.array([task in held_out for task in tasks])
    return np.flatnonzero(~is_valid), np.flatnonzero(is_valid)


def _batch(features: StepFeatures, chosen: np.ndarray, size: int, devices: int) -> StepFeatures:
    """The chosen episodes, filled up with empty ones, with a leading device axis."""
    size = -(-size // devices) * devices

    def take(x: np.ndarray) -> np.ndarray:
        out = np.zeros((size, *x.shape[1:]), x.dtype)
        out[: len(chosen)] = x[chosen]
        return out.reshape(devices, -1, *x.shape[1:])

    return jax.tree.map(take, features)


def judge(params: Params, trunk: FrozenTrunk | AdaptedTrunk, valid: np.ndarray) -> dict[str, float]:
    """The estimator's validity on held-out episodes."""
    if not len(valid):
        return {}
    features = trunk.features_of(params, valid)
    mask = features.step_mask
    c = np.asarray(heads.read(params["progress"], features.hidden)) * mask
    predicted = np.asarray(estimator.predicted_return(c, mask))
    lists = [row[m > 0] for row, m in zip(c, mask, strict=True)]
    validity = evaluation.estimator_validity(predicted, features.final_reward, lists)
    names = {"mse": "valid_mse", "var": "valid_var", "auc": "auc", "spread": "spread"}
    return {new: validity[old] for old, new in names.items()}


def data_files(workdir: pathlib.Path, iteration: int) -> list[pathlib.Path]:
    """The exploration files of all rounds up to this one, the newest first."""
    return [
        workdir / f"iteration_{i}" / "explore" / "trajectories.jsonl"
        for i in range(iteration, -1, -1)
    ]


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    run(
        workdir / f"iteration_{_ITERATION.value}" / "progress",
        _POLICY.value or str(workdir / "sft" / "policy"),
        data_files(workdir, _ITERATION.value),
        flags_lib.read(ProgressConfig),
        flags_lib.read(RowsConfig),
        flags_lib.SEED.value,
        flags_lib.read(LoraConfig),
        flags_lib.read(ComputeConfig),
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string("policy", "", "Folder of the trunk; W/sft/policy by default.")
    _ITERATION = flags.DEFINE_integer("iteration", 0, "The round.")
    flags_lib.define(ProgressConfig, RowsConfig, LoraConfig, ComputeConfig, DistributedConfig)
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
