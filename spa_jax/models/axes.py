"""Which axis of which weight a mesh cuts: logical names of axes, and one table to the mesh's.

    data    devices that share the rows, and hold the same weights
    fsdp    devices that share the rows and each weight: a layer's weights are brought together
            where the layer is computed, and its gradients are added up into the parts
    tensor  devices that share the rows' work: each computes its heads and its units

    q/kernel  [embed, heads]     D over fsdp, H*K over tensor
    down      [mlp, embed]       F over tensor, D over fsdp

A loss function is written for whole weights and its own rows.  Inside `gathering` the layers that
`transformer` scans over, and what `gathered` is asked for, are gathered from the parts; anywhere
else both do nothing.
"""

import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from spa_jax.models.config import Params

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
# A logical axis -> the axes of the mesh that cut it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "kv": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}
# A matrix -> the names of its axes, of one layer.  What is not here lies whole on each device.
_MATRICES = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv"),
    "v": ("embed", "kv"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "unembed": ("embed", "vocab"),
}
_LEAVES = ("kernel", "transposed", "bias", "a", "b", "lora_a", "lora_b")
_GATHERED = contextvars.ContextVar("gathered", default=False)


def names(path: tuple[Any, ...]) -> tuple[str | None, ...]:
    """The names of a weight's last axes; an axis before them is that of the layers.

    Args:
      path: of the weight in its tree, as `jax.tree_util` gives it; that of a moment or of a
        gradient ends alike.

    Returns:
      () of what is not cut.
    """
    keys = [getattr(key, "key", None) for key in path[-2:]]
    if keys == ["embed", "embedding"]:
        return ("vocab", "embed")
    if len(keys) < 2 or keys[0] not in _MATRICES or keys[1] not in _LEAVES:
        return ()
    inputs, outputs = _MATRICES[keys[0]]
    match keys[1]:
        case "bias":
            return (outputs,)
        case "transposed":  # in sampling, by `tree.unstack`
            return (outputs, inputs)
        case "a" | "lora_a":
            return (inputs, None)
        case "b" | "lora_b":
            return (None, outputs)
    return (inputs, outputs)


def spec(path: tuple[Any, ...], ndim: int, mesh: Mapping[str, int]) -> PartitionSpec:
    """How a mesh cuts a weight.

    Args:
      path: as in `names`.
      ndim: how many axes it has.
      mesh: devices by axis; an axis that is not there, or has one device, cuts nothing.
    """
    found = names(path)
    cut = [None if name is None else _mesh_axis(name, mesh) for name in found]
    while cut and cut[-1] is None:
        cut.pop()
    return PartitionSpec(*[None] * (ndim - len(found)), *cut) if cut else PartitionSpec()


def even(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """`spec`, but what a mesh would not cut into equal parts lies whole.

    Args:
      path: as in `names`.
      shape: of the weight.
      mesh: as in `spec`.
    """
    cut = spec(path, len(shape), mesh)
    return PartitionSpec(
        *(
            axis if axis and size % mesh[axis] == 0 else None
            for size, axis in zip(shape, cut, strict=False)
        )
    )


def _mesh_axis(name: str, mesh: Mapping[str, int]) -> str | None:
    """The axis of the mesh that cuts this logical one."""
    return next((axis for axis in RULES[name] if mesh.get(axis, 1) > 1), None)


def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced for parts of weights: for a `shard_map` over fsdp."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        token = _GATHERED.set(True)
        try:
            return function(*args)
        finally:
            _GATHERED.reset(token)

    return traced


def is_gathering() -> bool:
    """Whether weights come in parts here."""
    return _GATHERED.get()


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The tree with its matrices in the dtype that they are computed in; on the host.

    Norms' scales stay as they are: they are factors of float32 numbers.

    Args:
      params: a decoder's tree, or some of it.
      dtype: what a matrix is cast to where it is used.
    """

    def one(path: tuple[Any, ...], x: Any) -> Any:
        return np.asarray(x).astype(jnp.dtype(dtype), copy=False) if names(path) else x

    return jax.tree_util.tree_map_with_path(one, params)


def gathered(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The tree with its parts brought together, but for the layers, which a scan takes one by one.

    Args:
      params: a decoder's tree, or some of it.
      dtype: that it is computed in: it travels, and is summed in the backward pass, in that.
    """
    outside = {name: tree for name, tree in params.items() if name != "layers"}
    return {**params, **gather(outside, dtype)}


def gather(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """Every weight of a tree brought together; its gradient is added up into the parts.

    Args:
      params: parts of weights; the last two keys of a path name them.
      dtype: as in `gathered`.
    """
    if not is_gathering():
        return params
    return jax.lax.platform_dependent(
        params,
        cpu=functools.partial(_gather_in_order, dtype=dtype),
        default=functools.partial(_gather_at_once, dtype=dtype),
    )


def _gather_at_once(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """As accelerators gather: what does not wait for another travels while something is computed.

    The axis that is cut goes first.  Along another one a TPU has no reduce-scatter: it would add up
    whole gradients on every device, in twice the time.
    """

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        axis = _cut_axis(path, x.ndim)
        if axis is None:
            return x
        # The barrier keeps the cast before the transfer: XLA would move twice the bytes.
        first = jnp.moveaxis(jax.lax.optimization_barrier(x.astype(dtype)), axis, 0)
        return jnp.moveaxis(jax.lax.all_gather(first, FSDP, axis=0, tiled=True), 0, axis)

    return jax.tree_util.tree_map_with_path(one, params)


def _gather_in_order(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """As a CPU gathers: one after the other, backwards too.

    XLA tells two transfers of a CPU program apart by their kind and their devices alone: of two
    under way at once, one in a loop and one outside, each would take the other's numbers.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    # The embedding comes last: the first layer waits for it, and so for all of them.
    order = sorted(range(len(leaves)), key=lambda i: "embedding" in str(leaves[i][0][-1]))
    made: list[jax.Array] = [x for _, x in leaves]
    before: int | None = None
    for i in order:
        path, x = leaves[i]
        axis = _cut_axis(path, x.ndim)
        if axis is None:
            continue
        part = x.astype(dtype)
        if before is not None:
            # What is taken from here on depends on both, and so do their gradients.
            part, made[before] = jax.lax.optimization_barrier((part, made[before]))
        made[i] = jax.lax.all_gather(part, FSDP, axis=axis, tiled=True)
        before = i
    return jax.tree_util.tree_unflatten(tree, made)


def _cut_axis(path: tuple[Any, ...], ndim: int) -> int | None:
    """The axis of a weight that fsdp cuts."""
    found = names(path)
    return ndim - len(found) + found.index("embed") if "embed" in found else None
