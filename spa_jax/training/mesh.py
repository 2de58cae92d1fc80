"""Updates on a mesh of devices that share rows and weights, for what one device cannot hold.

`--partition=mesh --mesh=data:A,fsdp:B,tensor:C`: A x B devices share the rows, and B x C share
each weight with its gradient and its moments (`models.axes` says which axis of it):

    mesh 2 x 4            rows 0-7 of a microbatch      a kernel [D, F], D split in four
    data 0:  d0 d1 d2 d3     r0 r1 r2 r3                   D0 D1 D2 D3
    data 1:  d4 d5 d6 d7     r4 r5 r6 r7                   D0 D1 D2 D3

Over data and fsdp a device's part is written out (`shard_map`): it computes the loss of its own
rows, gathers a layer's weights where the layer is computed, and adds the layer's gradients up into
the parts (FSDP, arXiv 2304.11277).  What travels does not depend on the number of devices.  Over
tensor XLA cuts the products, as the weights lie (Megatron, arXiv 1909.08053).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from spa_jax.errors import UserError
from spa_jax.models import axes
from spa_jax.runtime import distributed
from spa_jax.training import devices as devices_lib
from spa_jax.training import state as state_lib
from spa_jax.training.state import Guarded, LossFn, Params, TrainState

_ROWS = (axes.DATA, axes.FSDP)


class Mesh:
    """The trainer of one loss function on a mesh; as `partition.Pmap` to call.

    Attributes:
      devices: how many devices have rows of their own, of all processes.
      optimizer: of the trained parameters.
      frozen: what is not trained, in parts as the trained parameters are.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: Guarded,
        shape: tuple[int, ...],
        *,
        frozen: Params | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          loss_fn: the loss.
          optimizer: of the trained parameters.
          shape: (data, fsdp) or (data, fsdp, tensor); their product is at most the number of
            devices, and that of all with several processes.
          frozen: the parameters that the loss needs and that are not trained.
          devices: those of the mesh; None: the first of all processes.
        """
        data, fsdp, tensor = (*shape, 1)[:3]
        self.devices = data * fsdp
        self._count = data * fsdp * tensor
        chosen = devices_lib.of_all_processes(self._count) if devices is None else devices
        grid = np.array(chosen, object).reshape(data, fsdp, tensor)
        self._mesh = jax.sharding.Mesh(grid, (axes.DATA, axes.FSDP, axes.TENSOR))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec(_ROWS))
        self._loss_fn = loss_fn
        self.optimizer = optimizer
        self._compiled: tuple[Callable, Callable, Callable] | None = None
        self._sum_shapes: Any = None
        self.frozen = self.replicate(frozen or {})

    def create(self, params: Params) -> TrainState:
        """The state before the first update, made where it lies.

        Args:
          params: what is trained, on the host.
        """
        placed = self.replicate(params)
        make = functools.partial(state_lib.create, optimizer=self.optimizer)
        shardings = self._shardings(jax.eval_shape(make, placed))
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(placed)

    def replicate(self, tree: Any) -> Any:
        """The tree on the mesh: each device gets its part of every array."""

        # An update donates its arguments, and device_put does not copy an array that lies on the
        # device already: without a copy here, the caller's own array would be deleted
        # (may_alias=False does not help in JAX 0.10).
        def copied(x: Any) -> Any:
            on_device = self._count == 1 and isinstance(x, jax.Array)
            return jnp.copy(x) if on_device else np.array(jax.device_get(x))

        return devices_lib.place(jax.tree.map(copied, tree), self._shardings(tree))

    def unreplicate(self, tree: Any) -> Any:
        """The tree itself: `fetch` and a checkpoint put an array's parts together."""
        return tree

    def fetch(self, tree: Any) -> Any:
        """The tree on the host, its parts put together; a collective of all processes."""
        if distributed.count() > 1:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.device_get(tree)

    def forward(self, function: Callable) -> Callable[..., Any]:
        """As `Pmap.forward`: the result has an axis of all devices with rows of their own."""
        run = self.compiled_forward(function)

        def call(params: Params, *data: Any) -> Any:
            return self.fetch(run(params, self.frozen, *self._joined(data)))

        return call

    def compiled_forward(self, function: Callable) -> Callable[..., Any]:
        """`function(params, frozen, *data)` of whole weights, jitted for parts of them.

        Returns:
          (params, frozen, *data) on the mesh -> the results of each device's rows, stacked.
        """

        def local(*args: Any) -> Any:
            return jax.tree.map(lambda x: x[None], function(*args))

        def run(params: Params, frozen: Params, *data: Any) -> Any:
            specs = self._manual(params), self._manual(frozen), *[PartitionSpec(_ROWS)] * len(data)
            return self._on_parts(local, specs, PartitionSpec(_ROWS))(params, frozen, *data)

        return jax.jit(run)

    def update(
        self, state: TrainState, batches: Iterable[Any], counts: Mapping[str, float]
    ) -> tuple[TrainState, dict[str, float]]:
        """As `Pmap.update`; `state` is on the mesh."""
        zeros, accumulate, apply = self.programs(state)
        totals = {name: np.float32(max(value, 1.0)) for name, value in counts.items()}
        shared = devices_lib.place(totals, self._everywhere)
        grads, sums = zeros(state.params), None
        for batch in batches:
            batch = self._joined(batch)
            if sums is None:
                sums = self._zero_sums(state.params, batch, shared)
            grads, sums = accumulate(state.params, self.frozen, (grads, sums), batch, shared)
        state, norm = apply(state, grads)
        added, norm = jax.device_get((sums, norm))
        return state, {name: float(v) for name, v in added.items()} | {"grad_norm": float(norm)}

    def programs(self, state: TrainState) -> tuple[Callable, Callable, Callable]:
        """(zeros, accumulate, apply), jitted; their results lie where `replicate` puts them.

        Args:
          state: as `create` makes it, or its shapes.
        """
        if self._compiled is None:
            of_state = self._shardings(state)
            of_params = of_state.params
            zeros = jax.jit(state_lib.zero_gradients, out_shardings=of_params)
            accumulate = jax.jit(
                self._accumulate, donate_argnums=2, out_shardings=(of_params, self._everywhere)
            )
            apply = jax.jit(
                functools.partial(state_lib.apply, optimizer=self.optimizer),
                donate_argnums=0,
                out_shardings=(of_state, self._everywhere),
            )
            self._compiled = zeros, accumulate, apply
        return self._compiled

    def lower(
        self, params: Params, frozen: Params, batch: Any, counts: Sequence[str]
    ) -> dict[str, jax.stages.Lowered]:
        """The programs of an update, lowered from shapes: nothing runs, no array is made.

        Args:
          params: shapes of what is trained.
          frozen: shapes of what is not.
          batch: shapes of a microbatch, as `update` takes it.
          counts: the names of the update's counts.

        Returns:
          "accumulate", a microbatch's, and "apply", an update's.
        """
        make = functools.partial(state_lib.create, optimizer=self.optimizer)
        state, frozen = self._abstract(jax.eval_shape(make, params)), self._abstract(frozen)
        totals = {name: self._scalar for name in counts}
        rows = self._abstract_rows(batch)
        sums = jax.eval_shape(self._loss_fn, params, frozen, rows, totals)[1]
        grads = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), state.params
        )
        before = grads, {name: self._scalar for name in sums}
        _, accumulate, apply = self.programs(state)
        return {
            "accumulate": self._lowered(accumulate, state.params, frozen, before, rows, totals),
            "apply": self._lowered(apply, state, grads),
        }

    def lower_forward(
        self, function: Callable, params: Params, frozen: Params, *data: Any
    ) -> jax.stages.Lowered:
        """The program of `forward(function)`, lowered from shapes as in `lower`."""
        placed = self._abstract(params), self._abstract(frozen), *map(self._abstract_rows, data)
        return self._lowered(self.compiled_forward(function), *placed)

    def _lowered(self, program: Any, *args: Any) -> jax.stages.Lowered:
        """Of the mesh's platform, which need not be this machine's."""
        platform = self._mesh.devices.flat[0].platform
        return program.trace(*args).lower(
            lowering_platforms=None if platform == "gpu" else (platform,)
        )

    def _abstract(self, tree: Any) -> Any:
        """Shapes, with the places where `replicate` puts such arrays."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            self._shardings(tree),
        )

    def _abstract_rows(self, data: Any) -> Any:
        """The shapes of `_joined`."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype, sharding=self._split
            ),
            data,
        )

    @property
    def _scalar(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), np.float32, sharding=self._everywhere)

    def _accumulate(
        self, params: Params, frozen: Params, totals: Any, batch: Any, counts: Any
    ) -> tuple[Params, Any]:
        """`state.accumulate` of each device's rows, added up."""
        add = functools.partial(state_lib.accumulate, loss_fn=self._loss_fn, add_up=self._add_up)
        of_params, everywhere = self._manual(params), PartitionSpec()
        before = of_params, everywhere
        specs = of_params, self._manual(frozen), before, PartitionSpec(_ROWS), everywhere
        return self._on_parts(add, specs, before)(params, frozen, totals, batch, counts)

    def _add_up(self, gradient: Params, sums: Any) -> tuple[Params, Any]:
        """The gradient and the sums of all devices' rows, from one device's."""

        def psum(x: Any, over: Sequence[str]) -> Any:
            several = tuple(axis for axis in over if self._mesh.shape[axis] > 1)
            return jax.lax.psum(x, several) if several else x

        # Of a weight in parts, the devices of an fsdp row have added up theirs already.
        leaves, tree = jax.tree_util.tree_flatten_with_path(gradient)
        cut = [self._fsdp > 1 and "embed" in axes.names(path) for path, _ in leaves]
        parts = psum([x for (_, x), is_cut in zip(leaves, cut, strict=True) if is_cut], [axes.DATA])
        others = [x for (_, x), is_cut in zip(leaves, cut, strict=True) if not is_cut]
        others, sums = psum((others, sums), _ROWS)
        added = {True: iter(parts), False: iter(others)}
        leaves_added = [next(added[is_cut]) for is_cut in cut]
        return jax.tree_util.tree_unflatten(tree, leaves_added), sums

    def _on_parts(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """A function of one device's rows and whole weights, on the mesh's parts of both."""
        if self._count == 1:
            return function
        if self._fsdp > 1:
            function = axes.gathering(function)
        # A kernel wants to be told of every axis, also of one with a single device.
        left_to_xla = self._mesh.shape[axes.TENSOR] > 1
        return jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(_ROWS) if left_to_xla else set(self._mesh.axis_names),
            check_vma=False,  # kernels do not say over which axes they vary
        )

    @property
    def _fsdp(self) -> int:
        return self._mesh.shape[axes.FSDP]

    def _joined(self, data: Any) -> Any:
        """[devices, rows, ...] numpy arrays as [devices * rows, ...] on the mesh."""
        joined = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[2:])), data)
        return devices_lib.place(joined, self._split)

    def _zero_sums(self, params: Params, batch: Any, counts: Any) -> Any:
        if self._sum_shapes is None:
            shapes = jax.eval_shape(self._loss_fn, params, self.frozen, batch, counts)[1]
            self._sum_shapes = dict(shapes)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self._sum_shapes)
        return devices_lib.place(zeros, self._everywhere)

    def _shardings(self, tree: Any) -> Any:
        """Where each array of a tree lies, see `axes.spec`.

        Raises:
          UserError: an array cannot be cut into equal parts; says which.
        """

        def of(path: tuple, x: Any) -> NamedSharding:
            cut = axes.spec(path, np.ndim(x), self._mesh.shape)
            for size, axis in zip(np.shape(x), cut, strict=False):
                if axis and size % self._mesh.shape[axis]:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise UserError(
                        f"--mesh={axis}:{self._mesh.shape[axis]} does not divide the {size} of "
                        f"{name} {list(np.shape(x))}: give a number of devices that does"
                    )
            return NamedSharding(self._mesh, cut)

        return jax.tree_util.tree_map_with_path(of, tree)

    def _manual(self, tree: Any) -> Any:
        """What of `_shardings` a device's part is written out for: all but tensor."""
        fsdp = {axes.FSDP: self._fsdp}
        return jax.tree_util.tree_map_with_path(
            lambda path, x: axes.spec(path, np.ndim(x), fsdp), tree
        )
