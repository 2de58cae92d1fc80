"""From contributions to step rewards: the fused reward, and the placebos it is compared with."""

import chex
import jax
import jax.numpy as jnp

from spa_jax.errors import UserError


def fused_reward(
    contributions: chex.Array,
    grounded: chex.Array,
    step_mask: chex.Array,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    grounding: str = "penalty",
) -> chex.Array:
    """The reward of each step.

        penalty:  r_k = alpha c_k + beta (g_k - 1)
        bonus:    r_k = alpha c_k + beta g_k

    Source: `bonus` is SPA-RL, arXiv 2505.20732, as printed.  It pays beta for
    every executable step, and winning ends the episode: loitering beats winning.
    `penalty` differs by the constant beta a step, as if the time after the end
    were grounded too: an executable step with c_k = 0 adds nothing to the return.

    Args:
      contributions: [N, S] c_k, or another credit (see `credit`).
      grounded: [N, S] g_k: 1 (or True) where the action was executable.
      step_mask: [N, S] 1 (or True) where a step is.
      alpha: weight of the contribution.
      beta: weight of grounding.
      grounding: which of the two formulas.

    Returns:
      [N, S] r_k; 0 where the mask is 0.

    Raises:
      UserError: for another `grounding`.
    """
    chex.assert_rank([contributions, grounded, step_mask], 2)
    chex.assert_equal_shape([contributions, grounded, step_mask])
    if grounding not in ("penalty", "bonus"):
        raise UserError(f"--grounding={grounding}: choose penalty or bonus")
    g = grounded.astype(contributions.dtype)
    if grounding == "penalty":
        g = g - 1.0
    return jnp.where(step_mask.astype(bool), alpha * contributions + beta * g, 0.0)


def credit(
    kind: str,
    contributions: chex.Array,
    final_reward: chex.Array,
    step_mask: chex.Array,
    key: chex.PRNGKey | None = None,
    *,
    residual: bool = False,
) -> chex.Array:
    """The credit of each step: the estimator's, or a placebo with the same total.

        T = sum_k c_k,  n steps
        spa:       c_k
        uniform:   T / n
        shuffled:  c_pi(k), pi a random permutation of the n steps
        random:    T d_k, d ~ Dirichlet(1, ..., 1)
        terminal:  R at the last step, 0 before: the total is R, not T
        residual:  + (R - total) at the last step

    If `spa` beats the placebos, it is the estimator's choice of steps that helps,
    not the size of the reward.  The draws of trajectory i depend on the key, i and
    the step only: padding the batch or the steps does not change them.

    Args:
      kind: which.
      contributions: [N, S] c_k; anything where the mask is 0.
      final_reward: [N] R.
      step_mask: [N, S] 1 (or True) where a step is.
      key: for `shuffled` and `random`; None for the others.
      residual: whether the credits of a trajectory are made to add up to R.

    Returns:
      [N, S] credits; 0 where the mask is 0.

    Raises:
      UserError: for another `kind`.
    """
    chex.assert_rank([contributions, step_mask, final_reward], [2, 2, 1])
    chex.assert_equal_shape([contributions, step_mask])
    mask = step_mask.astype(bool)
    c = jnp.where(mask, contributions, 0.0)
    total = jnp.sum(c, axis=-1, keepdims=True)
    if kind == "spa":
        credits = c
    elif kind == "terminal":
        credits = jnp.where(_is_last(mask), final_reward[:, None], 0.0)
    elif kind == "uniform":
        credits = jnp.where(mask, total / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1), 0.0)
    elif kind == "shuffled":
        credits = _shuffle(c, mask, key)
    elif kind == "random":
        exponential = jnp.maximum(-jnp.log1p(-_uniform(key, c)), 1e-7)  # a draw can be 0
        share = jnp.where(mask, exponential, 0.0)
        credits = total * share / jnp.maximum(jnp.sum(share, -1, keepdims=True), 1e-7)
    else:
        raise UserError(f"--credit={kind}: choose spa, terminal, uniform, shuffled or random")
    if residual:
        missing = final_reward[:, None] - jnp.sum(credits, axis=-1, keepdims=True)
        credits = credits + jnp.where(_is_last(mask), missing, 0.0)
    return credits


def _is_last(mask: chex.Array) -> chex.Array:
    """[N, S] True at each trajectory's last step."""
    after = jnp.cumsum(mask[:, ::-1], axis=-1)[:, ::-1]  # steps from here on
    return mask & (after == 1)


def _uniform(key: chex.PRNGKey | None, like: chex.Array) -> chex.Array:
    """[N, S] uniform draws in [0, 1); entry (i, k) depends on (key, i, k) only."""
    if key is None:
        raise ValueError("credits shuffled and random need a key")
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(like.shape[0]))
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        row_keys, jnp.arange(like.shape[1])
    )
    return jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, dtype=like.dtype)))(keys)


def _shuffle(c: chex.Array, mask: chex.Array, key: chex.PRNGKey | None) -> chex.Array:
    """Permutes each row's entries among the places where the mask is True."""
    order = jnp.argsort(jnp.where(mask, _uniform(key, c), jnp.inf), axis=-1)  # real ones first
    rank = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)  # the j-th real place takes the j-th
    shuffled = jnp.take_along_axis(jnp.take_along_axis(c, order, -1), rank, -1)
    return jnp.where(mask, shuffled, 0.0)
