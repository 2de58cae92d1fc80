"""The PPO update with one advantage and one value an environment step."""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.batching import PackedRows
from spa_jax.config import PpoConfig
from spa_jax.models import heads
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.rl import losses
from spa_jax.training import forward
from spa_jax.training.state import Counts, LossFn, Sums


@struct.dataclass
class PpoBatch:
    """Packed rows with what GAE made of them.

    Attributes:
      rows: the packed trajectories; `rows.log_probs` are the behaviour policy's.
      advantages: [R, S], whitened over the update's steps.
      returns: [R, S], before whitening.
      old_values: [R, S], those that the advantages were computed with.
      below: [R, L, D] what frozen layers made of the rows; None if all layers are trained.
    """

    rows: PackedRows
    advantages: chex.Array
    returns: chex.Array
    old_values: chex.Array
    below: chex.Array | None = None


def ppo_loss(
    config: ModelConfig,
    ppo: PpoConfig,
    temperature: float,
    params: Params,
    frozen: Params,
    batch: PpoBatch,
    counts: Counts,
) -> tuple[jax.Array, Sums]:
    """L = policy + c_v value + c_kl KL(pi || ref) - c_h entropy, each over its global count.

    The tokens of a step share its advantage.  Source: PPO, arXiv 1707.06347, equation 9, with
    the definitions of SPA-RL, arXiv 2505.20732; the KL is a loss term (k3).

    Args:
      config: the model's shape.
      ppo: the coefficients.
      temperature: that of sampling.
      params: {"policy": decoder, or what is trained of it, "value": head}.
      frozen: {"policy": the rest} or {}.
      batch: the rows and their advantages.
      counts: "tokens" and "steps" of the whole update.

    Returns:
      The loss of these rows, and sums over tokens or steps.
    """
    rows, whole = batch.rows, forward.whole(params, frozen)
    hidden = forward.rows_hidden(config, whole, rows, batch.below)
    logits = forward.policy_logits(whole, hidden, rows, temperature)
    log_probs = forward.log_probs_of(logits, rows.targets)
    advantages = jnp.take_along_axis(batch.advantages, rows.token_step, 1)
    policy, stats = losses.clipped_policy_loss(
        log_probs, rows.log_probs, advantages, rows.token_mask, clip=ppo.clip
    )
    values = heads.value(params["value"], forward.at(hidden, rows.value_index))
    value = losses.clipped_value_loss(
        values, batch.old_values, batch.returns, rows.step_mask, clip=ppo.value_clip
    )
    kl = losses.k3_kl(log_probs, rows.ref_log_probs, rows.token_mask)
    entropy = losses.entropy(logits, rows.token_mask)
    loss = (
        policy / counts["tokens"]
        + ppo.value_coef * value / counts["steps"]
        + ppo.kl_coef * kl / counts["tokens"]
        - ppo.entropy_coef * entropy / counts["tokens"]
    )
    sums = {
        "policy_loss": policy,
        "value_loss": value,
        "kl": kl,
        "entropy": entropy,
        "clipped": stats.clipped,
        "ratio": stats.ratio,
        "approx_kl": stats.approx_kl,
    }
    return loss, jax.lax.stop_gradient(sums)


def make_loss(config: ModelConfig, ppo: PpoConfig, temperature: float) -> LossFn:
    """The loss of a model of this shape."""
    return functools.partial(ppo_loss, config, ppo, temperature)
