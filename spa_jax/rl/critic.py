"""A critic without training: ridge regression of returns on frozen hidden states, cross-fitted."""

import functools

import chex
import jax
import jax.numpy as jnp


def cross_fitted_values(
    hidden: chex.Array,
    returns: chex.Array,
    step_mask: chex.Array,
    fold: chex.Array,
    *,
    folds: int,
    penalty: float = 100.0,
) -> chex.Array:
    """The value of each step's state, fitted on the other folds' episodes only.

        w_f = argmin_w sum_{i not in f, k} (G_ik - m_f - w x_ik)^2 + penalty |w|^2
        V_ik = m_f + w_f x_ik    for the episodes i of fold f

    x is the hidden state, standardised over the positions of all episodes, and m_f the mean of
    the other folds' returns.  A baseline that has seen its own episode's return would take it out
    of the advantage; one that has not leaves the advantage's expectation as it is, whatever it
    predicts.

    Source: ridge regression on the last layer of a frozen network; cross-fitting as in double
    machine learning (arXiv 1608.00060).

    Args:
      hidden: [N, S, D] the hidden state at the last context token before step k.
      returns: [N, S] G_k, the discounted sum of rewards from step k on.
      step_mask: [N, S] 1 (or True) where a step is.
      fold: [N] the fold of each episode, 0 to folds - 1; a task's episodes belong in one.
      folds: how many; at least 2, each with an episode.
      penalty: of the squared weights.

    Returns:
      [N, S] V_k, float32; 0 where the mask is 0.
    """
    chex.assert_rank([hidden, returns, step_mask, fold], [3, 2, 2, 1])
    chex.assert_equal_shape([returns, step_mask])
    chex.assert_equal_shape_prefix([hidden, returns], 2)
    mask = step_mask.astype(bool)
    x = standardised(hidden, mask)
    y = jnp.where(mask, returns, 0.0).astype(jnp.float32)
    # A TPU multiplies float32 as bfloat16 unless it is told not to.
    einsum = functools.partial(jnp.einsum, precision="highest")

    def values(f: chex.Array) -> chex.Array:
        seen = jnp.where(mask & (fold != f)[:, None], 1.0, 0.0)
        mean = jnp.sum(y * seen) / jnp.maximum(jnp.sum(seen), 1.0)
        gram = einsum("nsd,ns,nse->de", x, seen, x) + penalty * jnp.eye(x.shape[-1])
        moment = einsum("nsd,ns->d", x, (y - mean) * seen)
        return mean + einsum("nsd,d->ns", x, jax.scipy.linalg.solve(gram, moment, assume_a="pos"))

    every = jax.lax.map(values, jnp.arange(folds))
    own = jnp.take_along_axis(every, fold[None, :, None], axis=0)[0]
    return jnp.where(mask, own, 0.0)


def standardised(hidden: chex.Array, mask: chex.Array) -> chex.Array:
    """[N, S, D] with mean 0 and variance 1 a coordinate over the mask; 0 outside."""
    x = jax.nn.standardize(jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0), axis=-1)
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask[..., None], x, 0.0), (0, 1)) / count
    centred = jnp.where(mask[..., None], x - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), (0, 1)) / count)
    return centred / jnp.maximum(std, 1e-3)
