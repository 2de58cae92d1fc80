"""The progress estimator's update: a head on the hidden states of a frozen trunk."""

import functools

import chex
import jax
from flax import struct

from spa_jax.attribution import estimator
from spa_jax.models import heads
from spa_jax.models.transformer import Params
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
    contributions = heads.progress(params["progress"], batch.hidden)
    error, _ = estimator.progress_loss(contributions, batch.step_mask, batch.final_reward)
    return error / counts["trajectories"], {"squared_error": error}


def make_loss() -> LossFn:
    """The estimator's loss."""
    return functools.partial(estimator_loss)
