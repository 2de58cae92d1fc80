"""Products and norms as XLA computes them fastest on a CPU; on other devices they cost no more.

B rows, T tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w: jax.Array, dtype: str | None = None, name: str = "") -> jax.Array:
    """x [B, T, n] @ w [n, m] in x's dtype; the weight gradient is x^T g in w's layout and dtype.

    JAX's rule gives (g^T x)^T.  XLA then computes g transposed, with all of the activation's
    derivative fused into strided writes: on a CPU that fusion took longer than any product.

    Args:
      x: activations.
      w: a weight, cast.
      dtype: that of the factors of this product, and of those of its gradients; None: x's.
      name: what a `--remat` policy may call x, if it is rounded.
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


def matmul_transposed(x: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x [..., n] @ w^T of a weight w [m, n], for the few rows of decoded tokens.

    With a weight transposed, 16 or 32 decoded tokens pass two matrices of 576 x 1536 in 0.6 or
    0.9 ms on two cores instead of 1.0 or 1.3: XLA packs the larger operand of a product anew for
    every call, and that one needs no packing.

    Args:
      x: activations, of the dtype of the product's factors.
      w: the weight, of the same dtype.
      dtype: that of the result, and of its sums.

    Returns:
      [..., m].
    """
    rows, contracted = x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(w, rows, contracted, preferred_element_type=dtype)
    # Without the barrier XLA turns the product round again.
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale, computed in float32; x [..., D], scale [D].

    On a matrix: XLA's sums over an axis of [1, T, D] take 20 to 60 times as long on a CPU as the
    same ones over a matrix's.
    """
    y = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype).reshape(x.shape)
