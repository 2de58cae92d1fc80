"""An engine's weights brought to its devices, where they never lie in two types at once."""

import jax
import jax.numpy as jnp

from spa_jax.models import tree
from spa_jax.models.config import ModelConfig, Params
from spa_jax.sampling.placement import Placement

_unstack = jax.jit(tree.unstack, static_argnames=("dtype", "matmul_dtype"))


def place(config: ModelConfig, params: Params, placement: Placement) -> Params:
    """`tree.unstack` in the types that decoding reads, on an engine's devices, layer by layer.

    Of weights that come in float32 a device holds its part of one layer's; what belongs to no layer
    is cast before it is sent.  Otherwise a 3B model would need 19 GiB to become one of 6.

    Args:
      config: the model's shape; its `compute` names the types.
      params: the stacked tree, on the host or on any device.
      placement: where the result lies.

    Returns:
      The tree of `tree.unstack`, bit for bit as one cast of all of it gives.
    """
    outside = {name: part for name, part in params.items() if name != "layers"}
    made = placement.put(jax.tree.map(lambda x: _typed(x, config.dtype), outside))
    made["layers"] = []
    for i in range(tree.depth(params)):
        layer = jax.tree.map(lambda x, i=i: x[i : i + 1], params["layers"])
        made["layers"] += _one(config, layer, placement)
    return made


def _one(config: ModelConfig, layer: Params, placement: Placement) -> list[Params]:
    """A stack of one layer, as decoding reads it; it is cast on its devices."""
    sent = placement.put({"layers": layer})
    # Cut where the stack was: nothing moves here.
    made = placement.put(
        _unstack(sent, dtype=config.dtype, matmul_dtype=config.matmul_dtype)["layers"]
    )
    # Else the host would send the next layers before this one has been cast.
    waited: list[Params] = jax.block_until_ready(made)
    return waited


def _typed(x: jax.Array, dtype: str) -> jax.Array:
    """A matrix cast where it lies, by numpy on the host; a vector as it is."""
    return x if x.ndim < 2 or x.dtype == dtype else x.astype(jnp.dtype(dtype))
