"""Objectives as choices: what becomes of rewards before the clipped policy loss.

    ppo          GAE with a critic's values; whitened over the update
    grpo         returns against those of the task's rollouts, in units of their spread
    rloo         returns less the mean of the task's other rollouts
    reinforce++  returns; whitened over the update
    gigpo        returns against those of the task's rollouts, and of equal states (gigpo.py)
    gagpo        GAE with the mean return of equal states for a critic (gagpo.py)
    archer       a critic of actions less one of states, both fitted before the pass (archer.py)
    ragen        ppo on the tasks whose rollouts differ most, clipped less upwards (ragen.py)

Only ppo and ragen have a critic: the others need no value head, no value loss and no pass for
values.  All take the same policy loss (`losses.clipped_policy_loss`, divided by the update's
policy tokens; gagpo and ragen vary it) and any credit: they read step rewards, whoever gave them.

With credit a step, a group's baseline must be chosen.  That of step k here is the *return-to-go*
of the rollouts at step k, and of one that had ended before, at its last step (`at_each_step`):

- With the reward at the end (`terminal`, gamma = 1) every return-to-go is R, so grpo and rloo are
  their papers' to the letter.
- It depends on the other rollouts alone, so subtracting it adds no bias (rloo).
- It falls as credit is paid out, as the return-to-go itself does.  The *trajectory's* return as
  the baseline of every step would call each late step bad for what was paid before it.
- Every rollout has an entry at every step.  Only those still playing would compare a late winner
  with the losers that are left.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from spa_jax.rl import advantages, gagpo, gigpo


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an objective needs.

    Attributes:
      critic: a value head, its loss and its values.
      group: several rollouts of a task.
      scaled: advantages are in units of their spread in a group.
      whiten: advantages are whitened over the update.
      actions: values of actions and of states, fitted on a frozen policy's hidden states.
      states: which steps of a task left from the same state.
    """

    critic: bool = False
    group: bool = False
    whiten: bool = False
    scaled: bool = False
    states: bool = False
    actions: bool = False


OBJECTIVES = {
    "ppo": Objective(critic=True, whiten=True),
    "grpo": Objective(group=True, scaled=True),
    "rloo": Objective(group=True),
    "reinforce++": Objective(whiten=True),
    "gigpo": Objective(group=True, states=True),
    "gagpo": Objective(group=True, scaled=True, states=True),
    "archer": Objective(actions=True),
    "ragen": Objective(critic=True, group=True, whiten=True),
}


def advantages_and_returns(
    objective: str,
    rewards: chex.Array,
    values: chex.Array,
    step_mask: chex.Array,
    group: chex.Array,
    *,
    gamma: float,
    gae_lambda: float,
    state: chex.Array | None = None,
    action_values: chex.Array | None = None,
) -> tuple[chex.Array, chex.Array]:
    """A_k, not whitened, and the returns G_k of an objective of `OBJECTIVES`.

    reinforce++ is A_k = G_k = sum_{j >= k} gamma^(j - k) r_j.  Source: REINFORCE++, arXiv
    2501.03262, section 3: PPO's loss with returns normalised over the batch in place of a critic
    (with `--kl=reward` also its KL; its gamma is 1).

    Args:
      objective: which.
      rewards: [N, S] r_k.
      values: [N, S] V_k; only objectives with a critic read them.
      step_mask: [N, S] 1 (or True) where a step is.
      group: [N] int, in [0, N): the trajectories of a task have the same number.
      gamma: discount a step.
      gae_lambda: lambda; only ppo, ragen and gagpo read it.
      state: [N, S] int, in [0, N S): steps that left from the same state of the same task; for
        objectives with `states`.
      action_values: [N, S] Q(s_k, a_k); for objectives with `actions`.

    Returns:
      (advantages [N, S], returns [N, S]); both 0 where the mask is 0.
    """
    if OBJECTIVES[objective].critic:
        return advantages.step_gae(rewards, values, step_mask, gamma=gamma, gae_lambda=gae_lambda)
    returns = returns_to_go(rewards, step_mask, gamma=gamma)
    if objective == "grpo":
        return grpo(returns, step_mask, group), returns
    if objective == "rloo":
        return rloo(returns, step_mask, group), returns
    if objective == "gigpo":
        return gigpo.gigpo(rewards, returns, step_mask, group, state), returns
    if objective == "archer":  # arXiv 2402.19446, the gradient of its equation for pi
        return jnp.where(step_mask.astype(bool), action_values - values, 0.0), returns
    if objective == "gagpo":
        advantage = gagpo.gagpo(
            rewards, returns, step_mask, group, state, gamma=gamma, gae_lambda=gae_lambda
        )
        return advantage, returns
    return returns, returns


