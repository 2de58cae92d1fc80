"""The compiled inside of engines of one shape: each program once, whatever the weights.

Engines of the same `Shape` share their programs, so new weights (the next round's, an
evaluation's) compile nothing.  Programs are compiled ahead of time: one that is given another
shape refuses it, and nothing is ever compiled in its place.

A `Shape` names its devices, and everything that depends on their kind follows from them and from
`tuning`: `lower` needs no array and no device of that kind on this machine.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax.experimental.layout import Format, Layout

from spa_jax.models import transformer, tree
from spa_jax.models.config import ModelConfig, Params
from spa_jax.sampling import decode
from spa_jax.sampling.decode import Chunk, PrefillRows, SlotState
from spa_jax.sampling.placement import Devices, Placement
from spa_jax.sampling.tuning import Tuning

STEPS = 4  # decoding steps between two looks at who has ended


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program depends on.

    Attributes:
      config: the model's shape.
      dtype: of the weights, and of the hidden states.
      slots: conversations held at once.
      context_length: tokens a conversation may have.
      steps: decoding steps of a chunk.
      end_of_turn: the ids that close a turn.
      temperature: see `decode.draw`.
      top_k: see `decode.draw`.
      top_p: see `decode.draw`.
      devices: where it runs, or some of a topology that is not here; several share each weight
        and the cache.
      tuning: what suits them.
      cache_dtype: of keys and values in the cache; None: `dtype`.
    """

    config: ModelConfig
    dtype: np.dtype
    slots: int
    context_length: int
    steps: int
    end_of_turn: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    devices: Devices
    tuning: Tuning
    cache_dtype: np.dtype | None = None

    @property
    def placement(self) -> Placement:
        """What lies where on the devices."""
        return Placement(self.devices)

    @property
    def rows(self) -> int:
        """Chunks that a prefill call reads."""
        return self.tuning.rows(self.slots)

    @property
    def places(self) -> tuple[int, ...]:
        """The numbers of places that decoding can read, ascending; the last is the context."""
        return self.tuning.places(self.context_length)


class _Functions(NamedTuple):
    """The programs of a shape, each told where its arguments and results lie."""

    empty: Any
    prefill: Any
    copy: Any
    decode: dict[int, Any]  # by the places that it reads


def _functions(shape: Shape) -> _Functions:
    config, here, state = shape.config, shape.placement.replicated, _formats(shape)
    weights = here if len(shape.devices) == 1 else shape.placement.weights(_weights(config))

    def empty() -> SlotState:
        return decode.empty_state(
            config, shape.slots, shape.context_length, shape.dtype, cache_dtype=shape.cache_dtype
        )

    def decode_chunk(
        params: Params,
        state: SlotState,
        tokens: jax.Array,
        budget: jax.Array,
        seeds: tuple[chex.PRNGKey, jax.Array],
        *,
        places: int,
    ) -> tuple[SlotState, Chunk]:
        key, episodes = seeds
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, episodes)
        return decode.decode_chunk(
            config,
            params,
            state,
            tokens=tokens,
            budget=budget,
            keys=keys,
            steps=shape.steps,
            end_of_turn=shape.end_of_turn,
            temperature=shape.temperature,
            top_k=shape.top_k,
            top_p=shape.top_p,
            places=places,
        )

    # The order of the cache is that of arguments and results: donated, it is written in place.
    jit: Callable[..., Any] = functools.partial(jax.jit, out_shardings=state)
    return _Functions(
        empty=jit(empty),
        prefill=jit(
            functools.partial(decode.prefill, config, order=shape.tuning.order),
            in_shardings=(weights, state, here),
            donate_argnums=1,
        ),
        copy=jit(decode.copy_cache, in_shardings=(state, here, here), donate_argnums=0),
        decode={
            places: jax.jit(
                functools.partial(decode_chunk, places=places),
                in_shardings=(weights, state, here, here, here),
                out_shardings=(state, here),
                donate_argnums=1,
            )
            for places in shape.places
        },
    )


def _formats(shape: Shape) -> SlotState:
    """Where the slots lie, and in which order, in the place of each array of a `SlotState`."""
    cut, order = shape.placement.cache, shape.tuning.order
    layer: Any = (cut, cut)
    if order is not None:
        layer = (Format(Layout(order.keys), cut), Format(Layout(order.values), cut))
    cache: Any = [layer] * shape.config.num_layers
    replicated: Any = shape.placement.replicated
    return SlotState(cache=cache, hidden=replicated, length=replicated)


