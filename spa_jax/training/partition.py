"""Compiles the pure update functions for the devices at hand: `pmap`, data parallel.

Parameters are replicated; a batch's leading axis is the device.  Each device adds up
the gradients of its own microbatches, and they meet once an update, in `apply`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spa_jax.training import state as state_lib
from spa_jax.training.state import LossFn, Params, TrainState

AXIS = "devices"


class Pmap:
    """The data-parallel trainer of one loss function.

    Attributes:
      devices: how many local devices share an update.
      frozen: what is not trained, replicated.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        devices: int | None = None,
        frozen: Params | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          loss_fn: the loss.
          optimizer: of the trained parameters.
          devices: how many local devices; None: all.
          frozen: the parameters that the loss needs and that are not trained, not replicated.
        """
        self._devices = jax.local_devices()[:devices]
        self.devices = len(self._devices)
        self._accumulate = jax.pmap(
            functools.partial(state_lib.accumulate, loss_fn),
            axis_name=AXIS,
            in_axes=(0, 0, 0, 0, 0, None),
            donate_argnums=(2, 3),
            devices=self._devices,
        )
        self._apply = jax.pmap(
            functools.partial(state_lib.apply, optimizer, axis_name=AXIS),
            axis_name=AXIS,
            donate_argnums=0,
            devices=self._devices,
        )
        self._add_up = jax.pmap(
            functools.partial(jax.lax.psum, axis_name=AXIS), axis_name=AXIS, devices=self._devices
        )
        self._zeros = jax.pmap(
            functools.partial(jax.tree.map, jnp.zeros_like), axis_name=AXIS, devices=self._devices
        )
        self._sum_shapes: Any = None
        self._loss_fn = loss_fn
        self.frozen = self.replicate(frozen or {})

    def replicate(self, tree: Any) -> Any:
        """A copy of the tree on every device."""
        # Placed as pmap places its outputs: otherwise the second update compiles once more.
        return flax.jax_utils.replicate(tree, self._devices, AXIS)

    def update(
        self, state: TrainState, batches: Iterable[Any], counts: Mapping[str, float]
    ) -> tuple[TrainState, dict[str, float]]:
        """One update from microbatches.

        Args:
          state: replicated; donated.
          batches: pytrees of numpy arrays with a leading device axis.
          counts: the update's global counts, which normalise the loss.

        Returns:
          The new state, and the sums of the loss function with `grad_norm`.
        """
        totals = {name: np.float32(max(value, 1.0)) for name, value in counts.items()}
        grads, sums = self._zeros(state.params), None
        for batch in batches:
            if sums is None:
                sums = self._zero_sums(state.params, batch, totals)
            grads, sums = self._accumulate(state.params, self.frozen, grads, sums, batch, totals)
        state, norm = self._apply(state, grads)
        added = jax.device_get(self._add_up(sums))
        metrics = {name: float(value[0]) for name, value in added.items()}
        return state, metrics | {"grad_norm": float(norm[0])}

    def _zero_sums(self, params: Params, batch: Any, counts: Mapping[str, np.float32]) -> Any:
        if self._sum_shapes is None:
            first = jax.eval_shape(
                functools.partial(jax.tree.map, lambda x: x[0]), (params, self.frozen, batch)
            )
            self._sum_shapes = jax.eval_shape(self._loss_fn, *first, counts)[1]
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(self._sum_shapes))
        return self.replicate(zeros)


def pmap_forward(function: Callable, devices: int | None = None) -> Callable:
    """`function(params, ..., batch)` on every device's own batch, parameters replicated."""
    return jax.pmap(function, axis_name=AXIS, devices=jax.local_devices()[:devices])


def replicate(tree: Any) -> Any:
    """A copy of the tree on every local device."""
    return flax.jax_utils.replicate(tree, axis_name=AXIS)


def unreplicate(tree: Any) -> Any:
    """The first device's copy."""
    # Flax's own keeps the device axis of length 1 where one of several devices is in use.
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
