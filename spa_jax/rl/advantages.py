"""Advantages: generalised advantage estimation over environment steps, and whitening."""

import chex
import jax
import jax.numpy as jnp


def step_gae(
    rewards: chex.Array,
    values: chex.Array,
    step_mask: chex.Array,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[chex.Array, chex.Array]:
    """Generalised advantage estimation where one time step is one environment step.

        delta_k = r_k + gamma V_{k+1} - V_k
        A_k     = delta_k + gamma lambda A_{k+1}
        G_k     = A_k + V_k

    with V_n = A_n = 0 after the last step, whatever ended the episode.  How many
    tokens a step or an observation has changes nothing.  A place where the mask
    is 0 is no step: its neighbours are adjacent to each other.

    Source: GAE, arXiv 1506.02438, equations 11-16.

    Args:
      rewards: [N, S] r_k.
      values: [N, S] V_k, read at the last context token before step k.
      step_mask: [N, S] 1 (or True) where a step is (also where its reward is 0).
      gamma: discount a step.
      gae_lambda: lambda.

    Returns:
      (advantages [N, S], returns [N, S]); both 0 where the mask is 0.  Gradients
      do not flow through either.
    """
    chex.assert_rank([rewards, values, step_mask], 2)
    chex.assert_equal_shape([rewards, values, step_mask])
    mask = step_mask.astype(bool)
    r_t, v_t = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def back(carry: tuple, now: tuple) -> tuple:
        a_next, v_next = carry
        r, v, is_step = now
        a = r + gamma * v_next - v + gamma * gae_lambda * a_next
        carry = (jnp.where(is_step, a, a_next), jnp.where(is_step, v, v_next))
        return carry, jnp.where(is_step, a, 0.0)

    zero = jnp.zeros_like(r_t[:, 0]) if r_t.shape[1] else jnp.zeros(r_t.shape[0], r_t.dtype)
    a_t: jax.Array
    _, a_t = jax.lax.scan(back, (zero, zero), (r_t.T, v_t.T, mask.T), reverse=True)
    return jax.lax.stop_gradient((a_t.T, a_t.T + v_t))


def less_step_mean(x: chex.Array, mask: chex.Array) -> chex.Array:
    """Subtracts from each number the mean of the *other* episodes' at the same step.

        y_ik = x_ik - mean_{j != i} x_jk

    A leave-one-out baseline (arXiv 2402.14740) a step index.  Contributions that add up to R may
    mostly say how late it is: the first step gets what is true of every episode, late steps, which
    only losing episodes have, get the loss.  This leaves what tells episodes apart.

    Args:
      x: [N, S] such as advantages, step k in column k.
      mask: [N, S] 1 (or True) where a step is.

    Returns:
      [N, S]; x itself at a step that no other episode has, 0 where the mask is 0.
    """
    chex.assert_equal_shape([x, mask])
    mask = mask.astype(bool)
    x = jnp.where(mask, x, 0.0)
    others = jnp.sum(mask, 0) - 1
    mean = (jnp.sum(x, 0) - x) / jnp.maximum(others, 1)
    return jnp.where(mask, x - mean, 0.0)


def whiten(
    x: chex.Array,
    mask: chex.Array,
    *,
    epsilon: float = 1e-8,
) -> chex.Array:
    """Shifts and scales to mean 0 and variance 1 over the mask.

        y = (x - mean) / sqrt(var + epsilon)

    mean and var (divided by the count) are taken over all axes.

    Args:
      x: [...] numbers, such as advantages.
      mask: [...] 1 (or True) where a number counts.
      epsilon: keeps equal numbers finite: they become 0.

    Returns:
      [...] y; 0 where the mask is 0.
    """
    chex.assert_equal_shape([x, mask])
    mask = mask.astype(bool)

    def total(y: chex.Array) -> chex.Array:
        return jnp.sum(jnp.where(mask, y, 0.0))

    count = jnp.maximum(total(jnp.ones_like(x)), 1.0)
    centred = jnp.where(mask, x, 0.0) - total(x) / count
    variance = total(jnp.square(centred)) / count
    return jnp.where(mask, centred * jax.lax.rsqrt(variance + epsilon), 0.0)
