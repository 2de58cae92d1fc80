"""Compiles the pure update functions for the devices at hand, in one of two ways.

`Pmap` (`--partition=pmap`, from two devices on): data parallel.  Every device holds all
parameters and adds up the gradients of its own microbatches; they meet once an update, in `apply`.

`mesh.Mesh` (`--partition=mesh --mesh=data:A,fsdp:B,tensor:C`): devices share each parameter with
its gradient and its moments, for what one device cannot hold.

Both take the same microbatches, [devices, rows, ...], and compile the same functions of
`training.state`; a test asserts that they agree.  An update makes two transfers, both explicit:
the rows go to the devices, and the sums come back.

The devices are those of all processes.  Every process makes the whole microbatch from the same
files and puts its own devices' part on them; what a pass without gradients says of the data comes
back complete to every process.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.jax_utils
import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import axes
from spa_jax.runtime import distributed
from spa_jax.training import devices as devices_lib
from spa_jax.training import state as state_lib
from spa_jax.training.mesh import Mesh
from spa_jax.training.state import Guarded, LossFn, Params, TrainState

AXIS = "devices"
_AXES = (axes.DATA, axes.FSDP, axes.TENSOR)


class Pmap:
    """The data-parallel trainer of one loss function.

    Attributes:
      devices: how many devices share an update, of all processes.
      optimizer: of the trained parameters.
      frozen: what is not trained, replicated.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Guarded,
        devices: int | Sequence[jax.Device] | None = None,
        *,
        frozen: Params | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          loss_fn: the loss.
          optimizer: of the trained parameters.
          devices: those that share an update, or how many of a single process; None: all, of all
            processes.
          frozen: the parameters that the loss needs and that are not trained, not replicated.
        """
        if devices is None or isinstance(devices, int):
            devices = devices_lib.of_all_processes(devices)
        self._chosen = chosen = list(devices)
        self.devices = len(chosen)
        self._own = devices_lib.of_this_process(chosen)
        mesh = jax.sharding.Mesh(np.array(self._own), (AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        compiled = functools.partial(jax.pmap, axis_name=AXIS, devices=chosen)
        self._accumulate = compiled(
            functools.partial(state_lib.accumulate, loss_fn=loss_fn), donate_argnums=2
        )
        self._apply = compiled(
            functools.partial(state_lib.apply, optimizer=optimizer, axis_name=AXIS),
            donate_argnums=0,
        )
        self._add_up = compiled(functools.partial(jax.lax.psum, axis_name=AXIS))
        self._zeros = compiled(state_lib.zero_gradients)
        self._sum_shapes: Any = None
        self._loss_fn = loss_fn
        self.optimizer = optimizer
        self.frozen = self.replicate(frozen or {})

    def create(self, params: Params) -> TrainState:
        """The state before the first update, made on every device.

        Args:
          params: what is trained, on the host.
        """
        make = functools.partial(state_lib.create, optimizer=self.optimizer)
        run = jax.pmap(make, axis_name=AXIS, devices=self._chosen, donate_argnums=0)
        return run(self.replicate(params))

    def replicate(self, tree: Any) -> Any:
        """A copy of the tree on every device of this process."""
        # Where pmap places its outputs; anywhere else, the second update would compile again.
        return flax.jax_utils.replicate(tree, self._own, AXIS)

    def unreplicate(self, tree: Any) -> Any:
        """The tree without the device axis."""
        return unreplicate(tree)

    def fetch(self, tree: Any) -> Any:
        """The tree without the device axis, on the host."""
        return jax.device_get(unreplicate(tree))

    def forward(self, function: Callable) -> Callable[..., Any]:
        """`function(params, frozen, *data)` on every device's own data.

        Returns:
          (params, *data) -> the result on the host; data and result with an axis of all devices.
        """
        run = pmap_forward(function, self.devices)
        return lambda params, *data: run(params, self.frozen, *data)

    def update(
        self, state: TrainState, batches: Iterable[Any], counts: Mapping[str, float]
    ) -> tuple[TrainState, dict[str, float]]:
        """One update from microbatches.

        Args:
          state: replicated; donated.
          batches: pytrees of numpy arrays with a leading axis of all devices.
          counts: the update's global counts, which normalise the loss.

        Returns:
          The new state, and the sums of the loss function with `grad_norm`.
        """
        totals = {name: np.float32(max(value, 1.0)) for name, value in counts.items()}
        shared = self.replicate(totals)
        grads, sums = self._zeros(state.params), None
        for batch in batches:
            batch = devices_lib.part(batch, len(self._own))
            if sums is None:
                sums = self._zero_sums(state.params, batch, totals)
            batch = jax.device_put(batch, self._split)
            grads, sums = self._accumulate(state.params, self.frozen, (grads, sums), batch, shared)
        state, norm = self._apply(state, grads)
        added, norm = jax.device_get((self._add_up(sums), norm))
        metrics = {name: float(value[0]) for name, value in added.items()}
        return state, metrics | {"grad_norm": float(norm[0])}

    def lower(
        self, params: Params, frozen: Params, batch: Any, counts: Sequence[str]
    ) -> dict[str, jax.stages.Lowered]:
        """As `mesh.Mesh.lower`."""
        make = functools.partial(state_lib.create, optimizer=self.optimizer)
        state, frozen = self._abstract(jax.eval_shape(make, params)), self._abstract(frozen)
        one = np.zeros((), np.float32)
        totals = dict.fromkeys(counts, one)
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        own = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), (frozen, batch))
        sums = jax.eval_shape(self._loss_fn, params, own[0], rows, totals)[1]
        grads = jax.eval_shape(state_lib.zero_gradients, state.params)
        before = grads, self._abstract(dict.fromkeys(sums, one))
        lower = self._accumulate.lower
        return {
            "accumulate": lower(state.params, frozen, before, batch, self._abstract(totals)),
            "apply": self._apply.lower(state, grads),
        }

    def lower_forward(
        self, function: Callable, params: Params, frozen: Params, *data: Any
    ) -> jax.stages.Lowered:
        """As `mesh.Mesh.lower_forward`."""
        run = jax.pmap(function, axis_name=AXIS, devices=self._chosen)
        return run.lower(self._abstract(params), self._abstract(frozen), *data)

    def _abstract(self, tree: Any) -> Any:
        """The shapes of `replicate`'s arrays."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.devices, *x.shape), x.dtype), tree)

    def _zero_sums(self, params: Params, batch: Any, counts: Mapping[str, np.float32]) -> Any:
        if self._sum_shapes is None:
            first = jax.eval_shape(
                functools.partial(jax.tree.map, lambda x: x[0]), (params, self.frozen, batch)
            )
            self._sum_shapes = jax.eval_shape(self._loss_fn, *first, counts)[1]
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(self._sum_shapes))
        return self.replicate(zeros)


