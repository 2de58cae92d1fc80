"""Means and spreads over groups of steps, whatever makes a group."""

import chex
import jax
import jax.numpy as jnp


def moments(
    x: chex.Array, mask: chex.Array, group: chex.Array, *, groups: int
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """(mean, standard deviation, count) of each entry's group, at the entry.

    Args:
      x: [...] numbers.
      mask: [...] 1 (or True) where a number counts.
      group: [...] int, in [0, groups): entries of a group have the same number.
      groups: how many there may be.

    Returns:
      Three of [...]; the deviation divides by the count.  0 for a group without an entry.
    """
    chex.assert_equal_shape([x, mask, group])
    mask = mask.astype(bool)

    def total(y: chex.Array) -> chex.Array:
        flat = jnp.where(mask, y, 0.0).ravel()
        return jax.ops.segment_sum(flat, group.ravel(), num_segments=groups)[group]

    count = total(jnp.ones_like(x))
    mean = total(x) / jnp.maximum(count, 1)
    variance = total(jnp.square(jnp.where(mask, x, 0.0) - mean)) / jnp.maximum(count, 1)
    return mean, jnp.sqrt(variance), count
