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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from spa_jax.batching import SHARED
from spa_jax.config import ComputeConfig
from spa_jax.errors import UserError
from spa_jax.models import attention, fused, native

Params = Any  # a pytree of arrays
# Keys [B, G, K, C] and values [B, G, C, K].  Keys lie transposed: on a CPU the scores of
# one new token are then a row-major product, ten times faster than the other layout.
LayerCache = tuple[jax.Array, jax.Array]

# What a rematerialised layer keeps: `--remat` -> the names in `Block`.
_KEPT = {"layer": (), "attention": ("attention",),
         "dots": ("q", "k", "v", "attention", "o", "gate", "up", "rounded down")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch the long wavelengths of their rotary embedding.

    Attributes:
      factor: wavelengths that are long become this many times longer.
      low_freq_factor: long is a wavelength above original_max_position / low_freq_factor.
      high_freq_factor: one below original_max_position / high_freq_factor stays as it is, and
        between the two the frequency is interpolated.
      original_max_position: the context length before the stretch, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; names are ours, `weights.py` maps Hugging Face's.

    Attributes:
      model_type: the family, by Hugging Face's name: llama, mistral, qwen2 or qwen3.
      qkv_bias: q, k and v have a bias (Qwen2).
      qk_norm: each head's query and key pass an RMSNorm before the rotation (Qwen3).
      rope_scaling: None: wavelengths as they are.
      max_position: tokens that the model was made for.
      sliding_window: tokens that a layer attends over (Mistral), 0 = all. It is not computed:
        within the window it makes no difference, and `check_length` refuses more.
      compute: how it is computed, `auto` resolved; no part of the shape.
    """

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
    model_type: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    compute: ComputeConfig = ComputeConfig(compute_dtype="float32")

    @property
    def dtype(self) -> str:
        """That of activations."""
        return self.compute.compute_dtype

    @property
    def matmul_dtype(self) -> str:
        """That of the factors of products with weights."""
        matmul_dtype = self.compute.matmul_dtype
        return self.dtype if matmul_dtype == "compute" else matmul_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w: jax.Array, dtype: str | None = None, name: str = "") -> jax.Array:
    """x [B, T, n] @ w [n, m] in x's dtype; the weight gradient is x^T g in w's layout and dtype.

    JAX's rule gives (g^T x)^T.  XLA then computes g transposed, with all of the activation's
    derivative fused into strided writes: on a CPU that fusion took longer than any product.

    Args:
      x: activations.
      w: a weight, cast.
      dtype: that of the factors of this product, and of those of its gradients; None: x's.
      name: what `_KEPT` may call x, if it is rounded.
    """
    return _matmul_forward(x, w, dtype, name)[0]


def _matmul_forward(
    x: jax.Array, w: jax.Array, dtype: str | None, name: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = x.astype(dtype or x.dtype)
    if rounded.dtype != x.dtype:
        rounded = checkpoint_name(rounded, f"rounded {name}")
    y = jnp.matmul(rounded, w.astype(rounded.dtype), preferred_element_type=x.dtype)
    return y, (rounded, w)


def _matmul_backward(
    dtype: str | None, name: str, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del name
    x, w = saved
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]).astype(x.dtype)
    # Of bfloat16 factors a float32 weight gets the float32 sum, not the rounded one.
    summed = jnp.promote_types(g.dtype, w.dtype)
    if x.dtype == g.dtype:
        contracted = (((0,), (0,)), ((), ()))
    else:
        # XLA has products of bfloat16 on a CPU, but none that transposes its factors.
        rows = with_layout_constraint(rows.T, Layout((0, 1)))
        contracted = (((1,), (0,)), ((), ()))
    dw = jax.lax.dot_general(rows, g_rows, contracted, preferred_element_type=summed)
    dx = jnp.matmul(g_rows, w.astype(x.dtype).T, preferred_element_type=g.dtype)
    return dx.reshape(x.shape), dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
    """x W + b, of a kernel [n, m] in training and of its transpose [m, n] in sampling.

    With the kernel transposed (`unstack`), 16 or 32 decoded tokens pass two matrices of 576 x 1536
    in 0.6 or 0.9 ms on two cores instead of 1.0 or 1.3: XLA packs the larger operand of a
    product anew for every call, and that one needs no packing.

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
            w: jax.Array = self.get_variable("params", "transposed").astype(dtype)
            rows, contracted = x.reshape(-1, x.shape[-1]).astype(dtype), (((1,), (1,)), ((), ()))
            y = jax.lax.dot_general(w, rows, contracted, preferred_element_type=x.dtype)
            # Else XLA turns the product round again.
            y = jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            y = matmul(x, kernel, self.dtype, self.name or "")
        if self.has_variable("params", "lora_a"):  # put there by `lora.attach`
            a: jax.Array = self.get_variable("params", "lora_a")
            b: jax.Array = self.get_variable("params", "lora_b")
            y = y + matmul(matmul(x, a), b)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32.

    On a matrix: XLA's sums over an axis of [1, T, D] take 20 to 60 times as long on a CPU as the
    same ones over a matrix's.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype).reshape(x.shape)


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
    kept = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return frequency * (kept + (1 - kept) / c.factor)


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
      cached_attention: in place of what --attention means where there is a cache.
    """

    config: ModelConfig
    cached_attention: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        seen: jax.Array,
        cache: LayerCache | None = None,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Applies the layer.

        Args:
          x: [B, T, D].
          positions: [B, T] int.
          seen: [B, T, T] bool, True where a query may see a key, or [B, T, C] with a cache; with
            splash and native attention [B, T] int, the segments.
          cache: keys and values so far; a position >= C writes nothing.
          rows: [B] int, the cache's row of each row of x, as in `cached_hidden_states`.

        Returns:
          [B, T, D] and the cache with the new tokens in it (None without one).
        """
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        q = self._heads(h, "q", c.num_heads)
        k = self._heads(h, "k", c.num_kv_heads)
        v = self._heads(h, "v", c.num_kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        frequencies = rope_frequencies(c)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        batch, length = x.shape[:2]
        if cache is None:
            out = self._attend_packed(q, k, v, seen)
        else:
            at = (jnp.arange(batch) if rows is None else rows)[:, None]
            k = cache[0].at[at, :, :, positions].set(k.astype(cache[0].dtype), mode="drop")
            v = cache[1].at[at, :, positions].set(v.astype(cache[1].dtype), mode="drop")
            cache = (k, v)
            if c.compute.attention == "native" and self.cached_attention is None:
                out = native.cached(q, k, v, positions, at[:, 0])
            else:
                if rows is not None:
                    k, v = k.at[rows].get(mode="clip"), v.at[rows].get(mode="clip")
                attend = self.cached_attention or attention.attend
                out = attend(self._grouped(q), k, v, seen).transpose(0, 3, 1, 2, 4)
        x = x + self._linear(out.reshape(batch, length, -1), "o", c.hidden_size)
        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        gate = self._linear(h, "gate", c.intermediate_size)
        up = self._linear(h, "up", c.intermediate_size)
        return x + self._linear(nn.silu(gate) * up, "down", c.hidden_size), cache

    def _attend_packed(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
    ) -> jax.Array:
        """Attention of packed rows, by --attention; [B, T, ...] with all heads behind T."""
        match self.config.compute.attention:
            case "cudnn":
                return checkpoint_name(fused.cudnn(q, k, v, seen), "attention")
            case "splash":
                return checkpoint_name(fused.splash(q, k, v, seen), "attention")
            case "native":
                return native.packed(q, k, v, seen)
        k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
        return attention.attend_causally(self._grouped(q), k, v, seen).transpose(0, 3, 1, 2, 4)

    def _grouped(self, q: jax.Array) -> jax.Array:
        """[B, T, H, K] -> [B, G, R, T, K]."""
        c = self.config
        grouped = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
        return grouped.transpose(0, 2, 3, 1, 4)

    def _linear(self, x: jax.Array, name: str, features: int, use_bias: bool = False) -> jax.Array:
        """A product under a name that `_KEPT` knows."""
        linear = Linear(features, use_bias, self.config.matmul_dtype, name=name)
        return checkpoint_name(linear(x), name)

    def _heads(self, h: jax.Array, name: str, heads: int) -> jax.Array:
        y = self._linear(h, name, heads * self.config.head_dim, self.config.qkv_bias)
        return y.reshape(*h.shape[:2], heads, self.config.head_dim)


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
        by_segment = c.compute.attention in ("splash", "native")
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
    remat = config.compute.remat
    if remat == "none":
        return Block
    kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    # Inside a scan nothing can be taken for common with the forward pass.
    return nn.remat(Block, prevent_cse=False, policy=kept)


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
    lower_states: jax.Array | None = None,
) -> jax.Array:
    """Last hidden states, after the final norm, of packed rows.

    Args:
      config: the model's shape.
      params: the tree above; with `lower_states`, its top layers are enough (see `split`).
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
        top = Decoder(config, first=config.num_layers - depth(params))
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
    """[B, T, D] the output of the lowest layers: those that `split` froze."""
    parts = {name: frozen[name] for name in ("embed", "layers")}
    lowest = Decoder(config, last=depth(frozen))
    return cast(jax.Array, lowest.apply({"params": parts}, tokens, positions, segment_ids))


def check_length(config: ModelConfig, length: int, what: str) -> None:
    """Refuses more tokens than the model can attend over.

    Args:
      config: the model's shape.
      length: tokens.
      what: what has that many, for the message.

    Raises:
      UserError: names both.
    """
    limits = {"max_position_embeddings": config.max_position}
    if config.sliding_window:
        limits["sliding_window"] = config.sliding_window
    for name, limit in limits.items():
        if length > limit:
            raise UserError(
                f"{what}: {length} tokens exceed the model's {name}, {limit}; make it shorter"
            )


def depth(params: Params) -> int:
    """How many layers a tree holds."""
    return int(jax.tree.leaves(params["layers"])[0].shape[0])


def split(config: ModelConfig, params: Params, train_layers: int) -> tuple[Params, Params]:
    """Parts a model into what is trained and what is frozen.

        train_layers = 2 of 5:   trained  {layers 3, 4; norm}
                                 frozen   {embed; layers 0, 1, 2; unembed}

    Args:
      config: the model's shape.
      params: the whole tree.
      train_layers: how many of the top layers are trained; 0 trains everything.

    Returns:
      (trained, frozen); `join` puts them together again.

    Raises:
      UserError: if the model has no layer left to freeze.
    """
    if not train_layers:
        return params, {}
    if not 0 < train_layers < config.num_layers:
        raise UserError(
            f"{train_layers} layers to train: the model has {config.num_layers} layers; give "
            f"1 to {config.num_layers - 1}, or 0 to train everything"
        )
    cut = config.num_layers - train_layers
    trained = {"norm": params["norm"], "layers": jax.tree.map(lambda x: x[cut:], params["layers"])}
    frozen = {name: value for name, value in params.items() if name != "norm"}
    return trained, {**frozen, "layers": jax.tree.map(lambda x: x[:cut], params["layers"])}


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree, on the host, from the parts that `split` made."""
    if not frozen:
        return trained
    layers = jax.tree.map(
        lambda low, top: np.concatenate([low, top]), frozen["layers"], trained["layers"]
    )
    return {**frozen, **trained, "layers": layers}


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Vocabulary logits [..., V] float32 of hidden states [..., D]; products in their dtype."""
    float32 = jnp.float32
    if "unembed" in params:
        kernel = params["unembed"]["kernel"].astype(hidden.dtype)
        return jnp.dot(hidden, kernel, preferred_element_type=float32)
    table = params["embed"]["embedding"].astype(hidden.dtype)
    if hidden.ndim == 2:  # a token of every slot: as in `Linear`
        dims = (((1,), (1,)), ((), ()))
        product = jax.lax.dot_general(table, hidden, dims, preferred_element_type=float32)
        return jax.lax.optimization_barrier(product).T
    return jnp.dot(hidden, table.T, preferred_element_type=float32)


def unstack(params: Params, dtype: str | None = None, matmul_dtype: str | None = None) -> Params:
    """The tree with `layers` as a list of one-layer trees, for `cached_hidden_states`.

    A scan would copy each layer's weights out of the stack on every decoded token,
    which for a token at a time is more traffic than the matrix products themselves.
    Kernels are transposed, see `Linear`, and cast to `matmul_dtype`, the other matrices to `dtype`
    (None: as they are), once and for all: a decoded token reads each of them.
    """

    def one(i: int) -> Params:
        layer = jax.tree.map(lambda x: x[i], params["layers"])
        return {
            name: {"transposed" if key == "kernel" else key: x.T for key, x in part.items()}
            for name, part in layer.items()
        }

    def typed(path: tuple, x: jax.Array) -> jax.Array:
        of_kernels = matmul_dtype if path[-1].key == "transposed" else None
        return x.astype(of_kernels or dtype or x.dtype) if x.ndim > 1 else x

    made = {**params, "layers": [one(i) for i in range(depth(params))]}
    return jax.tree_util.tree_map_with_path(typed, made)


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
    rows: jax.Array | None = None,
) -> tuple[jax.Array, list[LayerCache]]:
    """Hidden states of new tokens, each row at its own place in its conversation.

    The cache slot of a token is its position, so rows of different lengths share one
    array; a position >= C (padding of a chunk) writes nothing:

        cache length C = 8, row with 3 tokens so far, chunk of 4 with 2 real tokens
        positions  3  4  8  8
        writes     ^  ^  (dropped)

    Args:
      config: the model's shape.
      layers_params: the tree of `unstack`.
      tokens: [B, T] int.
      positions: [B, T] int.
      cache: the past, from `empty_cache`; every slot below a position must be filled.
      rows: [B] int, the row of the cache that each row of tokens continues; several may
        continue the same one at other positions, and see each other.  One beyond the cache
        writes nothing (padding).  None: row i continues row i.

    Returns:
      [B, T, D] after the final norm (rows of padding hold garbage), and the new cache.
    """
    chex.assert_equal_shape([tokens, positions])
    x = layers_params["embed"]["embedding"][tokens].astype(config.dtype)
    mask = jnp.arange(cache[0][1].shape[2]) <= positions[:, :, None]
    block = Block(config)
    new_cache = []
    for layer, past in zip(layers_params["layers"], cache, strict=True):
        x, past = cast(tuple, block.apply({"params": layer}, x, positions, mask, past, rows))
        new_cache.append(past)
    norm = RMSNorm(config.rms_norm_eps)
    return cast(jax.Array, norm.apply({"params": layers_params["norm"]}, x)), new_cache
