"""Compiles the pure update functions for the devices at hand, in one of two ways.

`Pmap` (`--partition=pmap`, from two devices on): data parallel.  Every device holds all
parameters and adds up the gradients of its own microbatches; they meet once an update, in `apply`.

`Mesh` (`--partition=mesh --mesh=data:A,fsdp:B`): A x B devices share the rows, and B devices
share each parameter with its gradient and its moments, for what one device cannot hold:

    mesh 2 x 4            rows 0-7 of a microbatch      a kernel [D, F], F split in four
    data 0:  d0 d1 d2 d3     r0 r1 r2 r3                   F0 F1 F2 F3
    data 1:  d4 d5 d6 d7     r4 r5 r6 r7                   F0 F1 F2 F3

Both take the same microbatches, [devices, rows, ...], and compile the same functions of
`training.state`; a test asserts that they agree.  An update makes two transfers, both explicit:
the rows go to the devices, and the sums come back.

The devices are those of all processes.  Every process makes the whole microbatch from the same
files and puts its own devices' part on them; what a pass without gradients says of the data comes
back complete to every process.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.runtime import distributed
from spa_jax.training import state as state_lib
from spa_jax.training.state import Guarded, LossFn, Params, TrainState

AXIS = "devices"
_DATA, _FSDP = "data", "fsdp"


class Pmap:
    """The data-parallel trainer of one loss function.

    Attributes:
      devices: how many devices share an update, of all processes.
      frozen: what is not trained, replicated.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Guarded,
        devices: int | None = None,
        *,
        frozen: Params | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          loss_fn: the loss.
          optimizer: of the trained parameters.
          devices: how many devices of a single process; None: all, of all processes.
          frozen: the parameters that the loss needs and that are not trained, not replicated.
        """
        chosen = _devices(devices)
        self.devices = len(chosen)
        self._own = _of_this_process(chosen)
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
        self.frozen = self.replicate(frozen or {})

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
            batch = _part(batch, len(self._own))
            if sums is None:
                sums = self._zero_sums(state.params, batch, totals)
            batch = jax.device_put(batch, self._split)
            grads, sums = self._accumulate(state.params, self.frozen, (grads, sums), batch, shared)
        state, norm = self._apply(state, grads)
        added, norm = jax.device_get((self._add_up(sums), norm))
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


class Mesh:
    """The trainer of one loss function on a mesh of data x fsdp devices; as `Pmap` to call.

    Attributes:
      devices: how many devices share an update, of all processes.
      frozen: what is not trained, in parts as the trained parameters are.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Guarded,
        shape: tuple[int, int],
        *,
        frozen: Params | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          loss_fn: the loss.
          optimizer: of the trained parameters.
          shape: (data, fsdp); their product is at most the number of devices, and that of all
            with several processes.
          frozen: the parameters that the loss needs and that are not trained.
        """
        self.devices = shape[0] * shape[1]
        devices = np.array(_devices(self.devices)).reshape(shape)
        self._mesh = jax.sharding.Mesh(devices, (_DATA, _FSDP))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec((_DATA, _FSDP)))
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._compiled: tuple[Callable, Callable, Callable] | None = None
        self._sum_shapes: Any = None
        self.frozen = self.replicate(frozen or {})

    def replicate(self, tree: Any) -> Any:
        """The tree on the mesh: each device of an fsdp row gets its part of every array."""

        # An update donates its arguments, and device_put does not copy an array that lies on the
        # device already: without a copy here, the caller's own array would be deleted
        # (may_alias=False does not help in JAX 0.10).
        def copied(x: Any) -> Any:
            on_device = self.devices == 1 and isinstance(x, jax.Array)
            return jnp.copy(x) if on_device else np.array(jax.device_get(x))

        return _place(jax.tree.map(copied, tree), self._shardings(tree))

    def unreplicate(self, tree: Any) -> Any:
        """The tree itself: `fetch` and a checkpoint put an array's parts together."""
        return tree

    def fetch(self, tree: Any) -> Any:
        """The tree on the host, its parts put together; a collective of all processes."""
        if distributed.count() > 1:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.device_get(tree)

    def forward(self, function: Callable) -> Callable[..., Any]:
        """As `Pmap.forward`; a number, which has no device axis, is that of all data."""
        run = jax.jit(function)

        def dealt(x: np.ndarray) -> np.ndarray:
            return x.reshape(self.devices, -1, *x.shape[1:]) if x.ndim else x

        def call(params: Params, *data: Any) -> Any:
            return jax.tree.map(dealt, self.fetch(run(params, self.frozen, *self._joined(data))))

        return call

    def update(
        self, state: TrainState, batches: Iterable[Any], counts: Mapping[str, float]
    ) -> tuple[TrainState, dict[str, float]]:
        """As `Pmap.update`; `state` is on the mesh."""
        if self._compiled is None:
            self._compiled = self._compile(state)
        zeros, accumulate, apply = self._compiled
        totals = {name: np.float32(max(value, 1.0)) for name, value in counts.items()}
        shared = _place(totals, self._everywhere)
        grads, sums = zeros(state.params), None
        for batch in batches:
            batch = self._joined(batch)
            if sums is None:
                sums = self._zero_sums(state.params, batch, shared)
            grads, sums = accumulate(state.params, self.frozen, (grads, sums), batch, shared)
        state, norm = apply(state, grads)
        added, norm = jax.device_get((sums, norm))
        return state, {name: float(v) for name, v in added.items()} | {"grad_norm": float(norm)}

    def _compile(self, state: TrainState) -> tuple[Callable, Callable, Callable]:
        """(zeros, accumulate, apply), whose results lie where `replicate` puts them."""
        of_state = self._shardings(state)
        of_params = of_state.params
        zeros = jax.jit(state_lib.zero_gradients, out_shardings=of_params)
        accumulate = jax.jit(
            functools.partial(state_lib.accumulate, loss_fn=self._loss_fn),
            donate_argnums=2,
            out_shardings=(of_params, self._everywhere),
        )
        apply = jax.jit(
            functools.partial(state_lib.apply, optimizer=self._optimizer),
            donate_argnums=0,
            out_shardings=(of_state, self._everywhere),
        )
        return zeros, accumulate, apply

    def _joined(self, data: Any) -> Any:
        """[devices, rows, ...] numpy arrays as [devices * rows, ...] on the mesh."""
        joined = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[2:])), data)
        return _place(joined, self._split)

    def _zero_sums(self, params: Params, batch: Any, counts: Any) -> Any:
        if self._sum_shapes is None:
            shapes = jax.eval_shape(self._loss_fn, params, self.frozen, batch, counts)[1]
            self._sum_shapes = dict(shapes)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self._sum_shapes)
        return _place(zeros, self._everywhere)

    def _shardings(self, tree: Any) -> Any:
        """Where each array of a tree lies, see `cut_axis`."""
        parts = self._mesh.shape[_FSDP]

        def of(path: tuple, x: Any) -> NamedSharding:
            axis = cut_axis(path, np.shape(x), parts)
            if axis is None:
                return self._everywhere
            return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, _FSDP))

        return jax.tree_util.tree_map_with_path(of, tree)


