"""ArCHer: a critic of whole utterances, learnt by temporal differences."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from spa_jax.rl import critic


def utterance_critic(
    state_hidden: chex.Array,
    action_hidden: chex.Array,
    rewards: chex.Array,
    step_mask: chex.Array,
    fold: chex.Array,
    *,
    folds: int,
    gamma: float,
    penalty: float = 100.0,
) -> tuple[chex.Array, chex.Array]:
    """Q(s, a) and V(s) of steps, each a ridge regression on the other's newest prediction.

        Q(s_k, a_k) <- r_k + gamma V(s_{k+1}),   V(s_k) <- Q(s_k, a_k),   V(s_n) = 0

    The advantage of every token of step k is Q(s_k, a_k) - V(s_k): a policy gradient a token, a
    critic an utterance.

    Source: ArCHer, arXiv 2402.19446, section 4.2, equations for J(theta) and J(psi).  There both
    are networks of their own on RoBERTa, doubled, with target networks, learnt from a replay
    buffer; here they read the frozen trunk, each sweep solves its least squares exactly (fitted Q
    iteration: the target is the last sweep's), and the data are the round's episodes.  S sweeps
    carry a final reward to the first step.  V's target is Q of the action that was taken, not a
    fresh one of the policy's.  An episode's values are fitted on the other folds only.

    Args:
      state_hidden: [N, S, D] the hidden state at the last context token before step k.
      action_hidden: [N, S, D] the same at step k's last token.
      rewards: [N, S] r_k.
      step_mask: [N, S] 1 (or True) where a step is, without holes before the last.
      fold: [N] the fold of each episode, 0 to folds - 1; a task's episodes belong in one.
      folds: how many; at least 2, each with an episode.
      gamma: discount a step.
      penalty: of the squared weights.

    Returns:
      (Q [N, S], V [N, S]), float32; 0 where the mask is 0.
    """
    chex.assert_rank([state_hidden, rewards, step_mask, fold], [3, 2, 2, 1])
    chex.assert_equal_shape([state_hidden, action_hidden])
    mask = step_mask.astype(bool)
    r = jnp.where(mask, rewards, 0.0).astype(jnp.float32)
    states, actions = (critic.standardised(x, mask) for x in (state_hidden, action_hidden))

    def of_fold(f: chex.Array) -> tuple[jax.Array, jax.Array]:
        seen = jnp.where(mask & (fold != f)[:, None], 1.0, 0.0)
        fit_q, fit_v = (_regression(x, seen, penalty) for x in (actions, states))

        def sweep(_: int, values: tuple) -> tuple[jax.Array, jax.Array]:
            v = jnp.where(mask, values[1], 0.0)  # 0 after the end
            v_next = jnp.concatenate([v[:, 1:], jnp.zeros_like(v[:, :1])], axis=1)
            q = fit_q(r + gamma * v_next)
            return q, fit_v(q)

        return jax.lax.fori_loop(0, mask.shape[1], sweep, (jnp.zeros_like(r), jnp.zeros_like(r)))

    every = jax.lax.map(of_fold, jnp.arange(folds))

    def own(x: chex.Array) -> chex.Array:
        return jnp.where(mask, jnp.take_along_axis(x, fold[None, :, None], axis=0)[0], 0.0)

    return own(every[0]), own(every[1])


def _regression(
    x: chex.Array, seen: chex.Array, penalty: float
) -> Callable[[chex.Array], jax.Array]:
    """[N, S] targets -> [N, S] predictions of the ridge regression on the places that are seen."""
    gram = jnp.einsum("nsd,ns,nse->de", x, seen, x) + penalty * jnp.eye(x.shape[-1])
    factor = jax.scipy.linalg.cho_factor(gram)
    count = jnp.maximum(jnp.sum(seen), 1.0)

    def fit(y: chex.Array) -> jax.Array:
        mean = jnp.sum(y * seen) / count
        moment = jnp.einsum("nsd,ns->d", x, (y - mean) * seen)
        return mean + x @ jax.scipy.linalg.cho_solve(factor, moment)

    return fit
