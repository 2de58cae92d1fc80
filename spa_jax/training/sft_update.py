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
      below: [R, L, D] what frozen layers made of them; None if all layers are trained.
    """

    rows: PackedRows
    below: chex.Array | None = None


def sft_loss(
    config: ModelConfig, params: Params, frozen: Params, batch: SftBatch, counts: Counts
) -> tuple[jax.Array, Sums]:
    """L = - sum_t log pi(a_t) / (number of policy tokens of the update).

    Args:
      config: the model's shape.
      params: {"policy": decoder}, or what is trained of it.
      frozen: {"policy": the rest} or {}.
      batch: packed demonstrations.
      counts: "tokens", the update's global count of policy tokens.

    Returns:
      The loss of these rows and the sum "nll".
    """
    rows, policy = batch.rows, forward.whole(params, frozen)
    hidden = forward.rows_hidden(config, policy, rows, batch.below)
    log_probs, _ = forward.policy_terms(config, policy, hidden, rows, 1.0)
    nll = losses.nll(log_probs, rows.token_mask)
    return nll / counts["tokens"], {"nll": nll}


def make_loss(config: ModelConfig) -> LossFn:
    """The loss of a model of this shape."""
    return functools.partial(sft_loss, config)


def make_nll(config: ModelConfig) -> Callable[[Params, Params, SftBatch], jax.Array]:
    """The negative log-likelihood of a batch, summed over its policy tokens, in nats."""

    def nll(params: Params, frozen: Params, batch: SftBatch) -> jax.Array:
        return sft_loss(config, params, frozen, batch, {"tokens": jnp.float32(1)})[0]

    return nll
