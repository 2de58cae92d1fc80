"""The layers of a decoder.

B rows, T tokens, D hidden, H query heads, G key/value heads, K head size, C cache length.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spa_jax.models.config import ModelConfig
from spa_jax.models.kernels import attention, products
from spa_jax.models.kernels.attention import CacheOrder, LayerCache


class Linear(nn.Module):
    """x W + b, of a kernel [n, m] in training and of its transpose [m, n] in sampling.

    `tree.unstack` transposes; `products.matmul_transposed` says what for.

    Attributes:
      features: m.
      use_bias: whether there is a b.
      dtype: that of the product's factors; None: x's.
    """

    features: int
    use_bias: bool = False
    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "transposed"):
            dtype = self.dtype or x.dtype
            w: jax.Array = self.get_variable("params", "transposed")
            y = products.matmul_transposed(x.astype(dtype), w.astype(dtype), x.dtype)
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            y = products.matmul(x, kernel, self.dtype, self.name or "")
        if self.has_variable("params", "lora_a"):  # put there by `lora.attach`
            a: jax.Array = self.get_variable("params", "lora_a")
            b: jax.Array = self.get_variable("params", "lora_b")
            y = y + products.matmul(products.matmul(x, a), b)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return products.rms_norm(x, scale, self.eps)


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """[K/2] float32 angles a position: theta^(-2i/K), stretched as `RopeScaling` says.

    Source: arXiv 2104.09864; the stretch is that of Llama 3.1, arXiv 2407.21783, as
    transformers' rope type "llama3" computes it.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is None:
        return frequency
    c = config.rope_scaling
    turns = c.original_max_position * frequency / (2 * jnp.pi)  # within the original context
    unscaled = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    unscaled = jnp.clip(unscaled, 0.0, 1.0)
    return frequency * (unscaled + (1 - unscaled) / c.factor)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary position embedding, arXiv 2104.09864, in the half-split layout.

    Args:
      x: [B, T, heads, K] float.
      positions: [B, T] int.
      frequencies: [K/2] w of `rope_frequencies`.

    Returns:
      [B, T, heads, K]: the pairs (x_i, x_{i+K/2}) turned by position * w_i.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


class Block(nn.Module):
    """One decoder layer.  With a cache, new keys and values go to slot = position.

    Attributes:
      config: the model's shape.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        seen: jax.Array,
        cache: LayerCache | None = None,
        rows: jax.Array | None = None,
        *,
        order: CacheOrder | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Applies the layer.

        Args:
          x: [B, T, D].
          positions: [B, T] int.
          seen: [B, T, T] bool, True where a query may see a key, or [B, T, L] of the first places
            of a cache; with splash and native attention [B, T] int, the segments.
          cache: keys and values so far; a position >= C writes nothing.
          rows: [B] int, the cache's row of each row of x, as in `cached_hidden_states`.
          order: of the cache, as in `cached_hidden_states`.

        Returns:
          [B, T, D] and the cache with the new tokens in it (None without one).
        """
        c = self.config
        q, k, v = self._queries_keys_values(x, positions)
        if cache is None:
            out = self.attend(q, k, v, seen)
        else:
            at = jnp.arange(x.shape[0]) if rows is None else rows
            cache = attention.write(cache, k, v, positions, at)
            kernel = c.compute.attention
            out = attention.cached(
                kernel, q, cache, positions=positions, seen=seen, rows=rows, order=order
            )
        x = x + self._linear(out.reshape(*x.shape[:2], -1), "o", c.hidden_size)
        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        gate = self._linear(h, "gate", c.intermediate_size)
        up = self._linear(h, "up", c.intermediate_size)
        return x + self._linear(nn.silu(gate) * up, "down", c.hidden_size), cache

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        """Attention without a cache, by --attention; [B, T, H, K], as `attention.packed`."""
        return attention.packed(self.config.compute.attention, q, k, v, seen)

    def _queries_keys_values(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated q [B, T, H, K] and k [B, T, G, K], and v [B, T, G, K], of x [B, T, D]."""
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        q = self._heads(h, "q", c.num_heads)
        k = self._heads(h, "k", c.num_kv_heads)
        v = self._heads(h, "v", c.num_kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        frequencies = rope_frequencies(c)
        return rotate(q, positions, frequencies), rotate(k, positions, frequencies), v

    def _linear(self, x: jax.Array, name: str, features: int, use_bias: bool = False) -> jax.Array:
        """A product under a name that a `--remat` policy knows."""
        linear = Linear(features, use_bias, self.config.matmul_dtype, name=name)
        return checkpoint_name(linear(x), name)

    def _heads(self, h: jax.Array, name: str, heads: int) -> jax.Array:
        """[B, T, D] -> [B, T, heads, K]."""
        y = self._linear(h, name, heads * self.config.head_dim, self.config.qkv_bias)
        return y.reshape(*h.shape[:2], heads, self.config.head_dim)
