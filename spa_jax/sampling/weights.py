"""An engine's weights brought to its device, where they never lie in two types at once."""

import jax
import jax.numpy as jnp

from spa_jax.models import tree
from spa_jax.models.config import ModelConfig, Params

_unstack = jax.jit(tree.unstack, static_argnames=("dtype", "matmul_dtype"))


def place(config: ModelConfig, params: Params, device: jax.Device) -> Params:
    """`tree.unstack` in the types that decoding reads, on a device, one layer after the other.

    Of weights that come in float32 the device holds one layer's; what belongs to no layer is cast
    before it is sent.  Otherwise a 3B model would need 19 GiB to become one of 6.

    Args:
      config: the model's shape; its `compute` names the types.
      params: the stacked tree, on the host or on any device.
      device: where the result lies.

    Returns:
      The tree of `tree.unstack`, bit for bit as one cast of all of it gives.
    """
    outside = {name: part for name, part in params.items() if name != "layers"}
    made: Params = jax.device_put(jax.tree.map(lambda x: _typed(x, config.dtype), outside), device)
    made["layers"] = []
    for i in range(tree.depth(params)):
        layer = jax.tree.map(lambda x, i=i: x[i : i + 1], params["layers"])
        made["layers"] += _one(config, layer, device)
    return made


def _one(config: ModelConfig, layer: Params, device: jax.Device) -> list[Params]:
    """A stack of one layer, as decoding reads it; it is cast on the device."""
    sent = {"layers": jax.device_put(layer, device)}
    made = _unstack(sent, dtype=config.dtype, matmul_dtype=config.matmul_dtype)["layers"]
    # Else the host would send the next layers before this one has been cast.
    waited: list[Params] = jax.block_until_ready(made)
    return waited


def _typed(x: jax.Array, dtype: str) -> jax.Array:
    """A matrix cast where it lies, by numpy on the host; a vector as it is."""
    return x if x.ndim < 2 or x.dtype == dtype else x.astype(jnp.dtype(dtype))
