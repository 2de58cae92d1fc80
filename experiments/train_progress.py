"""Stage 3: trains the progress estimator on exploration episodes.

    python -m experiments.train_progress --workdir=W

The trunk is the frozen base policy (W/sft/policy); a head reads its last hidden state at the
last token of every step.  Reads W/iteration_I/explore of all rounds up to --iteration; writes
W/iteration_I/progress/{heads.safetensors,metrics.jsonl}.
"""

import os
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import flags

from experiments import common
from experiments import flags as flags_lib
from spa_jax import evaluation, store
from spa_jax.attribution import estimator
from spa_jax.config import ProgressConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, weights
from spa_jax.models.transformer import Params
from spa_jax.training import estimator_update, partition, schedule, scoring
from spa_jax.training import metrics as metrics_lib
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.estimator_update import StepFeatures
from spa_jax.trajectory import Status, Trajectory


def run(
    out: pathlib.Path,
    policy_folder: str,
    data: Sequence[pathlib.Path],
    progress: ProgressConfig,
    rows: RowsConfig,
    seed: int,
) -> None:
    """Trains the head, from the newest checkpoint if there is one, and writes it to `out`."""
    if common.is_done(out, "progress"):
        return
    started = time.time()
    policy = common.load_policy(policy_folder)
    features, tasks = load_features(policy, data, rows)
    train, valid = split_by_task(tasks, progress.valid_share, seed)
    head = heads.ProgressHead(width=progress.width)
    params = jax.jit(head.init)(jax.random.key(seed), features.hidden[:1, :1])["params"]
    params = heads.fit_norm(params, features.hidden[train], features.step_mask[train])
    per_epoch = -(-len(train) // progress.batch_size)
    total = progress.epochs * per_epoch
    rate = schedule.warmup_cosine(progress.learning_rate, total, 0.03)
    optimizer = state_lib.adamw(
        rate, clip_norm=progress.clip_norm, weight_decay=progress.weight_decay
    )
    trainer = partition.Pmap(estimator_update.estimator_loss, optimizer)
    checkpoints = Checkpoints(out / "checkpoints", every=max(1, progress.epochs // 2) * per_epoch)
    state = state_lib.create({"progress": params}, optimizer)
    state = checkpoints.restore(state) or state
    start = int(state.update)
    writer = metrics_lib.MetricsWriter(out)
    writer.truncate_after(start)
    state = trainer.replicate(state)
    error, count, equal = 0.0, 0, [1] * len(train)
    for update in tqdm.tqdm(range(start, total), initial=start, total=total, desc="progress"):
        chosen = train[schedule.batch_of(update, equal, progress.batch_size, seed)]
        batch = _batch(features, chosen, progress.batch_size, trainer.devices)
        state, sums = trainer.update(state, [batch], {"trajectories": len(chosen)})
        error, count = error + sums["squared_error"], count + len(chosen)
        if (update + 1) % per_epoch == 0:
            judged = judge(partition.unreplicate(state.params), features, valid)
            writer.write(update + 1, {"loss": error / count, **judged})
            error, count = 0.0, 0
        checkpoints.maybe_save(update + 1, partition.unreplicate(state))
    params = jax.device_get(partition.unreplicate(state.params))
    weights.save_heads(out, params)
    writer.close()
    checkpoints.close()
    # Relative, so that a run's folder can be moved.
    trunk = os.path.relpath(policy.folder.resolve(), out.resolve())
    validity = judge(params, features, valid)
    common.mark_done(out, started, updates=total, trunk=trunk, **validity)


def load_features(
    policy: common.Policy, data: Sequence[pathlib.Path], rows: RowsConfig
) -> tuple[StepFeatures, list[str]]:
    """The features of all episodes of the files, and each episode's task.

    Raises:
      UserError: if no file holds an episode.
    """
    parts, tasks = [], []
    for path in data:
        trajectories = playable(store.read(path))
        if trajectories:
            parts.append(_features(policy, path, trajectories, rows))
            tasks += [t.task for t in trajectories]
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
    return joined, tasks


def playable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those that somebody played to an end: an environment error is no outcome."""
    return [t for t in trajectories if t.status is not Status.ENV_ERROR and t.steps]


def scores_of(
    policy: common.Policy, path: pathlib.Path, trajectories: Sequence[Trajectory], rows: RowsConfig
) -> scoring.Scores:
    """The trunk's scores of a file's episodes, computed once and kept beside the file."""
    common.check_lengths(policy, trajectories, path)
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
    )


def _features(
    policy: common.Policy,
    path: pathlib.Path,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
) -> StepFeatures:
    scores = scores_of(policy, path, trajectories, rows)
    return StepFeatures(
        hidden=scores.end_hidden,
        step_mask=scores.step_mask,
        final_reward=np.array([t.final_reward for t in trajectories], np.float32),
    )


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


def judge(params: Params, features: StepFeatures, index: np.ndarray) -> dict[str, float]:
    """The estimator's validity on held-out episodes."""
    if not len(index):
        return {}
    mask = features.step_mask[index]
    c = np.asarray(heads.progress(params["progress"], features.hidden[index])) * mask
    predicted = np.asarray(estimator.predicted_return(c, mask))
    lists = [row[m > 0] for row, m in zip(c, mask, strict=True)]
    validity = evaluation.estimator_validity(predicted, features.final_reward[index], lists)
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
    common.prepare_jax()
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    run(
        workdir / f"iteration_{_ITERATION.value}" / "progress",
        _POLICY.value or str(workdir / "sft" / "policy"),
        data_files(workdir, _ITERATION.value),
        flags_lib.read(ProgressConfig),
        flags_lib.read(RowsConfig),
        flags_lib.SEED.value,
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string("policy", "", "Folder of the trunk; W/sft/policy by default.")
    _ITERATION = flags.DEFINE_integer("iteration", 0, "The round.")
    flags_lib.define(ProgressConfig, RowsConfig)
    flags_lib.run(main)
