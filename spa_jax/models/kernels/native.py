"""Attention on a CPU by functions of our own in C++ (`native.cc`), which XLA calls.

What XLA makes of attention on a CPU runs on one core where each product is small, and multiplies
what the mask throws away.  These functions read the keys that a query sees, on all cores, and
agree with `xla.attend` to rounding.  They are compiled when they are first needed, by the
C++ compiler of this machine, for its processor, against the headers that jaxlib brings; where
that is not possible, `xla.py` is what runs.

B rows, T tokens, H query heads, G key/value heads, K head size, S slots, C places of a cache.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from spa_jax.batching import SHARED
from spa_jax.errors import UserError

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_HEADS_OF = 8  # K is a multiple of it; of 16, the widest vector, for speed
_HANDLERS = ("SpaCachedAttention", "SpaPackedAttention", "SpaPackedAttentionBackward")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")


def runs(dtype: str, head_dim: int, backend: str) -> bool:
    """Whether these functions take such a model here.

    Args:
      dtype: that of the activations.
      head_dim: K.
      backend: JAX's: cpu, gpu or tpu.
    """
    return _in_the_way(dtype, head_dim, backend) is None


def check(dtype: str, head_dim: int, backend: str) -> None:
    """Refuses to compute what these functions cannot; arguments as `runs`.

    Raises:
      UserError: says what is in the way, and what to use instead.
    """
    if reason := _in_the_way(dtype, head_dim, backend):
        raise UserError(f"--attention=native: {reason}; use --attention=auto")


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 factors (Linux, x86)."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def _in_the_way(dtype: str, head_dim: int, backend: str) -> str | None:
    if backend != "cpu":
        return f"it runs on CPUs, and this machine's JAX computes on a {backend}"
    if dtype != "float32" or head_dim % _HEADS_OF:
        return (
            f"it takes float32 and heads of a multiple of {_HEADS_OF}; this is {dtype} with heads "
            f"of {head_dim}"
        )
    return why_not()


@functools.cache
def why_not() -> str | None:
    """Why the functions cannot be used; None: they can, and XLA knows them from now on."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        reason = f"{_SOURCE.name} was not compiled: {str(detail).strip()[-500:]}"
        logging.getLogger(__name__).warning("%s; attention is XLA's, and slower", reason)
        return reason
    for name in _HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _built() -> pathlib.Path:
    """The compiled library, from the user's cache or made now.

    Raises:
      OSError: there is no compiler, or no place to write to.
      subprocess.SubprocessError: the compiler failed.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler (c++, g++, clang++, or the one that CXX names)")
    headers = jax.ffi.include_dir()
    made_of = (_SOURCE.read_text(), jax.lib.__version__, compiler, _processor(), *_FLAGS)
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(cache) / "spa_jax"
    library = folder / f"attention-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch) / library.name
            command = [*compiler.split(), *_FLAGS, f"-I{headers}", str(_SOURCE), "-o", str(made)]
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
                start_new_session=True,  # Ctrl-C on the terminal is ours
            )
            made.rename(library)
    return library


def _processor() -> str:
    """What this processor can do: a cache can be shared by machines of several kinds."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def cached(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, rows: jax.Array
) -> jax.Array:
    """Attention of new tokens to the conversations that they continue.

    Args:
      q: [B, T, H, K] float32.
      k: [S, G, K, C], transposed, with the new tokens' keys in it.
      v: [S, G, C, K], likewise.
      positions: [B, T] int: a token sees the places 0 to position; a position >= C is padding.
      rows: [B] int, the slot of each row of tokens; one >= S is padding.

    Returns:
      [B, T, H, K]; 0 at padding.
    """
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = _function("SpaCachedAttention", shape)
    return call(q, k, v, positions.astype(jnp.int32), rows.astype(jnp.int32))


@jax.custom_vjp
def packed(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal attention inside packed trajectories and their row's shared prefix.

    The mask is `transformer.packed_mask`'s; each segment is one run of tokens, and a shared prefix
    the first.  The backward pass is that of `xla.attend_causally`.

    Args:
      q: [B, T, H, K] float32.
      k: [B, T, G, K].
      v: [B, T, G, K].
      segment_ids: [B, T] int.

    Returns:
      [B, T, H, K].
    """
    return _forward(q, k, v, segment_ids)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    shapes = (_like(q), jax.ShapeDtypeStruct(q.shape[:3], q.dtype))
    segment_ids = segment_ids.astype(jnp.int32)
    call = _function("SpaPackedAttention", shapes)
    out, log_sums = call(q, k, v, segment_ids, prefix=np.int32(SHARED))
    # Named, so that `--remat` can keep what would otherwise cost a forward pass to make again.
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "attention")
    return out, (q, k, v, segment_ids, out, log_sums)


def _backward(
    residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k = residuals[:2]
    call = _function("SpaPackedAttentionBackward", (_like(q),) * 3)
    d_q, d_k, d_v = call(*residuals, d_out, prefix=np.int32(SHARED))
    batch, length, heads, size = k.shape
    shared_by = (batch, length, heads, -1, size)  # the query heads of a key head
    return d_q, d_k.reshape(shared_by).sum(3), d_v.reshape(shared_by).sum(3), None


packed.defvjp(_forward, _backward)


def _function(name: str, shapes: Any) -> Callable[..., Any]:
    """One of the C++ functions, with the shapes of what it returns."""
    if reason := why_not():
        raise UserError(f"--attention=native: {reason}; use --attention=xla")
    return jax.ffi.ffi_call(name, shapes)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
