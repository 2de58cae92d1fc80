"""Behaviour cloning: the negative log-likelihood of the expert's tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spa_jax.batching import PackedRows
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.rl import losses
from spa_jax.training import forward
from spa_jax.training.state import Counts, LossFn, Sums


def sft_loss(
    config: ModelConfig, params: Params, rows: PackedRows, counts: Counts
) -> tuple[jax.Array, Sums]:
    """L = - sum_t log pi(a_t) / (number of policy tokens of the update).

    Args:
      config: the model's shape.
      params: {"policy": decoder}.
      rows: packed demonstrations.
      counts: "tokens", the update's global count of policy tokens.

    Returns:
      The loss of these rows and the sum "nll".
    """
    hidden = forward.rows_hidden(config, params["policy"], rows)
    logits = forward.policy_logits(params["policy"], hidden, rows, 1.0)
    nll = losses.nll(forward.log_probs_of(logits, rows.targets), rows.token_mask)
    return nll / counts["tokens"], {"nll": nll}


def make_loss(config: ModelConfig) -> LossFn:
    """The loss of a model of this shape."""
    return functools.partial(sft_loss, config)


def make_nll(config: ModelConfig) -> Callable[[Params, PackedRows], jax.Array]:
    """The negative log-likelihood of rows, summed over their policy tokens, in nats."""

    def nll(params: Params, rows: PackedRows) -> jax.Array:
        return sft_loss(config, params, rows, {"tokens": jnp.float32(1)})[0]

    return nll
