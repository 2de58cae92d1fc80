"""The compiled inside of engines of one shape: each program once, whatever the weights.

Engines of the same `Shape` share their programs, so new weights (the next round's, an
evaluation's) compile nothing.  Programs are compiled ahead of time: one that is given another
shape refuses it, and nothing is ever compiled in its place.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import chex
import jax
import numpy as np

from spa_jax.models.config import ModelConfig, Params
from spa_jax.sampling import decode
from spa_jax.sampling.decode import Chunk, PrefillRows, SlotState


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program depends on.

    Attributes:
      config: the model's shape.
      dtype: of the weights and of the cache.
      slots: conversations held at once.
      context_length: tokens a conversation may have.
      steps: decoding steps of a chunk.
      end_of_turn: the ids that close a turn.
      temperature: see `decode.draw`.
      top_k: see `decode.draw`.
      top_p: see `decode.draw`.
      device: where it runs.
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
    device: jax.Device


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
        self._executables: dict[Hashable, Any] = {}
        self._complete = False
        config = shape.config

        def decode_chunk(
            params: Params,
            state: SlotState,
            tokens: jax.Array,
            budget: jax.Array,
            seeds: tuple[chex.PRNGKey, jax.Array],
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
            )

        self._prefill = jax.jit(functools.partial(decode.prefill, config), donate_argnums=1)
        self._copy = jax.jit(decode.copy_cache, donate_argnums=0)
        self._decode = jax.jit(decode_chunk, donate_argnums=1)

    def warm_up(
        self, params: Params, state: SlotState, key: chex.PRNGKey, rows: int, chunks: Sequence[int]
    ) -> None:
        """Compiles everything, and refuses to compile anything later; runs nothing.

        Args:
          params: the weights of an engine.
          state: its slots; they stay as they are.
          key: its base key.
          rows: chunks that a prefill call reads.
          chunks: the lengths that they can have.
        """
        slots = np.zeros(state.length.shape, np.int32)
        row = np.zeros(rows, np.int32)
        for chunk in chunks:
            empty = PrefillRows(
                slots=row,
                tokens=np.zeros((rows, chunk), np.int32),
                starts=row,
                counts=row,
                newest=row.astype(bool),
            )
            name = ("prefill", empty.tokens.shape)
            self._executable(name, self._prefill, (params, state, empty))
        self._executable("copy", self._copy, (state, row[0], row[0]))
        seeds = (key, slots.astype(np.uint32))
        self._executable("decode", self._decode, (params, state, slots, slots, seeds))
        self._complete = True

    def prefill(self, params: Params, state: SlotState, rows: PrefillRows) -> SlotState:
        """`decode.prefill`; donates the state.  One program for each shape of the tokens."""
        args = (params, state, rows)
        return self._executable(("prefill", rows.tokens.shape), self._prefill, args)(*args)

    def copy(self, state: SlotState, source: int, target: int) -> SlotState:
        """`decode.copy_cache`; donates the state."""
        args = (state, np.int32(source), np.int32(target))
        return self._executable("copy", self._copy, args)(*args)

    def decode(
        self,
        params: Params,
        state: SlotState,
        *,
        tokens: np.ndarray,
        budget: np.ndarray,
        key: chex.PRNGKey,
        episodes: np.ndarray,
    ) -> tuple[SlotState, Chunk]:
        """`decode.decode_chunk`; donates the state.

        Args:
          params: as there, like those that are not named here.
          state: as there.
          tokens: as there.
          budget: as there.
          key: the base of all episodes' keys.
          episodes: [B] uint32, the number of each slot's episode.
        """
        args = (params, state, tokens, budget, (key, episodes))
        return self._executable("decode", self._decode, args)(*args)

    def _executable(self, name: Hashable, function: Any, args: tuple) -> Any:
        if name not in self._executables:
            assert not self._complete, f"{name} would be compiled after the warm-up"
            self._executables[name] = function.lower(*args).compile()
            self.compiled += 1
        return self._executables[name]
