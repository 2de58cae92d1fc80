"""Attention kernels of accelerators: no score ever lies in the device's main memory.

`xla.attend_causally` is the reference that they agree with, and what runs everywhere.

B rows, T tokens, H query heads, G key/value heads, K head size.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from spa_jax.errors import UserError

# --attention -> the platform that it runs on, by JAX's name.
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


def check(attention: str, dtype: str, head_dim: int, platform: str) -> None:
    """Refuses a kernel that does not run here.

    Args:
      attention: as in `config.ComputeConfig`.
      dtype: that of the activations.
      head_dim: K.
      platform: JAX's: cpu, gpu or tpu.

    Raises:
      UserError: says what to use instead.
    """
    if attention not in PLATFORMS:
        return
    flag = f"--attention={attention}"
    if platform != PLATFORMS[attention]:
        others = [name for name, runs_on in PLATFORMS.items() if runs_on == platform]
        raise UserError(
            f"{flag} runs on {PLATFORMS[attention]}s, and this machine's JAX computes on a "
            f"{platform}: use --attention={' or '.join(['xla', *others])}"
        )
    if attention == "cudnn" and (dtype == "float32" or head_dim % 8 or head_dim > 128):
        raise UserError(
            f"{flag} takes bfloat16 and heads of at most 128, in eights; this is {dtype} with "
            f"heads of {head_dim}: use --compute_dtype=bfloat16 or --attention=xla"
        )


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """cuDNN's fused attention.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, K].
      mask: [B, T, T] bool, True where a query may see a key; the kernel reads it as a bias.
      implementation: of `jax.nn.dot_product_attention`; "xla" runs everywhere, for a test.

    Returns:
      [B, T, H, K].
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Splash attention: causal, and each token sees its own segment only.

    On anything but a TPU the kernel is interpreted, which is slow: for tests.  What it keeps for
    the backward pass is called "attention": a `--remat` policy that keeps that runs it once.

    Args:
      q: [B, T, H, K], T a multiple of 128.
      k: [B, T, G, K].
      v: [B, T, G, K].
      segment_ids: [B, T] int, without a shared prefix.

    Returns:
      [B, T, H, K].
    """
    # What it is made of takes a tenth of a second to import, which only a TPU needs.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads, size = q.shape[1:]
    causal = kernels.CausalMask((length, length))
    block = next(n for n in (512, 256, 128) if length % n == 0)  # of queries and of keys
    make = functools.partial(
        kernels.make_splash_mha_single_device,
        kernels.MultiHeadMask([causal] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name="attention",
    )
    q = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    segments = kernels.SegmentIds(segment_ids, segment_ids)
    # By the platform that is compiled for, which need not be this machine's.
    out = jax.lax.platform_dependent(
        heads_first(q),
        heads_first(k),
        heads_first(v),
        segments,
        tpu=jax.vmap(make(interpret=False)),
        default=jax.vmap(make(interpret=True)),
    )
    return heads_first(out)
