"""What the updates read off packed rows: log-probabilities, values, hidden states."""

import jax
import jax.numpy as jnp

from spa_jax.batching import PackedRows
from spa_jax.models import heads, transformer
from spa_jax.models.transformer import ModelConfig, Params


def rows_hidden(
    config: ModelConfig, params: Params, rows: PackedRows, below: jax.Array | None = None
) -> jax.Array:
    """[R, L, D] last hidden states of packed rows; `below` as in `transformer.hidden_states`."""
    return transformer.hidden_states(
        config, params, rows.tokens, rows.positions, rows.segment_ids, below
    )


def rows_below(config: ModelConfig, frozen: Params, rows: PackedRows) -> jax.Array:
    """[R, L, D] what the frozen layers {"policy": ...} make of packed rows."""
    return transformer.states_below(
        config, frozen["policy"], rows.tokens, rows.positions, rows.segment_ids
    )


def whole(params: Params, frozen: Params) -> Params:
    """A policy's trained parameters, and those frozen ones that no trained one stands for."""
    return {**frozen.get("policy", {}), **params["policy"]}


def at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """[R, n, D]: the hidden states [R, L, D] at the columns [R, n]."""
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def policy_logits(
    params: Params, hidden: jax.Array, rows: PackedRows, temperature: float
) -> jax.Array:
    """[R, P, V] logits / temperature where a policy token is predicted, and nowhere else."""
    return transformer.logits(params, at(hidden, rows.token_index)) / temperature


def log_probs_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[R, P] log softmax(logits)[target] of logits [R, P, V] and targets [R, P]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def score(
    config: ModelConfig, params: Params, rows: PackedRows, *, temperature: float
) -> dict[str, jax.Array]:
    """One forward pass over data, without gradients.

    Args:
      config: the model's shape.
      params: {"policy": decoder, "value": head, optional}.
      rows: packed rows.
      temperature: the policy is softmax(logits / temperature).

    Returns:
      log_probs [R, P]; end_hidden [R, S, D] at each step's last token; value_hidden
      [R, S, D] and values [R, S] (0 without a value head) at the last context token before
      each step.
    """
    hidden = rows_hidden(config, params["policy"], rows)
    logits = policy_logits(params["policy"], hidden, rows, temperature)
    value_hidden = at(hidden, rows.value_index)
    values = jnp.zeros(rows.value_index.shape, jnp.float32)
    return {
        "log_probs": log_probs_of(logits, rows.targets),
        "end_hidden": at(hidden, rows.end_index),
        "value_hidden": value_hidden,
        "values": heads.value(params["value"], value_hidden) if "value" in params else values,
    }
