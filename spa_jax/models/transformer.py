"""A decoder of the Llama kind in Flax Linen: one module, a frozen config, plain pytrees.

Llama, SmolLM2, Mistral, Qwen2 and Qwen3 are the same layers with another `ModelConfig`.

The parameter tree holds the layers stacked on a leading axis, so that training
scans over them (one layer is compiled, not thirty):

    embed/embedding  [V, D]
    layers/          every leaf [N, ...]: attn_norm/scale [D], q/kernel [D, H*K],
                     k/kernel [D, G*K], v/kernel [D, G*K], o/kernel [H*K, D],
                     mlp_norm/scale [D], gate/kernel [D, F], up/kernel [D, F],
                     down/kernel [F, D]; q/bias [H*K], k/bias [G*K], v/bias [G*K] with
                     `qkv_bias`; q_norm/scale [K], k_norm/scale [K] with `qk_norm`
    norm/scale       [D]
    unembed/kernel   [D, V], absent when the embeddings are tied

N layers, D hidden, H query heads, G key/value heads, K head size, F feed-forward,
V vocabulary, B rows, T tokens, C cache length.

Two ways in: `hidden_states` over packed rows (training) and `cached_hidden_states`
over new tokens of conversations whose past is in a key/value cache (sampling).  Both
run the same `Block`.

Activations are of `config.compute.compute_dtype`, and a weight is cast to it where it is
used: nothing but one layer's weights exists twice.  Sums are float32 in norms, scores and
logits.  With --matmul_dtype=bfloat16 the factors of a layer's products are rounded, and nothing
else is.
"""

import functools
from typing import cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from spa_jax.batching import SHARED
from spa_jax.models import axes, tree
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.kernels import attention, products
from spa_jax.models.kernels.attention import CacheOrder, LayerCache
from spa_jax.models.layers import Block, RMSNorm

# What a rematerialised layer keeps: `--remat` -> the names in `Block`.
_SAVED = {
    "layer": (),
    "attention": ("attention",),
    "dots": ("q", "k", "v", "attention", "o", "gate", "up", "rounded down"),
}


class Decoder(nn.Module):
    """Tokens in, last hidden states out; the layers are scanned.

    Attributes:
      config: the model's shape.
      first: the layers below this one have run: their output comes in, instead of tokens.
      last: the layers from this one on, and the norm, are left out; None: all run.
    """

    config: ModelConfig
    first: int = 0
    last: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        c = self.config
        if not self.first:
            x = nn.Embed(c.vocab_size, c.hidden_size, name="embed")(x).astype(c.dtype)
        layers = nn.scan(
            _block(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=(c.num_layers if self.last is None else self.last) - self.first,
        )(c, name="layers")
        by_segment = attention.reads_segments(c.compute.attention)
        x, _ = layers(x, positions, segment_ids if by_segment else packed_mask(segment_ids))
        if self.last is not None:
            return x
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        if not c.tie_embeddings and self.is_initializing():
            # Only made here: `logits` projects the few positions that need it.
            nn.Dense(c.vocab_size, use_bias=False, name="unembed")(x)
        return x


def _block(config: ModelConfig) -> type[nn.Module]:
    """The layer that is scanned in training; it keeps what `--remat` says."""
    remat, block = config.compute.remat, Block
    if axes.is_gathering():
        # Inside what is done again in the backward pass: no whole layer is kept for it.
        whole = functools.partial(axes.gather, dtype=config.dtype)
        block = nn.map_variables(Block, "params", trans_in_fn=whole)
    if remat == "none":
        return block
    policy = jax.checkpoint_policies.save_only_these_names(*_SAVED[remat])
    # Inside a scan nothing can be taken for common with the forward pass.
    return nn.remat(block, prevent_cse=False, policy=policy)


def packed_mask(segment_ids: jax.Array) -> jax.Array:
    """Causal attention that stays inside a packed trajectory and its row's shared prefix.

        segment_ids  -1 1 1 2 2 2 0     (0 = padding, -1 = shared prefix)
        token 4 sees -1     2 2         (the prefix, and its own trajectory up to itself)

    Args:
      segment_ids: [B, T] int.

    Returns:
      [B, T, T] bool.
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    keys = segment_ids[:, None, :]
    return causal & ((segment_ids[:, :, None] == keys) | (keys == SHARED))


@functools.partial(jax.jit, static_argnames="config")
def init(config: ModelConfig, key: chex.PRNGKey) -> Params:
    """Random parameters of the documented tree (for tests and tiny models)."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return Decoder(config).init(key, ids, ids, ids)["params"]


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    lower_states: jax.Array | None = None,
) -> jax.Array:
    """Last hidden states, after the final norm, of packed rows.

    Args:
      config: the model's shape.
      params: the tree above; with `lower_states`, its top layers are enough (see `tree.split`).
      tokens: [B, T] int.
      positions: [B, T] int, from 0 in each packed trajectory.
      segment_ids: [B, T] int, 0 = padding, -1 = a prefix that all of the row's segments see.
      lower_states: [B, T, D] what `lower_states` made of the tokens, so that only the layers of
        `params` run.

    Returns:
      [B, T, D].
    """
    chex.assert_equal_shape([tokens, positions, segment_ids])
    if lower_states is None:
        hidden = Decoder(config).apply({"params": params}, tokens, positions, segment_ids)
    else:
        top = Decoder(config, first=config.num_layers - tree.depth(params))
        parts = {name: params[name] for name in ("layers", "norm")}
        hidden = top.apply({"params": parts}, lower_states, positions, segment_ids)
    return cast(jax.Array, hidden)


