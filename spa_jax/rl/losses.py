"""Losses a token or a step.  Every one returns a SUM over its mask.

The caller divides by a count over all devices, rows and accumulation
microbatches, so that the result does not depend on how trajectories were dealt
out.  What lies where the mask is 0 is replaced before anything is computed: it
may be infinite or NaN and reaches neither a loss nor a gradient.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class PolicyStats(NamedTuple):
    """Sums over policy tokens, beside the policy loss; scalars.

    Attributes:
      clipped: the number of tokens where the clipped term is the larger loss.
      ratio: the sum of pi / pi_old.
      ratio_squared: the sum of its squares, see `effective_share`.
      approx_kl: the sum of k3 for KL(pi_old || pi), in nats.
    """

    clipped: chex.Array
    ratio: chex.Array
    ratio_squared: chex.Array
    approx_kl: chex.Array


def clipped_policy_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    mask: chex.Array,
    *,
    clip: float,
    truncate: float = 0.0,
) -> tuple[chex.Array, PolicyStats]:
    """PPO's clipped surrogate, as a loss.

        rho_t = pi(a_t) / pi_old(a_t)
        L = - sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)

    Source: PPO, arXiv 1707.06347, equation 7.  pi_old is the policy that drew the tokens, however
    old: the ratio is the importance weight that makes its tokens count as pi's.  The clip does
    not bound the weight of a bad action that pi has made likelier; `truncate` does, and keeps
    the direction: rho_t is then min(rho_t, c) in the loss, grad log pi times that in the
    gradient (truncated importance sampling, as in IMPALA, arXiv 1802.01561, section 4.1).

    Args:
      log_probs: [...] log pi(a_t).
      old_log_probs: [...] log pi_old(a_t), as recorded while sampling.
      advantages: [...] A_t, that of the token's step.
      mask: [...] 1 (or True) where a policy token is.
      clip: eps.
      truncate: c, above 1 + eps; 0: ratios are not truncated.

    Returns:
      (the sum of the losses, `PolicyStats` of the ratios before they are truncated).
    """
    chex.assert_equal_shape([log_probs, old_log_probs, advantages, mask])
    mask = mask.astype(bool)
    log_ratio = jnp.where(mask, log_probs - jax.lax.stop_gradient(old_log_probs), 0.0)
    a_t = jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
    ratio = jnp.exp(log_ratio)
    used = ratio
    if truncate:
        excess = jnp.maximum(log_ratio - jnp.log(truncate), 0.0)
        used = jnp.exp(log_ratio - jax.lax.stop_gradient(excess))
    plain = -used * a_t
    clipped = -jnp.clip(used, 1.0 - clip, 1.0 + clip) * a_t
    k3 = jnp.expm1(log_ratio) - log_ratio
    stats = PolicyStats(
        clipped=jnp.sum((clipped > plain).astype(ratio.dtype)),
        ratio=jnp.sum(jnp.where(mask, ratio, 0.0)),
        ratio_squared=jnp.sum(jnp.where(mask, jnp.square(ratio), 0.0)),
        approx_kl=jnp.sum(k3),
    )
    return jnp.sum(jnp.maximum(plain, clipped)), jax.lax.stop_gradient(stats)


def effective_share(ratio: float, ratio_squared: float, count: float) -> float:
    """The effective sample size of importance weights, as a share of their number.

        ESS / n = (sum_t rho_t)^2 / (n sum_t rho_t^2)

    1 where all weights are equal (on policy), 1/n where one outweighs the others.  Source: Kong,
    "A note on importance sampling using standardized weights" (1992).

    Args:
      ratio: sum_t rho_t.
      ratio_squared: sum_t rho_t^2.
      count: n.

    Returns:
      A share in [0, 1]; 0 if there is no weight.
    """
    return ratio * ratio / max(count * ratio_squared, 1e-30)


def clipped_value_loss(
    values: chex.Array,
    old_values: chex.Array,
    returns: chex.Array,
    mask: chex.Array,
    *,
    clip: float,
) -> chex.Array:
    """The squared error of the value, with its move from the old one clipped.

        V'_k = V_old + clip(V_k - V_old, -eps, eps)
        L = 1/2 sum_k max((V_k - G_k)^2, (V'_k - G_k)^2)

    Source: the PPO authors' code (openai/baselines, ppo2), as in TRL.

    Args:
      values: [...] V_k.
      old_values: [...] V_old, that the advantages were computed with.
      returns: [...] G_k = A_k + V_old, before whitening.
      mask: [...] 1 (or True) where a step is.
      clip: eps.

    Returns:
      The sum of the losses.
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    mask = mask.astype(bool)
    v, v_old, g = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
    v_old, g = jax.lax.stop_gradient((v_old, g))
    moved = v_old + jnp.clip(v - v_old, -clip, clip)
    return 0.5 * jnp.sum(jnp.maximum(jnp.square(v - g), jnp.square(moved - g)))


def k3_kl(log_probs: chex.Array, ref_log_probs: chex.Array, mask: chex.Array) -> chex.Array:
    """An estimate of KL(pi || pi_ref) from tokens that pi drew; never negative.

        k3 = pi_ref / pi - 1 - log(pi_ref / pi)

    Source: J. Schulman, "Approximating KL divergence" (2020),
    http://joschu.net/blog/kl-approx.html.

    Args:
      log_probs: [...] log pi(a_t) of the current policy.
      ref_log_probs: [...] log pi_ref(a_t).
      mask: [...] 1 (or True) where a policy token is.

    Returns:
      The sum over the mask, in nats.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs, mask])
    ref = jax.lax.stop_gradient(ref_log_probs)
    log_ratio = jnp.where(mask.astype(bool), ref - log_probs, 0.0)
    return jnp.sum(jnp.expm1(log_ratio) - log_ratio)


def entropy(logits: chex.Array, mask: chex.Array) -> chex.Array:
    """The entropy of the policy at each token.

        H = - sum_t sum_a pi(a) log pi(a),   pi = softmax(logits)

    Args:
      logits: [..., V], already divided by the temperature.
      mask: [...] 1 (or True) where a policy token is.

    Returns:
      The sum over the mask, in nats.
    """
    chex.assert_equal_shape_prefix([logits, mask], mask.ndim)
    chex.assert_rank(logits, mask.ndim + 1)
    log_pi = jax.nn.log_softmax(jnp.where(mask.astype(bool)[..., None], logits, 0.0))
    # 0 log 0 = 0, in the gradient too: a token that is ruled out has log-probability -inf.
    terms = jnp.exp(log_pi) * jnp.where(jnp.isneginf(log_pi), 0.0, log_pi)
    return -jnp.sum(jnp.where(mask.astype(bool), jnp.sum(terms, axis=-1), 0.0))


def nll(log_probs: chex.Array, mask: chex.Array) -> chex.Array:
    """The negative log-likelihood of tokens.

        L = - sum_t log pi(a_t)

    Args:
      log_probs: [...] log pi(a_t).
      mask: [...] 1 (or True) where a token counts.

    Returns:
      The sum over the mask, in nats.
    """
    chex.assert_equal_shape([log_probs, mask])
    return -jnp.sum(jnp.where(mask.astype(bool), log_probs, 0.0))


def adapted_kl_coef(
    coefficient: float, kl: float, *, target: float, episodes: int, horizon: float
) -> float:
    """The next update's weight of the KL.

        c' = c (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)

    Source: the adaptive controller of arXiv 1909.08593, section 2.2, as TRL and SPA-RL's released
    trainer compute it.

    Args:
      coefficient: c, of this update.
      kl: the mean over its episodes of log pi - log pi_ref, summed over their tokens, in nats.
      target: what the KL should be.
      episodes: n, of this update.
      horizon: episodes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)