def returns_to_go(rewards: chex.Array, step_mask: chex.Array, *, gamma: float) -> chex.Array:
    """[N, S] G_k = sum_{j >= k} gamma^(j - k) r_j; 0 where the mask is 0."""
    zeros = jnp.zeros_like(rewards)
    return advantages.step_gae(rewards, zeros, step_mask, gamma=gamma, gae_lambda=1.0)[1]


def rloo(returns: chex.Array, step_mask: chex.Array, group: chex.Array) -> chex.Array:
    """REINFORCE, leave one out.

        A_ik = G_ik - mean_{j != i} G_jk      over the task's other rollouts j

    Source: RLOO, arXiv 2402.14740, equation 8, with returns-to-go (see above) in place of R.

    Args:
      returns: [N, S] G_k.
      step_mask: [N, S] 1 (or True) where a step is.
      group: [N] int, in [0, N).

    Returns:
      [N, S]; 0 where the mask is 0, and for the only rollout of a task: nothing to compare it to.
    """
    _, mean, count = _moments(returns, step_mask, group)
    others = jnp.maximum(count - 1, 1)
    # G - (n mean - G) / (n - 1) = n (G - mean) / (n - 1)
    advantage = count * (returns - mean) / others
    return jnp.where(step_mask.astype(bool) & (count > 1), advantage, 0.0)


def grpo(
    returns: chex.Array, step_mask: chex.Array, group: chex.Array, *, epsilon: float = 1e-4
) -> chex.Array:
    """Group-relative advantages.

        A_ik = (G_ik - mean_j G_jk) / (std_j G_jk + epsilon)      over all rollouts j of the task

    Source: GRPO, arXiv 2402.03300, section 4.1.2 (outcome supervision), with returns-to-go (see
    above) in place of R; std divides by the count, epsilon is TRL's.  The paper's formula for
    step rewards (4.1.3) normalises each reward by the mean of all steps' and sums what follows:
    every step then adds or takes a constant, which pays for episodes to be short or long.

    Args:
      returns: [N, S] G_k.
      step_mask: [N, S] 1 (or True) where a step is.
      group: [N] int, in [0, N).
      epsilon: keeps a group of equal returns finite: they become 0.

    Returns:
      [N, S]; 0 where the mask is 0, and for the only rollout of a task.
    """
    variance, mean, count = _moments(returns, step_mask, group)
    advantage = (returns - mean) / (jnp.sqrt(variance) + epsilon)
    return jnp.where(step_mask.astype(bool) & (count > 1), advantage, 0.0)


def at_each_step(returns: chex.Array, step_mask: chex.Array) -> chex.Array:
    """Each trajectory's return-to-go at every step; after its end, at its last step.

        returns  3 2 1 . .   ->   3 2 1 1 1

    Args:
      returns: [N, S] G_k.
      step_mask: [N, S] 1 (or True) where a step is; a place without one within the trajectory
        takes the step before it.

    Returns:
      [N, S]; 0 for a trajectory without a step.
    """
    chex.assert_equal_shape([returns, step_mask])
    mask = step_mask.astype(bool)
    here = jnp.where(mask, jnp.arange(mask.shape[1]), 0)
    source = jnp.maximum(jax.lax.cummax(here, axis=1), jnp.argmax(mask, 1)[:, None])
    return jnp.take_along_axis(jnp.where(mask, returns, 0.0), source, 1)


def _moments(
    returns: chex.Array, step_mask: chex.Array, group: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """(variance, mean [N, S], count [N, 1]) of each trajectory's group, at every step."""
    chex.assert_rank([returns, step_mask, group], [2, 2, 1])
    played = step_mask.astype(bool).any(1, keepdims=True)  # [N, 1]

    def total(x: chex.Array) -> chex.Array:
        x = jnp.where(played, x, 0.0)
        return jax.ops.segment_sum(x, group, num_segments=len(group))[group]

    g = at_each_step(returns, step_mask)
    count = total(jnp.ones_like(g[:, :1]))
    mean = total(g) / jnp.maximum(count, 1)
    variance = total(jnp.square(g - mean)) / jnp.maximum(count, 1)
    return variance, mean, count
