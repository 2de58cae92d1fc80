"""The progress estimator's objectives: contributions that add up to the final reward.

    paper    R_hat = sum_k c_k                             (SPA-RL, arXiv 2505.20732)
    prefix   V_hat_j = b + sum_{k < j} c_k, j = 0 .. n     predicts R behind every step

The sum alone does not identify the steps: a constant on the first step and a clock on the others
add up to R as well.  A prediction that has to be right behind every step does: c_k is then what
step k's answer changes in the expected reward, and b what was known before the first step, which no
step is paid for.
"""

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


def prefix_loss(
    contributions: chex.Array,
    start: chex.Array,
    step_mask: chex.Array,
    final_reward: chex.Array,
    *,
    prefixes: float,
) -> tuple[chex.Array, chex.Array]:
    """The squared error of the predictions behind every step, the last one's counted by itself.

        V_ij = b_i + sum_{k < j} c_ik,   j = 0 .. n_i
        L = sum_i [ (V_in - R_i)^2 + w mean_j (V_ij - R_i)^2 ],   over trajectories that have a step

    Source: the auxiliary loss of RUDDER, arXiv 1806.07857, section 3: every prefix predicts the
    return, and the differences of the predictions are the contributions.

    Args:
      contributions: [N, S] c_k; anything where the mask is 0.
      start: [N] b, what is expected before the first step.
      step_mask: [N, S] 1 (or True) where a step is.
      final_reward: [N] R; anything for a trajectory without steps.
      prefixes: w; 0: the end alone is predicted.

    Returns:
      (the sum of the losses, the sum of the squared errors at the end), both scalars.  The caller
      divides by the global number of trajectories.
    """
    chex.assert_rank([contributions, start, step_mask, final_reward], [2, 1, 2, 1])
    chex.assert_equal_shape_prefix([contributions, start, step_mask, final_reward], 1)
    mask = step_mask.astype(bool)
    real = jnp.any(mask, axis=-1)
    target = jnp.where(real, final_reward, 0.0)[:, None]
    start = jnp.where(real, start, 0.0)[:, None]
    behind = start + jnp.cumsum(jnp.where(mask, contributions, 0.0), axis=-1)
    final = jnp.square(behind[:, -1:] - target)[:, 0]
    every = jnp.square(start - target)[:, 0] * real
    every += jnp.sum(jnp.where(mask, jnp.square(behind - target), 0.0), axis=-1)
    mean = every / (1 + jnp.sum(mask, axis=-1))
    return jnp.sum(final + prefixes * mean), jnp.sum(final)
