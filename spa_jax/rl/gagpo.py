"""GAGPO: generalised advantages with the mean return of a state in place of a critic."""

import chex
import jax
import jax.numpy as jnp

from spa_jax.rl import advantages, groups


def state_values(returns: chex.Array, step_mask: chex.Array, state: chex.Array) -> chex.Array:
    """[N, S] V(s_k): the mean return of all steps that left from the state; 0 outside the mask."""
    mean, _, _ = groups.moments(returns, step_mask, state, groups=state.size)
    return jnp.where(step_mask.astype(bool), mean, 0.0)


def gagpo(
    rewards: chex.Array,
    returns: chex.Array,
    step_mask: chex.Array,
    group: chex.Array,
    state: chex.Array,
    *,
    gamma: float,
    gae_lambda: float,
    epsilon: float = 1e-4,
) -> chex.Array:
    """Advantages of GAGPO.

        V(s)    = mean of G over the task's steps that left from s
        delta_k = r_k + gamma V(s_{k+1}) - V(s_k),   A_k = delta_k + gamma lambda A_{k+1}
        A'_k    = (A_k - mean A) / (std A + epsilon)   over all steps of the task's rollouts

    There is no episode's term: the recursion alone carries the outcome back.  A state that one
    step left from has the value of that step's return.

    Source: GAGPO, arXiv 2605.13217.  The text of the paper was not at hand: this follows its
    abstract and a published summary (value of exactly equal states as the mean discounted return;
    TD and GAE; normalised within the group; `action_log_ratio`).  Open there and chosen here:
    the deviation divides by the count, and its epsilon is grpo's.

    Args:
      rewards: [N, S] r_k.
      returns: [N, S] G_k, discounted.
      step_mask: [N, S] 1 (or True) where a step is.
      group: [N] int, in [0, N): the trajectories of a task have the same number.
      state: [N, S] int, in [0, N S): steps that left from the same state of the same task.
      gamma: discount a step.
      gae_lambda: lambda.
      epsilon: keeps equal advantages finite: they become 0.

    Returns:
      [N, S]; 0 where the mask is 0, and for the only rollout of a task: nothing to compare it to.
    """
    chex.assert_equal_shape([rewards, returns, step_mask, state])
    mask = step_mask.astype(bool)
    values = state_values(returns, mask, state)
    a_t, _ = advantages.step_gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    of_task = jnp.broadcast_to(group[:, None], mask.shape)
    mean, std, _ = groups.moments(a_t, mask, of_task, groups=len(group))
    played = mask.any(1)
    _, _, rollouts = groups.moments(jnp.zeros_like(a_t[:, 0]), played, group, groups=len(group))
    return jnp.where(mask & (rollouts > 1)[:, None], (a_t - mean) / (std + epsilon), 0.0)


def action_log_ratio(
    log_ratio: chex.Array, token_step: chex.Array, token_mask: chex.Array, *, steps: int
) -> chex.Array:
    """The log-ratio of a whole action, at each of its tokens.

        log s_k = 1 / |a_k| sum_{t in a_k} log pi(t) / pi_old(t)

    The action is weighed, and clipped, as one; its length changes nothing.

    Source: the action-level importance ratio of GAGPO, arXiv 2605.13217; of a whole response:
    GSPO, arXiv 2507.18071, equation 7.

    Args:
      log_ratio: [R, P] of each token.
      token_step: [R, P] int, in [0, steps): the step of a row that a token belongs to.
      token_mask: [R, P] 1 (or True) where a policy token is.
      steps: the most steps of a row.

    Returns:
      [R, P]; 0 where the mask is 0.
    """
    chex.assert_equal_shape([log_ratio, token_step, token_mask])
    mask = token_mask.astype(bool)

    def of_row(x: chex.Array, step: chex.Array) -> chex.Array:
        return jax.ops.segment_sum(x, step, num_segments=steps)[step]

    total = jax.vmap(of_row)(jnp.where(mask, log_ratio, 0.0), token_step)
    count = jax.vmap(of_row)(mask.astype(log_ratio.dtype), token_step)
    return jnp.where(mask, total / jnp.maximum(count, 1), 0.0)
