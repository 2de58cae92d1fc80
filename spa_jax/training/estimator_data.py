"""What the progress estimator learns from: a trunk's features of the explored episodes.

FrozenTrunk    the base model as it is: its hidden states are computed once
TrainedTrunk   the base model, or adapters on it, trained with the heads: it reads tokens in every
               update
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from spa_jax import batching, episodes, evaluation
from spa_jax import run as run_lib
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models.config import Params
from spa_jax.policy import Policy
from spa_jax.training import estimator_update, partition, scoring
from spa_jax.training.estimator_update import EstimatorRows, StepFeatures
from spa_jax.training.state import Guarded
from spa_jax.training.trainable import Trainable
from spa_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class FrozenTrunk:
    """The base model as it is: what it makes of the episodes is computed once.

    Attributes:
      features: of all episodes.
      prefixes: as in `estimator_update.estimator_loss`.
    """

    features: StepFeatures
    prefixes: float

    @property
    def trained(self) -> Params:
        """What is trained of it: nothing."""
        return {}

    def trainer(self, optimizer: Guarded, clock: Params) -> partition.Trainer:
        """The trainer of heads on it."""
        loss = estimator_update.make_loss(self.prefixes)
        return partition.Pmap(loss, optimizer, frozen=clock)

    def batches(self, chosen: np.ndarray, size: int, devices: int) -> list[StepFeatures]:
        """The chosen episodes, as batches of `size` episodes for the trainer."""
        return [feature_batch(self.features, chosen, size, devices)]

    def features_of(self, params: Params, chosen: np.ndarray) -> StepFeatures:
        """What a head under `params` sees of the chosen episodes."""
        del params
        return jax.tree.map(lambda x: x[chosen], self.features)


@dataclasses.dataclass(frozen=True)
class TrainedTrunk:
    """A trunk that is trained with the heads: it reads the tokens in every update.

    Attributes:
      trainable: the base model, or adapters on it.
      trajectories: all episodes, with their final observations (`scoring.answered`).
      rows: the static shape.
      paper: whether the heads read the end of a step, see `estimator_update`.
      prefixes: as in `estimator_update.estimator_loss`.
    """

    trainable: Trainable
    trajectories: Sequence[Trajectory]
    rows: RowsConfig
    paper: bool
    prefixes: float

    @property
    def trained(self) -> Params:
        """What is trained of it: {"policy": tree} or {"adapter": tree}."""
        return self.trainable.parts.trained

    def trainer(self, optimizer: Guarded, clock: Params) -> partition.Trainer:
        """The trainer of the heads and the trunk."""
        parts = self.trainable.parts
        config = self.trainable.policy.config
        return partition.make(
            self.rows,
            parts.on_parts(estimator_update.make_trunk_loss(config, self.prefixes)),
            optimizer,
            frozen=parts.frozen_in(config.dtype) | clock,
        )

    def batches(self, chosen: np.ndarray, size: int, devices: int) -> list[EstimatorRows]:
        """The chosen episodes, packed into the trainer's microbatches."""
        del size  # the rows' shape is static, however many episodes they hold
        taken = [self.trajectories[i] for i in chosen]
        packed = batching.pack(taken, **self.rows.packing)
        rewards = np.repeat(final_rewards(taken)[:, None], scoring.max_steps(taken), 1)
        return [
            EstimatorRows(rows=batch, final_reward=batching.scatter_steps(rewards, batch))
            for batch in batching.microbatches(
                packed, self.rows.rows_per_device, devices, self.rows.row_buckets
            )
        ]

    def features_of(self, params: Params, chosen: np.ndarray) -> StepFeatures:
        """What a head under `params` sees of the chosen episodes."""
        taken = [self.trajectories[i] for i in chosen]
        scores = scoring.score(
            self.trainable.policy.config,
            {"policy": self.trainable.parts.merge(params)},
            taken,
            self.rows,
            temperature=1.0,
            title="held-out",
        )
        return features_of(scores, taken, paper=self.paper)


