"""A Llama-style decoder in Flax Linen: one module, a frozen config, plain pytrees.

The parameter tree holds the layers stacked on a leading axis, so that training
scans over them (one layer is compiled, not thirty):

    embed      [V, D]
    layers     every leaf [N, ...]: attn_norm [D], q [D, H*K], k [D, G*K], v [D, G*K],
               o [H*K, D], mlp_norm [D], gate [D, F], up [D, F], down [F, D]
    norm       [D]
    unembed    [D, V], absent when the embeddings are tied

N layers, D hidden, H query heads, G key/value heads, K head size, F feed-forward,
V vocabulary, B rows, T tokens, C cache slots.
"""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

Params = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; names are ours, `weights.py` maps Hugging Face's."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_position: int = 8192


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)
