"""What this machine can do, measured in the process that is then judged by it.

A step of a model can be no faster than its matrix products at the rate of a large one, and no
faster than reading each of its weights from memory once.  Other programs on the machine slow
both down, which is why the rates are measured beside the subject and not looked up.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from spa_jax.models import transformer
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import huggingface
from spa_jax.models.kernels import choice
from spa_jax.models.shapes import SMOLLM2_135M


def seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall-clock seconds of a call, after one that warms up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the machine does at most; printed, a line for the reader.

    Attributes:
      matmul: FLOP/s of a large matrix product.
      read: bytes/s read from memory.
      dtype: of that product's factors.
    """

    matmul: float
    read: float
    dtype: str

    def __str__(self) -> str:
        return (
            f"machine: {self.matmul / 1e9:.0f} GFLOP/s in a {self.dtype} matrix product, "
            f"{self.read / 1e9:.1f} GB/s read from memory, {jax.local_device_count()} x "
            f"{jax.devices()[0].device_kind}"
        )


def measure(dtype: str = "float32") -> Rates:
    """Measures both rates, now."""
    return Rates(_matmul_rate(dtype), _read_rate(), dtype)


def _matmul_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product of random numbers.

    Args:
      dtype: of the factors; float32 ones are multiplied as JAX does by default, on a GPU in TF32.
    """
    # An accelerator needs longer products, beside which starting one takes no time.
    size = 1536 if jax.default_backend() == "cpu" else 8192
    x, y = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.dot)
    return 2.0 * size**3 / seconds(lambda: product(x, y), 15)


def _read_rate() -> float:
    """Bytes/s read by a sum over an array that fits into no processor cache.

    Reading is what decoding does to the weights; a copy would also write.
    """
    megabytes = 256 if jax.default_backend() == "cpu" else 4096
    x = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / seconds(lambda: total(x), 7)


def model() -> tuple[ModelConfig, Params, str]:
    """(config, parameters, what they are): those of --policy, or random ones of its shape."""
    folder = pathlib.Path(flags.FLAGS.policy)
    if folder.exists():
        config, params = huggingface.load_pretrained(folder)
        return choice.resolve(config), jax.device_put(params), str(folder)
    params = transformer.init(SMOLLM2_135M, jax.random.key(0))
    return choice.resolve(SMOLLM2_135M), params, "random weights of SmolLM2-135M's shape"


def layer_parameters(params: Params) -> int:
    """Parameters that multiply every token: the layers', without norms and embedding."""
    return sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of a weight as it is read."""
    return jnp.dtype(config.dtype).itemsize


def vocabulary_parameters(config: ModelConfig) -> int:
    """Parameters that multiply every token whose logits are wanted."""
    return config.vocab_size * config.hidden_size