def cut_axis(path: tuple, shape: tuple[int, ...], parts: int) -> int | None:
    """The axis of an array that is cut over fsdp: the longest one that its devices divide.

    The axis of the layers is not cut: the scan takes one layer at a time.

    Args:
      path: of the array in its tree, as `jax.tree_util` gives it.
      shape: its shape.
      parts: devices of fsdp.

    Returns:
      None if the array is not cut.
    """
    stacked = any(getattr(key, "key", None) == "layers" for key in path)
    axes = [i for i, n in enumerate(shape) if n % parts == 0 and not (stacked and i == 0)]
    return max(axes, key=lambda i: shape[i]) if axes and parts > 1 else None


Trainer = Pmap | Mesh


def make(
    rows: RowsConfig,
    loss_fn: LossFn,
    optimizer: Guarded,
    *,
    frozen: Params | None = None,
) -> Trainer:
    """The trainer that `--partition` and `--mesh` ask for, on the devices of all processes.

    One device, alone, gets a mesh of itself: pmap would copy its parameters, gradients and moments
    to give them an axis and take it away again.

    Raises:
      UserError: if the mesh is no mesh, has more devices than there are, or leaves some of
        several processes' out.
    """
    devices = jax.device_count()
    if rows.partition == "pmap" and devices > 1:
        return Pmap(loss_fn, optimizer, frozen=frozen)
    shape = mesh_shape(rows.mesh, devices)
    if distributed.count() > 1 and shape[0] * shape[1] < devices:
        raise UserError(
            f"--mesh={rows.mesh}: with several processes all {devices} devices must be in it, not "
            f"{shape[0]} x {shape[1]}"
        )
    return Mesh(loss_fn, optimizer, shape, frozen=frozen)


