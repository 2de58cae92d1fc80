"""GiGPO: groups of rollouts, and within them groups of steps that left from the same state."""

import chex
import jax.numpy as jnp

from spa_jax.rl import groups

WEIGHT = 1.0  # omega, the published one


def gigpo(
    rewards: chex.Array,
    returns: chex.Array,
    step_mask: chex.Array,
    group: chex.Array,
    state: chex.Array,
    *,
    weight: float = WEIGHT,
) -> chex.Array:
    """Group-in-group advantages.

        A_ik = A^E_i + omega A^S_ik
        A^E_i  = R_i  - mean_j R_j      over the task's rollouts j,  R_i = sum_k r_ik
        A^S_ik = G_ik - mean G          over all steps that left from the same state of the task

    Source: GiGPO, arXiv 2505.10978, equations 3 and 6-8.  Both are divided by a spread there,
    F_norm: the standard deviation, or 1.  It is 1 here, as in the published ALFWorld and WebShop
    settings, which leaves tasks that nearly always end alike as light as they are.  A state is
    what the environment said before the step, word for word (`ppo_data.states`): where two
    states look alike ("Nothing happens."), they are one.  A step whose state no other one left
    from has A^S = 0.

    Args:
      rewards: [N, S] r_k.
      returns: [N, S] G_k, discounted.
      step_mask: [N, S] 1 (or True) where a step is.
      group: [N] int, in [0, N): the trajectories of a task have the same number.
      state: [N, S] int, in [0, N S): steps that left from the same state of the same task.
      weight: omega.

    Returns:
      [N, S]; 0 where the mask is 0.
    """
    chex.assert_equal_shape([rewards, returns, step_mask, state])
    mask = step_mask.astype(bool)
    total = jnp.sum(jnp.where(mask, rewards, 0.0), 1)
    mean, _, _ = groups.moments(total, mask.any(1), group, groups=len(group))
    here, _, _ = groups.moments(returns, mask, state, groups=state.size)
    episode, step = (total - mean)[:, None], jnp.where(mask, returns, 0.0) - here
    return jnp.where(mask, episode + weight * step, 0.0)