def lower(
    shape: Shape, names: Collection[str] | None = None, params: Params | None = None
) -> dict[str, jax.stages.Lowered]:
    """The programs of an engine, lowered for its devices: nothing runs, no array is made.

    The devices may be of a topology (`jax.experimental.topologies`) that this machine has not; only
    the compiler for it is needed, and that by `compile()` alone.

        lowered = programs.lower(shape, ["decode 4096"])
        lowered["decode 4096"].compile().memory_analysis()

    Args:
      shape: of the engine; its config says no `auto`, and names no kernel of another platform.
      names: which of `names_of` to lower; None: all.
      params: shapes and dtypes (arrays or `jax.ShapeDtypeStruct`) of the tree of `tree.unstack`;
        None: those of `shape.config` with float32 vectors, as weights that were loaded have.

    Returns:
      By name: "prefill T" for each of `shape.tuning.chunks`, "copy", "decode L" for each of
      `shape.places`.

    Raises:
      KeyError: an engine of this shape has no program of a name.
    """
    functions = _functions(shape)
    if params is None:
        params = _weights(shape.config)
    state = jax.eval_shape(functions.empty)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = _arguments(shape, params, state, key)
    chosen = list(arguments) if names is None else names
    # GPUs are one platform to a device, and several to the compiler: theirs is JAX's own choice.
    platform = shape.devices[0].platform
    platforms = None if platform == "gpu" else (platform,)
    return {
        name: _named(functions, name).trace(*arguments[name]).lower(lowering_platforms=platforms)
        for name in chosen
    }


def names_of(shape: Shape) -> list[str]:
    """The programs that an engine of this shape has."""
    prefills = [f"prefill {chunk}" for chunk in shape.tuning.chunks]
    return [*prefills, "copy", *(f"decode {places}" for places in shape.places)]


def _named(functions: _Functions, name: str) -> Any:
    kind, _, size = name.partition(" ")
    return functions.decode[int(size)] if kind == "decode" else getattr(functions, kind)


def _arguments(shape: Shape, params: Params, state: SlotState, key: Any) -> dict[str, tuple]:
    """What each program of `names_of` is called with; of shapes or of arrays."""
    of_slots, of_rows = np.zeros(shape.slots, np.int32), np.zeros(shape.rows, np.int32)
    arguments: dict[str, tuple] = {"copy": (state, of_rows[0], of_rows[0])}
    for places in shape.places:
        seeds = (key, of_slots.astype(np.uint32))
        arguments[f"decode {places}"] = (params, state, of_slots, of_slots, seeds)
    for chunk in shape.tuning.chunks:
        empty = PrefillRows(
            slots=of_rows,
            tokens=np.zeros((shape.rows, chunk), np.int32),
            starts=of_rows,
            counts=of_rows,
            newest=of_rows.astype(bool),
        )
        arguments[f"prefill {chunk}"] = (params, state, empty)
    return {name: arguments[name] for name in names_of(shape)}


def _weights(config: ModelConfig) -> Params:
    """Shapes and dtypes of the tree that an engine decodes with."""

    def made(key: chex.PRNGKey) -> Params:
        return tree.unstack(transformer.init(config, key), config.dtype, config.matmul_dtype)

    return jax.eval_shape(made, jax.eval_shape(lambda: jax.random.key(0)))


@functools.cache
def of(shape: Shape) -> "Programs":
    """The programs of a shape: the same object every time."""
    return Programs(shape)


class Programs:
    """Prefill, copy and decode, compiled when they are first asked for.

    Attributes:
      compiled: how many programs have been compiled.
    """

    def __init__(self, shape: Shape) -> None:
        self.compiled = 0
        self._shape = shape
        self._functions = _functions(shape)
        self._executables: dict[str, Any] = {}
        self._complete = False

    def empty_state(self) -> SlotState:
        """`decode.empty_state`, made on the devices and in the order of its cache."""
        return self._functions.empty()

    def warm_up(self, params: Params, state: SlotState, key: chex.PRNGKey) -> None:
        """Compiles everything, and refuses to compile anything later; runs nothing.

        Args:
          params: the weights of an engine.
          state: its slots; they stay as they are.
          key: its base key.
        """
        for name, args in _arguments(self._shape, params, state, key).items():
            self._executable(name, args)
        self._complete = True

    def prefill(self, params: Params, state: SlotState, rows: PrefillRows) -> SlotState:
        """`decode.prefill`; donates the state.  One program for each length of a chunk."""
        args = (params, state, rows)
        return self._executable(f"prefill {rows.tokens.shape[1]}", args)(*args)

    def copy(self, state: SlotState, source: int, target: int) -> SlotState:
        """`decode.copy_cache`; donates the state."""
        args = (state, np.int32(source), np.int32(target))
        return self._executable("copy", args)(*args)

    def decode(
        self,
        params: Params,
        state: SlotState,
        *,
        tokens: np.ndarray,
        budget: np.ndarray,
        key: chex.PRNGKey,
        episodes: np.ndarray,
        longest: int,
    ) -> tuple[SlotState, Chunk]:
        """`decode.decode_chunk`, reading no more places than it must; donates the state.

        Args:
          params: as there, like those that are not named here.
          state: as there.
          tokens: as there.
          budget: as there.
          key: the base of all episodes' keys.
          episodes: [B] uint32, the number of each slot's episode.
          longest: tokens in the longest cache of a slot that writes, before the call.
        """
        needed = longest + self._shape.steps
        all_places = self._shape.context_length
        places = next((n for n in self._shape.places if n >= needed), all_places)
        args = (params, state, tokens, budget, (key, episodes))
        return self._executable(f"decode {places}", args)(*args)

    def _executable(self, name: str, args: tuple) -> Any:
        if name not in self._executables:
            assert not self._complete, f"{name} would be compiled after the warm-up"
            function = _named(self._functions, name)
            self._executables[name] = function.lower(*args).compile()
            self.compiled += 1
        return self._executables[name]