def mesh_shape(mesh: str, devices: int) -> tuple[int, int]:
    """(data, fsdp) of "data:2,fsdp:4"; an axis that is not named is 1, "" is all data.

    Raises:
      UserError: if it cannot be read, or asks for more than `devices`.
    """
    if not mesh:
        return devices, 1
    found: dict[str, int] = {}
    for part in mesh.split(","):
        name, _, size = part.strip().partition(":")
        if name not in (_DATA, _FSDP) or name in found or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh={mesh}: write data:A,fsdp:B with numbers of devices A and B")
        found[name] = int(size)
    shape = found.get(_DATA, 1), found.get(_FSDP, 1)
    if shape[0] * shape[1] > devices:
        raise UserError(f"--mesh={mesh}: {shape[0]} x {shape[1]} devices, and there are {devices}")
    return shape


def gather_layers(trainer: Trainer, frozen: Params) -> Params:
    """The frozen layers as `pmap_forward` takes them: a full copy on each of the trainer's devices.

    Args:
      trainer: of either kind.
      frozen: what it was given.
    """
    if isinstance(trainer, Pmap):
        return trainer.frozen
    layers = {name: tree for name, tree in frozen.items() if name == "policy"}
    return replicate(layers, trainer.devices)


def pmap_forward(function: Callable, devices: int | None = None) -> Callable[..., Any]:
    """`function(params, *more, batch)` on every device's own batch.

    Args:
      function: of parameters, which are replicated, and data.
      devices: how many devices of a single process; None: all, of all processes.

    Returns:
      (parameters and data...) -> the result on the host; numpy data and the result have a
      leading axis of all devices.
    """
    chosen = _devices(devices)
    own = _of_this_process(chosen)
    mesh = jax.sharding.Mesh(np.array(own), (AXIS,))
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    run = jax.pmap(function, axis_name=AXIS, devices=chosen)

    def placed(x: Any) -> Any:
        return x if isinstance(x, jax.Array) else jax.device_put(_part(x, len(own)), split)

    def call(*args: Any) -> Any:
        return distributed.gather(jax.device_get(run(*jax.tree.map(placed, args))))

    return call


def replicate(tree: Any, devices: int | None = None) -> Any:
    """A copy of the tree on every device of this process, or on the first `devices`."""
    return flax.jax_utils.replicate(tree, _of_this_process(_devices(devices)), AXIS)


def unreplicate(tree: Any) -> Any:
    """The first device's copy."""
    # flax.jax_utils.unreplicate would leave a device axis of length 1 if one of several devices
    # is in use.
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)


def _devices(count: int | None) -> list[jax.Device]:
    """The devices of all processes, one process after the other; or the first `count`."""
    processes = range(jax.process_count())
    return [d for p in processes for d in jax.local_devices(process_index=p)][:count]


def _of_this_process(devices: list[jax.Device]) -> list[jax.Device]:
    return [d for d in devices if d.process_index == jax.process_index()]


def _part(batch: Any, devices: int) -> Any:
    """This process's part of a microbatch of all: `devices` of its leading axis."""
    start = devices * distributed.index()
    return jax.tree.map(lambda x: x[start : start + devices], batch)


def _place(host: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, where the shardings say."""
    if distributed.count() == 1:
        return jax.device_put(host, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, host)
    # device_put would compare the values among all processes at every call.
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda at: np.asarray(x)[at]),
        host,
        shardings,
    )
