"""The update of the policy: clipped policy loss, value loss of a critic, KL and entropy."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.batching import PackedRows
from spa_jax.models import heads
from spa_jax.models.config import ModelConfig, Params
from spa_jax.rl import gagpo, losses, objectives, ragen
from spa_jax.stage_config import PpoConfig
from spa_jax.training import forward
from spa_jax.training.state import Counts, LossFn, Sums


@struct.dataclass
class PpoBatch:
    """Packed rows with what the objective made of them; K = P with `gae=token`, else S.

    Attributes:
      rows: the packed trajectories; `rows.log_probs` are the behaviour policy's.
      advantages: [R, K], whitened over the update if the objective whitens.
      returns: [R, K], before whitening.
      old_values: [R, K], those that the advantages were computed with; 0 without a critic.
      lower_states: [R, L, D] the rows' hidden states after the frozen layers; None if all layers
        are trained.
    """

    rows: PackedRows
    advantages: chex.Array
    returns: chex.Array
    old_values: chex.Array
    lower_states: chex.Array | None = None


def ppo_loss(
    params: Params,
    frozen: Params,
    batch: PpoBatch,
    counts: Counts,
    *,
    config: ModelConfig,
    ppo: PpoConfig,
    temperature: float,
) -> tuple[jax.Array, Sums]:
    """L = policy + c_v value + c_kl KL(pi || ref) - c_h entropy, each over its global count.

    The tokens of a step share its advantage (with `gae=token` each has its own).  Source: PPO,
    arXiv 1707.06347, equation 9, with the definitions of SPA-RL, arXiv 2505.20732.  The KL is a
    loss term (k3) unless `kl=reward` has put it into the returns; without a critic there is no
    value term.

    Args:
      params: {"policy": decoder, or what is trained of it, "value": head, if it is a critic}.
      frozen: {"policy": the rest} or {}.
      batch: the rows and their advantages.
      counts: "tokens" and "steps" of the whole update.
      config: the model's shape.
      ppo: the objective and the coefficients.
      temperature: that of sampling.

    Returns:
      The loss of these rows, and sums over tokens or steps.
    """
    rows, policy = batch.rows, forward.with_frozen(config, params, frozen)
    hidden = forward.rows_hidden(config, policy, rows, batch.lower_states)
    log_probs, entropy = forward.policy_terms(
        config, policy, hidden, rows, temperature, with_entropy=True
    )
    by_token = ppo.gae == "token"
    advantages = batch.advantages
    if not by_token:
        advantages = jnp.take_along_axis(advantages, rows.token_step, 1)
    surrogate, stats = _policy_loss(log_probs, advantages, rows, ppo)
    kl = losses.k3_kl(log_probs, rows.ref_log_probs, rows.token_mask)
    if not ppo.entropy_coef:
        # Else its gradient over the vocabulary would be computed, and multiplied by 0.
        entropy = jax.lax.stop_gradient(entropy)
    sums = {"policy_loss": surrogate, "kl": kl, "entropy": entropy, **stats._asdict()}
    loss = surrogate / counts["tokens"]
    if objectives.OBJECTIVES[ppo.objective].critic and ppo.critic == "head":
        index, mask, count = (
            (rows.token_index, rows.token_mask, "tokens")
            if by_token
            else (rows.value_index, rows.step_mask, "steps")
        )
        values = heads.read(params["value"], forward.at(hidden, index))
        value = losses.clipped_value_loss(
            values, batch.old_values, batch.returns, mask, clip=ppo.value_clip
        )
        loss = loss + ppo.value_coef * value / counts[count]
        sums["value_loss"] = value
    if ppo.kl == "loss":
        loss = loss + ppo.kl_coef * kl / counts["tokens"]
    loss = loss - ppo.entropy_coef * entropy / counts["tokens"]
    return loss, jax.lax.stop_gradient(sums)


def _policy_loss(
    log_probs: jax.Array, advantages: jax.Array, rows: PackedRows, ppo: PpoConfig
) -> tuple[jax.Array, losses.PolicyStats]:
    """The clipped loss of policy tokens [R, P], as the objective weighs and clips them."""
    if ppo.objective == "gagpo":  # an action has one ratio
        ratio = gagpo.action_log_ratio(
            log_probs - rows.log_probs,
            rows.token_step,
            rows.token_mask,
            steps=rows.step_mask.shape[1],
        )
        log_probs = ratio + rows.log_probs
    loss = ragen.clip_higher_policy_loss if ppo.objective == "ragen" else losses.clipped_policy_loss
    return loss(
        log_probs,
        rows.log_probs,
        advantages,
        rows.token_mask,
        clip=ppo.clip,
        truncate=ppo.truncate_ratio,
    )


def make_loss(config: ModelConfig, ppo: PpoConfig, temperature: float) -> LossFn:
    """The loss of a model of this shape."""
    return functools.partial(ppo_loss, config=config, ppo=ppo, temperature=temperature)


def make_log_probs(config: ModelConfig, temperature: float) -> Callable[..., jax.Array]:
    """(params, frozen, rows, lower_states) -> [R, P] log-probabilities, as in the loss."""

    def log_probs(
        params: Params, frozen: Params, rows: PackedRows, lower_states: jax.Array | None
    ) -> jax.Array:
        policy = forward.with_frozen(config, params, frozen)
        hidden = forward.rows_hidden(config, policy, rows, lower_states)
        return forward.policy_terms(config, policy, hidden, rows, temperature)[0]

    return log_probs


def make_token_values(config: ModelConfig) -> Callable[..., jax.Array]:
    """(params, frozen, rows, lower_states) -> [R, P] values before policy tokens (`gae=token`)."""

    def values(
        params: Params, frozen: Params, rows: PackedRows, lower_states: jax.Array | None
    ) -> jax.Array:
        policy = forward.with_frozen(config, params, frozen)
        hidden = forward.rows_hidden(config, policy, rows, lower_states)
        return heads.read(params["value"], forward.at(hidden, rows.token_index))

    return values
