"""Attention by the kernel that a model's config names; the architecture knows no other way in.

B rows, T tokens, H query heads, G key/value heads, R = H / G, K head size, C places of a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from spa_jax.models.kernels import fused, native, xla

# Keys [B, G, K, C] and values [B, G, C, K].  Keys lie transposed: on a CPU the scores of
# one new token are then a row-major product, ten times faster than the other layout.
LayerCache = tuple[jax.Array, jax.Array]


class CacheOrder(NamedTuple):
    """The order in memory, outermost first, of the axes of a layer's keys and values."""

    keys: tuple[int, int, int, int]
    values: tuple[int, int, int, int]


_BY_SEGMENT = ("splash", "native")


def reads_segments(kernel: str) -> bool:
    """Whether `packed` takes the rows' segments instead of a mask."""
    return kernel in _BY_SEGMENT


def packed(kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Causal attention of packed rows.

    Args:
      kernel: `ComputeConfig.attention`, resolved: xla, native, cudnn or splash.
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, K].
      seen: [B, T, T] bool, True where a query may see a key; [B, T] int, the segments, where
        `reads_segments` says so.

    Returns:
      [B, T, H, K].
    """
    match kernel:
        case "cudnn":
            return checkpoint_name(fused.cudnn(q, k, v, seen), "attention")
        case "splash":
            return checkpoint_name(fused.splash(q, k, v, seen), "attention")
        case "native":
            return native.packed(q, k, v, seen)
    k_BGKT, v_BGTK = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    return ungroup(xla.attend_causally(group(q, k.shape[2]), k_BGKT, v_BGTK, seen))


def write(
    cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array, rows: jax.Array
) -> LayerCache:
    """The cache with new keys and values in the slots of their positions.

    Args:
      cache: keys and values so far.
      k: [B, T, G, K].
      v: [B, T, G, K].
      positions: [B, T] int; one >= C writes nothing.
      rows: [B] int, the cache's row of each row; one beyond the cache writes nothing.
    """
    k_BGKC, v_BGCK = cache
    at = rows[:, None]
    return (
        k_BGKC.at[at, :, :, positions].set(k.astype(k_BGKC.dtype), mode="drop"),
        v_BGCK.at[at, :, positions].set(v.astype(v_BGCK.dtype), mode="drop"),
    )


def cached(
    kernel: str,
    q: jax.Array,
    cache: LayerCache,
    *,
    positions: jax.Array,
    seen: jax.Array,
    rows: jax.Array | None,
    order: CacheOrder | None = None,
) -> jax.Array:
    """Attention of new tokens to the conversations that they continue.

    Args:
      kernel: as for `packed`; what has no kernel for a cache, or for one of this type, computes it
        as xla does.
      q: [B, T, H, K].
      cache: with the new tokens' keys and values in it, of any float type.
      positions: [B, T] int: a token sees the places 0 to position; one >= C is padding.
      seen: [B, T, L] bool, the same as a mask of the first L <= C places: no others are read
        (native attention reads those up to `positions` in any case).
      rows: [B] int, the cache's row of each row of q; None: row i is row i.
      order: of the cache's axes in memory, so that rows are taken in it; None: it is not known.

    Returns:
      [B, T, H, K].
    """
    k_BGKC, v_BGCK = cache
    if kernel == "native" and k_BGKC.dtype == q.dtype:
        at = jnp.arange(q.shape[0]) if rows is None else rows
        return native.cached(q, k_BGKC, v_BGCK, positions, at)
    if rows is not None:
        keys, values = order or (None, None)
        k_BGKC, v_BGCK = _take(k_BGKC, rows, keys), _take(v_BGCK, rows, values)
    k_BGKC, v_BGCK = _first(k_BGKC, seen.shape[-1], 3), _first(v_BGCK, seen.shape[-1], 2)
    # A cache of another type holds rounded numbers; they are multiplied as all others are.
    k_BGKC, v_BGCK = k_BGKC.astype(q.dtype), v_BGCK.astype(q.dtype)
    return ungroup(xla.attend(group(q, k_BGKC.shape[1]), k_BGKC, v_BGCK, seen))


def _first(x: jax.Array, places: int, axis: int) -> jax.Array:
    """The first places of a cache."""
    if places == x.shape[axis]:
        return x
    # A TPU's compiler takes twice as long for a slice whose start it knows.
    start = jax.lax.optimization_barrier(jnp.int32(0))
    return jax.lax.dynamic_slice_in_dim(x, start, places, axis)


def _take(x: jax.Array, rows: jax.Array, order: tuple[int, ...] | None) -> jax.Array:
    """x [rows of the cache, ...] at rows [B]: [B, ...]; one beyond the cache gives the last."""
    if order is None:
        return x.at[rows].get(mode="clip")
    # A TPU gathers by cutting every row of the cache into pieces.  A slice a row it reads where it
    # lies, but only if it must not lay the result out in another order.
    parts = [jax.lax.dynamic_index_in_dim(x, row) for row in rows]
    return with_layout_constraint(jnp.concatenate(parts), Layout(order))


def group(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, K] -> [B, G, R, T, K]: the query heads of each of the G key heads."""
    q_BTGRK = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1])
    return q_BTGRK.transpose(0, 2, 3, 1, 4)


def ungroup(out: jax.Array) -> jax.Array:
    """[B, G, R, T, K] -> [B, T, H, K]."""
    out_BTGRK = out.transpose(0, 3, 1, 2, 4)
    return out_BTGRK.reshape(*out_BTGRK.shape[:2], -1, out.shape[-1])
