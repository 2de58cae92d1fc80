"""The decoder over rows that are padded, as Hugging Face's models read a batch.

Training packs rows (`transformer.hidden_states`); this is the other layout, one conversation a
row with an attention mask, in which other programs' numbers are recorded.  The layers are
`transformer.Block`.
"""

from typing import cast

import chex
import jax
import jax.numpy as jnp

from spa_jax.models import transformer
from spa_jax.models.transformer import Block, ModelConfig, Params, RMSNorm


def hidden_states(
    config: ModelConfig, params: Params, tokens: chex.Array, attention_mask: chex.Array
) -> jax.Array:
    """Last hidden states, after the final norm, at every column, padding included.

        attention_mask   1 1 1 0 0       column 4 sees columns 0, 1, 2: no padding, not itself

    Columns are positions, wherever the padding lies.  A column that sees nothing (padding on the
    left) attends to all columns alike, as a softmax over equal scores does.

    Args:
      config: the model's shape.
      params: the tree of `models.transformer`.
      tokens: [B, T] int.
      attention_mask: [B, T] 1 where a token is.

    Returns:
      [B, T, D].
    """
    chex.assert_rank([tokens, attention_mask], 2)
    chex.assert_equal_shape([tokens, attention_mask])
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & (jnp.asarray(attention_mask)[:, None, :] != 0)
    # With a cache, that starts empty, a block takes any mask; without one, causal ones only.
    cache = transformer.empty_cache(config, rows, length)[0]
    block = Block(config)

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        x, _ = block.apply({"params": weights}, x, positions, mask, cache)
        return x, None

    embedded = jnp.take(jnp.asarray(params["embed"]["embedding"]), tokens, axis=0)
    x, _ = jax.lax.scan(layer, embedded, params["layers"])
    return cast(jax.Array, RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x))


def logits(
    config: ModelConfig, params: Params, tokens: chex.Array, attention_mask: chex.Array
) -> jax.Array:
    """[B, T, V] float32 logits of padded rows; arguments as `hidden_states`."""
    return transformer.logits(params, hidden_states(config, params, tokens, attention_mask))
