"""The progress estimator's update: a head on a trunk that is frozen, or trained with it.

A frozen trunk's hidden states are computed once (`StepFeatures`); one that is trained reads
the tokens anew in every update (`EstimatorRows`).
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.attribution import estimator
from spa_jax.batching import PackedRows
from spa_jax.models import heads
from spa_jax.models.config import ModelConfig, Params
from spa_jax.training import forward
from spa_jax.training.state import Counts, LossFn, Sums


@struct.dataclass
class StepFeatures:
    """What the estimator sees of N trajectories.

    Attributes:
      hidden: [N, S, D], the trunk's last hidden state at each step's last token.
      step_mask: [N, S].
      final_reward: [N], R in [0, 1].
    """

    hidden: chex.Array
    step_mask: chex.Array
    final_reward: chex.Array


@struct.dataclass
class EstimatorRows:
    """What the estimator sees of packed trajectories.

    Attributes:
      rows: the packed trajectories; each lies whole in one row.
      final_reward: [R, S], the R in [0, 1] of each step's trajectory.
    """

    rows: PackedRows
    final_reward: chex.Array


def estimator_loss(
    params: Params, frozen: Params, batch: StepFeatures, counts: Counts
) -> tuple[jax.Array, Sums]:
    """L = sum_i (sum_k c_ik - R_i)^2 / (number of trajectories of the update).

    Source: SPA-RL, arXiv 2505.20732, section 3.

    Args:
      params: {"progress": head}.
      frozen: not used: the trunk's part is in the features.
      batch: the features.
      counts: "trajectories" of the whole update.

    Returns:
      The loss of these trajectories and the sum "squared_error".
    """
    del frozen
    contributions = heads.read(params["progress"], batch.hidden)
    error, _ = estimator.progress_loss(contributions, batch.step_mask, batch.final_reward)
    return error / counts["trajectories"], {"squared_error": error}


def trunk_loss(
    params: Params, frozen: Params, batch: EstimatorRows, counts: Counts, *, config: ModelConfig
) -> tuple[jax.Array, Sums]:
    """`estimator_loss`, with the hidden states computed from the tokens.

        step_trajectory   0  0  1 -1        a row of two trajectories, S = 4
        slot 0            c  c              trajectory 0 stands at its first step's slot
        slot 1                              not a first step: no trajectory
        slot 2                  c           trajectory 1

    Source: SPA-RL, arXiv 2505.20732, section 3.

    Args:
      params: {"policy": the trunk, or what is trained of it, "progress": head}.
      frozen: {"policy": the rest} or {}.
      batch: the rows.
      counts: "trajectories" of the whole update.
      config: the model's shape.

    Returns:
      The loss of these rows and the sum "squared_error".
    """
    rows = batch.rows
    hidden = forward.rows_hidden(config, forward.with_frozen(params, frozen), rows)
    c = heads.read(params["progress"], forward.at(hidden, rows.end_index))
    number = rows.step_trajectory
    same = (number[:, :, None] == number[:, None, :]) & (rows.step_mask[:, None, :] > 0)
    first = (rows.step_mask > 0) & (jnp.argmax(same, -1) == jnp.arange(c.shape[1]))
    mask = (same & first[:, :, None]).reshape(-1, c.shape[1])
    by_slot = jnp.broadcast_to(c[:, None, :], same.shape).reshape(mask.shape)
    error, _ = estimator.progress_loss(by_slot, mask, batch.final_reward.reshape(-1))
    return error / counts["trajectories"], {"squared_error": error}


def make_trunk_loss(config: ModelConfig) -> LossFn:
    """The loss of a trunk of this shape."""
    return functools.partial(trunk_loss, config=config)
