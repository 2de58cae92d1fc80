"""The decoder over rows that are padded, as Hugging Face's models read a batch.

Training packs rows (`transformer.hidden_states`); this is the other layout, one conversation a
row with an attention mask, in which other programs' numbers are recorded.  The layers are
`layers.Block`.
"""

from typing import cast

import chex
import jax
import jax.numpy as jnp

from spa_jax.models import transformer
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.kernels import attention, xla
from spa_jax.models.layers import Block, RMSNorm


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`xla.attend` as PyTorch's CPU kernel computes it, its gradient included.

    Masked scores have the lowest float added to them, s + m = m, and the backward pass makes the
    weights anew from the sum that the forward pass kept:

        lse = max_c s_c + log sum_c exp(s_c - max s),    p_c = exp(s_c - lse)

    They are the softmax, but for a query that sees nothing: all its scores are m, the log of their
    number is lost in m, and p_c is 1 for each of T columns, not 1/T.  The released code has
    such queries where it pads on the left, and puts losses on them.

    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp of PyTorch 2.3 and later.

    Args:
      q: [B, G, R, T, K].
      k: [B, G, K, C], transposed.
      v: [B, G, C, K].
      mask: [B, T, C] bool.

    Returns:
      [B, G, R, T, K].
    """
    return _attend(q, k, v, mask)[0]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    return xla.scores_of(q, k) + jnp.where(mask[:, None, None], 0.0, jnp.finfo(q.dtype).min)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, log_sums = xla.weigh(_scores(q, k, mask), v)
    return out, (q, k, v, mask, out, log_sums)


def _attend_backward(
    saved: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, log_sums = saved
    scores = _scores(q, k, mask)
    gradients = xla.weigh_backward(q, k, v, scores, log_sums=log_sums, out=out, d_out=g)
    return (*gradients, None)


attend.defvjp(_attend, _attend_backward)


class _Block(Block):
    """The decoder's layer with `attend` for its attention; `seen` is any mask [B, T, T]."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        k_BGKT, v_BGTK = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
        return attention.ungroup(attend(attention.group(q, k.shape[2]), k_BGKT, v_BGTK, seen))


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: chex.Array,
    attention_mask: chex.Array,
    pad_id: int | None = None,
) -> jax.Array:
    """Last hidden states, after the final norm, at every column, padding included.

        attention_mask   1 1 1 0 0       column 4 sees columns 0, 1, 2: no padding, not itself

    Columns are positions, wherever the padding lies.  A column that sees nothing (padding on the
    left) attends to all columns alike, as a softmax over equal scores does; see `attend`.

    Args:
      config: the model's shape.
      params: the tree of `models.transformer`.
      tokens: [B, T] int.
      attention_mask: [B, T] 1 where a token is.
      pad_id: the token whose embedding is not trained (PyTorch's `padding_idx`), if there is one.

    Returns:
      [B, T, D].
    """
    chex.assert_rank([tokens, attention_mask], 2)
    chex.assert_equal_shape([tokens, attention_mask])
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & (jnp.asarray(attention_mask)[:, None, :] != 0)
    block = _Block(config)

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        x, _ = block.apply({"params": weights}, x, positions, mask)
        return x, None

    embedded = jnp.take(jnp.asarray(params["embed"]["embedding"]), tokens, axis=0)
    if pad_id is not None:
        fixed = (jnp.asarray(tokens) == pad_id)[..., None]
        embedded = jnp.where(fixed, jax.lax.stop_gradient(embedded), embedded)
    x, _ = jax.lax.scan(layer, embedded, params["layers"])
    return cast(jax.Array, RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x))


def logits(
    config: ModelConfig,
    params: Params,
    tokens: chex.Array,
    attention_mask: chex.Array,
    pad_id: int | None = None,
) -> jax.Array:
    """[B, T, V] float32 logits of padded rows; arguments as `hidden_states`."""
    hidden = hidden_states(config, params, tokens, attention_mask, pad_id)
    return transformer.logits(params, hidden)