def features_of(
    scores: scoring.Scores, trajectories: Sequence[Trajectory], *, paper: bool
) -> StepFeatures:
    """What an estimator reads of a trunk's scores: for `paper` at the steps' ends."""
    return StepFeatures(
        hidden=scores.end_hidden if paper else scores.answer_hidden,
        start=scores.value_hidden[:, 0],
        step_mask=scores.step_mask,
        final_reward=final_rewards(trajectories),
    )


def load_features(
    policy: Policy,
    files: Sequence[pathlib.Path],
    rows: RowsConfig,
    *,
    paper: bool,
    ppo_layers: int = 0,
) -> tuple[StepFeatures, list[Trajectory]]:
    """The features of all episodes of the files, and the episodes; see `scores_of`.

    Raises:
      UserError: if no file holds an episode.
    """
    parts, every = [], []
    for path in files:
        trajectories = episodes.load(path)
        if trajectories:
            scores = scores_of(policy, path, trajectories, rows, ppo_layers=ppo_layers)
            parts.append(features_of(scores, trajectories, paper=paper))
            every += trajectories
    if not parts:
        raise UserError(f"{files[0]}: holds no episode to learn from; explore first")
    steps = max(part.step_mask.shape[1] for part in parts)

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, steps - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    joined = StepFeatures(
        hidden=np.concatenate([pad(part.hidden) for part in parts]),
        start=np.concatenate([part.start for part in parts]),
        step_mask=np.concatenate([pad(part.step_mask) for part in parts]),
        final_reward=np.concatenate([part.final_reward for part in parts]),
    )
    return joined, every


def scores_of(
    policy: Policy,
    path: pathlib.Path,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    *,
    ppo_layers: int = 0,
) -> scoring.Scores:
    """The trunk's scores of a file's episodes, computed once and kept beside the file.

    Args:
      policy: the trunk.
      path: the file of the episodes.
      trajectories: those of it that are wanted.
      rows: the static shape.
      ppo_layers: how many of the policy's top layers PPO will train: what the layers below them
        make of the episodes is kept too then; 0: all, or nobody will.
    """
    episodes.check_fit(policy.config, trajectories, path, rows)
    sampling = trajectories[0].sampling
    return scoring.cached_score(
        policy.config,
        {"policy": policy.params},
        trajectories,
        rows,
        cache=run_lib.features_of(path),
        policy_folder=policy.folder,
        temperature=(sampling.temperature if sampling else 1.0) or 1.0,
        title="features",
        chat=policy.chat,
        lower_cache=run_lib.lower_states_of(path),
        train_layers=ppo_layers,
    )


def final_rewards(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[N] float32, R of each."""
    return np.array([t.final_reward for t in trajectories], np.float32)


def split_by_task(tasks: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, valid) indices; all episodes of a task are on one side."""
    names = sorted(set(tasks))
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[i] for i in order[: int(share * len(names))]}
    is_valid = np.array([task in held_out for task in tasks])
    return np.flatnonzero(~is_valid), np.flatnonzero(is_valid)


def feature_batch(
    features: StepFeatures, chosen: np.ndarray, size: int, devices: int
) -> StepFeatures:
    """The chosen episodes, filled up to `size` with empty ones, with a leading device axis."""
    size = -(-size // devices) * devices

    def take(x: np.ndarray) -> np.ndarray:
        out = np.zeros((size, *x.shape[1:]), x.dtype)
        out[: len(chosen)] = x[chosen]
        return out.reshape(devices, -1, *x.shape[1:])

    return jax.tree.map(take, features)


def judge(params: Params, trunk: FrozenTrunk | TrainedTrunk, valid: np.ndarray) -> dict[str, float]:
    """The estimator's validity on held-out episodes."""
    if not len(valid):
        return {}
    features = trunk.features_of(params, valid)
    mask = features.step_mask
    c, start = map(np.asarray, estimator_update.contributions(params["progress"], features))
    predicted = start + c.sum(-1)
    lists = [row[m > 0] for row, m in zip(c, mask, strict=True)]
    validity = evaluation.estimator_validity(predicted, features.final_reward, lists)
    names = {"mse": "valid_mse", "var": "valid_var", "auc": "auc", "spread": "spread"}
    return {new: validity[old] for old, new in names.items()}
