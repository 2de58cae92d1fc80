"""Behaviour cloning: the negative log-likelihood of the expert's tokens."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.batching import PackedRows
from spa_jax.models.config import ModelConfig, Params
from spa_jax.rl import losses
from spa_jax.training import forward
from spa_jax.training.state import Counts, LossFn, Sums


@struct.dataclass
class SftBatch:
    """Packed demonstrations.

    Attributes:
      rows: the rows.
      lower_states: [R, L, D] their hidden states after the frozen layers; None if all layers are
        trained.
    """

    rows: PackedRows
    lower_states: chex.Array | None = None


def sft_loss(
    params: Params, frozen: Params, batch: SftBatch, counts: Counts, *, config: ModelConfig
) -> tuple[jax.Array, Sums]:
    """L = - sum_t log pi(a_t) / (number of policy tokens of the update).

    Args:
      params: {"policy": decoder}, or what is trained of it.
      frozen: {"policy": the rest} or {}.
      batch: packed demonstrations.
      counts: "tokens", the update's global count of policy tokens.
      config: the model's shape.

    Returns:
      The loss of these rows and the sum "nll".
    """
    rows, policy = batch.rows, forward.with_frozen(config, params, frozen)
    hidden = forward.rows_hidden(config, policy, rows, batch.lower_states)
    log_probs, _ = forward.policy_terms(config, policy, hidden, rows, 1.0)
    nll = losses.nll(log_probs, rows.token_mask)
    return nll / counts["tokens"], {"nll": nll}


def make_loss(config: ModelConfig) -> LossFn:
    """The loss of a model of this shape."""
    return functools.partial(sft_loss, config=config)


def make_nll(config: ModelConfig) -> Callable[[Params, Params, SftBatch], jax.Array]:
    """The negative log-likelihood of a batch, summed over its policy tokens, in nats."""

    def nll(params: Params, frozen: Params, batch: SftBatch) -> jax.Array:
        return sft_loss(params, frozen, batch, {"tokens": jnp.float32(1)}, config=config)[0]

    return nll
