"""AgentPRM: a process model fitted on the returns of steps, and the credit that it gives."""

import chex
import jax.numpy as jnp

from spa_jax.rl import critic


def process_values(
    state_hidden: chex.Array,
    action_hidden: chex.Array,
    final_reward: chex.Array,
    step_mask: chex.Array,
    fold: chex.Array,
    *,
    folds: int,
    penalty: float = 100.0,
) -> tuple[chex.Array, chex.Array]:
    """The process model: what an episode pays once a step was taken, and before the first.

        Q(s_k, a_k) ~ R,   V(s_0) ~ R      least squares over all steps, or first states

    Source: AgentPRM, arXiv 2502.10325, section 3: Q is regressed on Monte-Carlo returns of the
    policy's rollouts.  The whole model is fine-tuned there, with a soft cross-entropy; here a
    ridge regression reads the frozen trunk, fitted on the other tasks' episodes
    (`critic.cross_fitted_values`), so no step's model has seen its own outcome.  Returns are not
    discounted, and each round fits anew on its own episodes.

    Args:
      state_hidden: [N, S, D] the hidden state at the last context token before step k.
      action_hidden: [N, S, D] the same at step k's last token.
      final_reward: [N] R.
      step_mask: [N, S] 1 (or True) where a step is.
      fold: [N] the fold of each episode, 0 to folds - 1; a task's episodes belong in one.
      folds: how many; at least 2, each with an episode.
      penalty: of the squared weights.

    Returns:
      (Q [N, S], V(s_0) [N]); Q is 0 where the mask is 0.
    """
    chex.assert_equal_shape([state_hidden, action_hidden])
    returns = jnp.broadcast_to(final_reward[:, None], step_mask.shape)
    q = critic.cross_fitted_values(
        action_hidden, returns, step_mask, fold, folds=folds, penalty=penalty
    )
    first = (slice(None), slice(0, 1))
    v = critic.cross_fitted_values(
        state_hidden[first], returns[first], step_mask[first], fold, folds=folds, penalty=penalty
    )
    return q, v[:, 0]


def process_credit(
    q_values: chex.Array, first_value: chex.Array, step_mask: chex.Array
) -> chex.Array:
    """How much each step raised what the process model expects.

        c_k = Q(s_k, a_k) - Q(s_{k-1}, a_{k-1}),   Q(s_{-1}, a_{-1}) = V(s_0)

    Source: AgentPRM, arXiv 2502.10325.  There each turn is optimised alone (a bandit) with Q as
    its reward.  A sum of Q over an episode, as PPO would take it, pays for every further step;
    the difference does not, and is the bandit's advantage: where the environment is
    deterministic, Q(s_{k-1}, a_{k-1}) is the value of s_k.  With `--gae_lambda=0` and no critic
    besides, this is the published update; the credits add up to Q(s_n, a_n) - V(s_0).

    Args:
      q_values: [N, S] Q(s_k, a_k).
      first_value: [N] V(s_0).
      step_mask: [N, S] 1 (or True) where a step is, without holes before the last.

    Returns:
      [N, S] c_k; 0 where the mask is 0.
    """
    chex.assert_equal_shape([q_values, step_mask])
    before = jnp.concatenate([first_value[:, None], q_values[:, :-1]], axis=1)
    return jnp.where(step_mask.astype(bool), q_values - before, 0.0)