Trainer = Pmap | Mesh


def make(
    rows: RowsConfig,
    loss_fn: LossFn,
    optimizer: Guarded,
    *,
    frozen: Params | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Trainer:
    """The trainer that `--partition` and `--mesh` ask for.

    One device, alone, gets a mesh of itself: pmap would copy its parameters, gradients and moments
    to give them an axis and take it away again.

    Args:
      rows: says which.
      loss_fn: as of either kind.
      optimizer: as there.
      frozen: as there.
      devices: a topology's, to lower programs for; None: those of all processes.

    Raises:
      UserError: if the mesh is no mesh, has more devices than there are, or leaves some of
        several processes' out.
    """
    count = jax.device_count() if devices is None else len(devices)
    if rows.partition == "pmap" and count > 1:
        return Pmap(loss_fn, optimizer, devices, frozen=frozen)
    shape = mesh_shape(rows.mesh, count)
    if distributed.count() > 1 and math.prod(shape) < count:
        raise UserError(
            f"--mesh={rows.mesh}: with several processes all {count} devices must be in it, not "
            f"{math.prod(shape)}"
        )
    chosen = devices and list(devices)[: math.prod(shape)]
    return Mesh(loss_fn, optimizer, shape, frozen=frozen, devices=chosen)


def without_loss(rows: RowsConfig) -> Trainer:
    """As `make`, for passes without gradients alone."""

    def no_loss(*_: Any) -> Any:
        raise NotImplementedError("there is no loss")

    return make(rows, no_loss, Guarded(optax.identity().init, optax.identity().update))


def mesh_shape(mesh: str, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) of "data:2,fsdp:4"; an axis that is not named is 1, "" is all data.

    One axis may have * devices: all that the others leave.

    Raises:
      UserError: if it cannot be read, or asks for more than `devices`.
    """
    if not mesh:
        return devices, 1, 1
    found: dict[str, int] = {}
    rest: str | None = None
    for part in mesh.split(","):
        name, _, size = part.strip().partition(":")
        is_rest = size == "*" and rest is None
        if name not in _AXES or name in found or not (is_rest or size.isdecimal()) or size == "0":
            raise UserError(
                f"--mesh={mesh}: write data:A,fsdp:B,tensor:C with numbers of devices A, B and C; "
                "one of them may be *, all that are left"
            )
        rest = name if is_rest else rest
        found[name] = 1 if is_rest else int(size)
    if rest is not None:
        found[rest] = max(1, devices // math.prod(found.values()))
    data, fsdp, tensor = (found.get(axis, 1) for axis in _AXES)
    if data * fsdp * tensor > devices:
        asked = f"{data} x {fsdp}" + (f" x {tensor}" if tensor > 1 else "")
        raise UserError(f"--mesh={mesh}: {asked} devices, and there are {devices}")
    return data, fsdp, tensor


def pmap_forward(function: Callable, devices: int | None = None) -> Callable[..., Any]:
    """`function(params, *more, batch)` on every device's own batch.

    Args:
      function: of parameters, which are replicated, and data.
      devices: how many devices of a single process; None: all, of all processes.

    Returns:
      (parameters and data...) -> the result on the host; numpy data and the result have a
      leading axis of all devices.
    """
    chosen = devices_lib.of_all_processes(devices)
    own = devices_lib.of_this_process(chosen)
    mesh = jax.sharding.Mesh(np.array(own), (AXIS,))
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    run = jax.pmap(function, axis_name=AXIS, devices=chosen)

    def placed(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return x
        return jax.device_put(devices_lib.part(x, len(own)), split)

    def call(*args: Any) -> Any:
        return distributed.gather(jax.device_get(run(*jax.tree.map(placed, args))))

    return call


def unreplicate(tree: Any) -> Any:
    """The first device's copy."""
    # flax.jax_utils.unreplicate would leave a device axis of length 1 if one of several devices
    # is in use.
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
