"""Credit by branching: the true advantage of a step, as far as branches are many."""

import chex
import jax.numpy as jnp


def branching_credit(
    returns: chex.Array, count: chex.Array, final_reward: chex.Array, step_mask: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """The rise of the value over each step, measured by letting the policy go on from there.

        V(s_k) = mean of R over the branches from before step k,   V(s_n) = R
        c_k    = V(s_{k+1}) - V(s_k)

    The credits add up to R - V(s_0).  Environments are deterministic, so a state is reached again
    by its prefix, and an episode's end needs no branch.

    Source: VinePPO, arXiv 2410.01679, section 4 (the value of each intermediate state is the mean
    of K rollouts from it), with gamma = 1.

    Args:
      returns: [N, S, K] R of the branches from before step k; anything beyond `count`.
      count: [N, S] int, how many branches were played from there; at least 1 where a step is.
      final_reward: [N] R.
      step_mask: [N, S] 1 (or True) where a step is, without holes before the last.

    Returns:
      (credits [N, S], their standard errors [N, S]); 0 where the mask is 0.  The error of a state
      of one branch is taken as 0: it is not known.
    """
    chex.assert_equal_shape([count, step_mask])
    chex.assert_equal_shape_prefix([returns, count], 2)
    mask = step_mask.astype(bool)
    played = (jnp.arange(returns.shape[-1]) < count[..., None]) & mask[..., None]
    number = jnp.maximum(count, 1)
    value = jnp.sum(jnp.where(played, returns, 0.0), -1) / number
    squared = jnp.sum(jnp.where(played, jnp.square(returns - value[..., None]), 0.0), -1)
    variance = squared / jnp.maximum(number - 1, 1) / number
    steps = jnp.arange(mask.shape[1])
    is_last = steps == jnp.sum(mask, 1, keepdims=True) - 1
    after = jnp.where(is_last, final_reward[:, None], jnp.roll(value, -1, axis=1))
    error = jnp.sqrt(variance + jnp.where(is_last, 0.0, jnp.roll(variance, -1, axis=1)))
    return jnp.where(mask, after - value, 0.0), jnp.where(mask, error, 0.0)
