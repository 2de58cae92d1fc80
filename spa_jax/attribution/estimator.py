"""The progress estimator's objective: contributions that add up to the final reward."""

import chex
import jax.numpy as jnp


def predicted_return(contributions: chex.Array, step_mask: chex.Array) -> chex.Array:
    """What the estimator says that an episode will be paid.

        R_hat = sum_k c_k

    Source: SPA-RL, arXiv 2505.20732, section 3 (stepwise progress attribution).

    Args:
      contributions: [N, S] c_k; anything where the mask is 0.
      step_mask: [N, S] 1 (or True) where a step is.

    Returns:
      [N] R_hat; 0 for a trajectory without steps.
    """
    chex.assert_rank([contributions, step_mask], 2)
    chex.assert_equal_shape([contributions, step_mask])
    return jnp.sum(jnp.where(step_mask.astype(bool), contributions, 0.0), axis=-1)


def progress_loss(
    contributions: chex.Array, step_mask: chex.Array, final_reward: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """The squared error of the predicted return.

        L = sum_i (sum_k c_ik - R_i)^2,   over trajectories i that have a step

    Source: SPA-RL, arXiv 2505.20732, section 3; R in [0, 1].

    Args:
      contributions: [N, S] c_k; anything where the mask is 0.
      step_mask: [N, S] 1 (or True) where a step is.
      final_reward: [N] R; anything for a trajectory without steps.

    Returns:
      (the sum of the losses, the number of trajectories), both scalars.  The
      caller divides by the global number.
    """
    chex.assert_rank([contributions, step_mask, final_reward], [2, 2, 1])
    chex.assert_equal_shape_prefix([contributions, step_mask, final_reward], 1)
    real = jnp.any(step_mask.astype(bool), axis=-1)
    error = predicted_return(contributions, step_mask) - jnp.where(real, final_reward, 0.0)
    return jnp.sum(jnp.square(error)), jnp.sum(real.astype(error.dtype))