def lower_states(
    config: ModelConfig,
    frozen: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """[B, T, D] the output of the lowest layers: those that `tree.split` froze."""
    parts = {name: frozen[name] for name in ("embed", "layers")}
    lowest = Decoder(config, last=tree.depth(frozen))
    return cast(jax.Array, lowest.apply({"params": parts}, tokens, positions, segment_ids))


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Vocabulary logits [..., V] float32 of hidden states [..., D]; products in their dtype."""
    float32 = jnp.float32
    if "unembed" in params:
        kernel = params["unembed"]["kernel"].astype(hidden.dtype)
        return jnp.dot(hidden, kernel, preferred_element_type=float32)
    table = params["embed"]["embedding"].astype(hidden.dtype)
    if hidden.ndim == 2:  # a token of every slot
        return products.matmul_transposed(hidden, table, float32)
    return jnp.dot(hidden, table.T, preferred_element_type=float32)


def empty_cache(
    config: ModelConfig, rows: int, length: int, dtype: jax.typing.DTypeLike | None = None
) -> list[LayerCache]:
    """A cache of zeros: a (keys [B, G, K, C], values [B, G, C, K]) pair a layer.

    `dtype`: None for that of activations.
    """
    dtype = dtype or config.dtype
    keys = (rows, config.num_kv_heads, config.head_dim, length)
    values = (rows, config.num_kv_heads, length, config.head_dim)
    return [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(config.num_layers)]


def cached_hidden_states(
    config: ModelConfig,
    layers_params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: list[LayerCache],
    *,
    rows: jax.Array | None = None,
    order: CacheOrder | None = None,
    places: int | None = None,
) -> tuple[jax.Array, list[LayerCache]]:
    """Hidden states of new tokens, each row at its own place in its conversation.

    The cache slot of a token is its position, so rows of different lengths share one
    array; a position >= C (padding of a chunk) writes nothing:

        cache length C = 8, row with 3 tokens so far, chunk of 4 with 2 real tokens
        positions  3  4  8  8
        writes     ^  ^  (dropped)

    Args:
      config: the model's shape.
      layers_params: the tree of `tree.unstack`.
      tokens: [B, T] int.
      positions: [B, T] int.
      cache: the past, from `empty_cache`; every slot below a position must be filled.
      rows: [B] int, the row of the cache that each row of tokens continues; several may
        continue the same one at other positions, and see each other.  One beyond the cache
        writes nothing (padding).  None: row i continues row i.
      order: of the cache's axes in memory, where it is known; it changes no result.
      places: only the first of the cache are read: no real position is beyond them.  None: all.

    Returns:
      [B, T, D] after the final norm (rows of padding hold garbage), and the new cache.
    """
    chex.assert_equal_shape([tokens, positions])
    x = layers_params["embed"]["embedding"][tokens].astype(config.dtype)
    mask = jnp.arange(places or cache[0][1].shape[2]) <= positions[:, :, None]
    block = Block(config)
    new_cache = []
    for layer, past in zip(layers_params["layers"], cache, strict=True):
        x, past = cast(
            tuple,
            block.apply({"params": layer}, x, positions, mask, past, rows=rows, order=order),
        )
        new_cache.append(past)
    norm = RMSNorm(config.rms_norm_eps)
    return cast(jax.Array, norm.apply({"params": layers_params["norm"]}, x)), new_cache
