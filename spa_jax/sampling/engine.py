"""The generation engine: a host-side shell around `decode`, with continuous batching.

It holds `slots` conversations on the device.  A caller gives a slot what it reads next
(`submit`) and calls `advance`, which reads for some slots, writes a few tokens in all that
have read, and hands back the turns that ended; who is slow holds nobody up.  Nothing that is
in the cache is ever encoded again, not even by another slot (episodes open with the same
instruction, and those of one task with the same observation), and no shape depends on the data.

Two slots over two turns, chunks of 3 steps; `i` the shared instruction, `o` observation, `w`
written, `e` end of turn (written by the policy, fed as the first token of the next observation),
`.` a place that holds nothing of this conversation, or nothing yet:

                 slot 0                          slot 1
    place        0 1 2 3 4 5 6 7 8 9 a b c       0 1 2 3 4 5 6 7 8 9 a b c     length
    submit       i i i o o                       (its environment is still thinking)
    advance      reads 5 at 0..4                                               5, 0
                 . . . . . w w w .               writes 4: one drawn before    8, 0
                                                 the first step and one after
                                                 each of 3; the 4th is not fed
    submit                                       i i i o
    advance                                      i i i are slot 0's, copied;   8, 4
                                                 reads o at 3
                 . . . . . . . . w w             writes w e: w is at 4         10, 5
                 writes e: the turn is over      the turn is over
    cache        i i i o o w w w w w . . .       i i i o w . . . . . . . .
    submit       o o                             o
    advance      reads e o o at a, b, c          reads e o at 5, 6: one call   13, 7

A token at place p sees the places 0..p of its own slot; what an earlier conversation, or a token
that was dropped, left behind that is masked until it is overwritten.
"""

import dataclasses
import enum
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from spa_jax import chips
from spa_jax.models.config import ModelConfig, Params
from spa_jax.sampling import placement as placement_lib
from spa_jax.sampling import programs, tuning, weights
from spa_jax.sampling.decode import PrefillRows
from spa_jax.sampling.placement import Placement
from spa_jax.sampling.tuning import Tuning
from spa_jax.trajectory import Sampling

_SHARED_LEAST = 16  # tokens; a shorter opening is encoded again (not tuned)


class Ending(enum.StrEnum):
    """Why a turn is over."""

    END_OF_TURN = "end_of_turn"  # the policy wrote an id that closes a turn
    STOP = "stop"  # what it wrote holds a stop string
    MAX_TOKENS = "max_tokens"  # it had its tokens
    CONTEXT_FULL = "context_full"  # the slot has no place left
    DEADLINE = "deadline"  # it took too long


@dataclasses.dataclass(frozen=True)
class Response:
    """One turn of the policy.

    Attributes:
      ids: the sampled ids, with the one that closed the turn if one did.
      log_probs: log softmax(logits / temperature) of each id.
      ending: why it is over.
      stop: the stop string, if one ended it.
    """

    ids: list[int]
    log_probs: list[float]
    ending: Ending
    stop: str = ""

    @property
    def ended(self) -> bool:
        """Whether the policy closed the turn itself, and no limit cut it."""
        return self.ending in (Ending.END_OF_TURN, Ending.STOP)


@dataclasses.dataclass
class Usage:
    """What an engine has done since it was made.

    Attributes:
      prefill_s: seconds of reading, waited for.
      decode_s: seconds of writing, waited for.
      prefilled: tokens read.
      reused: tokens that were not read, because a slot's cache had them.
      generated: tokens written.
      places: slots x decoding steps: tokens that could have been written in that time.
      read_s: the seconds that reading the weights and the live part of the cache takes at the peak
        of the device's memory, in these decoding steps; 0 of a device that `chips` does not know.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefilled: int = 0
    reused: int = 0
    generated: int = 0
    places: int = 0
    read_s: float = 0.0

    @property
    def occupancy(self) -> float:
        """The share of the slots that were writing while the engine wrote."""
        return self.generated / self.places if self.places else 0.0

    def since(self, before: "Usage") -> "Usage":
        """What was done after `before`, a copy of an earlier state of this."""
        then = dataclasses.asdict(before)
        return Usage(**{name: now - then[name] for name, now in dataclasses.asdict(self).items()})


@dataclasses.dataclass
class _Turn:
    """A turn from `submit` on."""

    started: float
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Multi-turn sampling over a fixed number of slots, on one device or several of one host."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        slots: int,
        context_length: int,
        sampling: Sampling,
        end_of_turn: Sequence[int],
        seed: int,
        text: Callable[[Sequence[int]], str] | None = None,
        turn_deadline_s: float = 0.0,
        devices: Sequence[jax.Device] = (),
        cache_dtype: str = "",
        tuned: Tuning | None = None,
    ) -> None:
        """Allocates the cache; compiles nothing that an engine of the same shape has compiled.

        Args:
          config: the model's shape.
          params: its (stacked) parameters.
          slots: conversations held at once.
          context_length: tokens a conversation may have.
          sampling: how tokens are drawn.
          end_of_turn: the ids that close a turn.
          seed: the base of every episode's random key.
          text: the text of ids; only stop strings need it.
          turn_deadline_s: seconds from `submit` on that a turn may take; 0: no limit.  It is
            looked at after each chunk.
          devices: where it runs; several share each weight and the cache (`placement`), and
            compute attention by XLA.  None: JAX's first.
          cache_dtype: bfloat16 or float32, of keys and values; empty: that of the weights.
          tuned: how the programs are laid out; None: as suits the devices.  It changes no
            token.

        Raises:
          UserError: several devices do not share the key heads evenly.
        """
        self.slots = slots
        self.context_length = context_length
        self.sampling = sampling
        self.usage = Usage()
        placement = Placement(tuple(devices) or (jax.local_devices()[0],))
        tensor = len(placement.devices)
        placement_lib.check(config, tensor)
        config = placement.computed(config)
        kind = placement.devices[0].platform
        tuned = tuned or tuning.of(kind, config.num_kv_heads // tensor)
        self._params = weights.place(config, params, placement)
        dtype = self._params["embed"]["embedding"].dtype
        self._base_key = jax.device_put(jax.random.key(seed), placement.replicated)
        shape = programs.Shape(
            config=config,
            dtype=dtype,
            slots=slots,
            context_length=context_length,
            steps=programs.STEPS,
            end_of_turn=tuple(end_of_turn),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            devices=placement.devices,
            tuning=tuned,
            cache_dtype=np.dtype(cache_dtype) if cache_dtype else None,
        )
        self._programs = programs.of(shape)
        self._state = self._programs.empty_state()
        peak = chips.peak(placement.devices[0].device_kind)
        self._bandwidth = peak.bandwidth * tensor if peak else 0.0
        self._weight_bytes = _bytes(self._params)
        self._token_bytes = _bytes(self._state.cache) / (slots * context_length)
        self._text = text
        self._deadline_s = turn_deadline_s
        self._rows = shape.rows
        self._chunks = tuned.chunks
        self._length = np.zeros(slots, np.int64)  # at the start of a turn that is being written
        self._unfed: list[list[int]] = [[] for _ in range(slots)]
        self._unread: dict[int, list[int]] = {}
        self._turns: dict[int, _Turn] = {}  # of all slots that read or write
        # The ids whose keys and values lie in a slot's cache; they outlive the conversation.
        self._cached: list[list[int]] = [[] for _ in range(slots)]
        self._episodes = np.zeros(slots, np.uint32)

    @property
    def compiled(self) -> int:
        """How many programs this engine and others of its shape have compiled."""
        return self._programs.compiled

    def warm_up(self) -> None:
        """Compiles what is not compiled yet; from here on, to compile anything is an error."""
        self._programs.warm_up(self._params, self._state, self._base_key)

    def open(self, slot: int, episode: int) -> None:
        """Empties a slot for a new conversation.

        Args:
          slot: which one.
          episode: a 32-bit number that seeds the episode's tokens, whatever the slot.
        """
        self._length[slot] = 0
        self._unfed[slot] = []
        self._unread.pop(slot, None)
        self._turns.pop(slot, None)
        self._episodes[slot] = episode

    def fits(self, slot: int, ids: Sequence[int]) -> bool:
        """Whether the slot has room for `ids` and one more token."""
        return self._length[slot] + len(self._unfed[slot]) + len(ids) < self.context_length

    @property
    def busy(self) -> bool:
        """Whether a slot still reads or writes."""
        return bool(self._turns)

    def submit(self, slot: int, ids: Sequence[int]) -> None:
        """Gives a slot what it reads next; when it has, the policy writes a turn in it."""
        self._unread[slot] = self._unfed[slot] + list(ids)
        self._unfed[slot] = []
        self._turns[slot] = _Turn(time.monotonic())

    def advance(self) -> dict[int, Response]:
        """Reads and writes a little; returns the turns that ended, by slot."""
        self._read()
        return self._write() if self._writing else {}

    @property
    def _writing(self) -> list[int]:
        """The slots that have read all and whose turn is not over."""
        return [slot for slot in self._turns if slot not in self._unread]

    def _read(self) -> None:
        """Prefills full calls, longest first, and the rest of them if few others write."""
        if not self._unread:
            return
        started = time.perf_counter()
        while self._unread:
            later = self._reuse()
            ready = {slot: ids for slot, ids in self._unread.items() if slot not in later}
            chunks = sum(-(-len(ids) // self._chunks[-1]) for ids in ready.values())
            if not later and chunks < min(self._rows, len(self._writing)):
                break  # wait for more chunks: a call with fewer costs the same
            order = sorted(ready, key=lambda slot: -len(ready[slot]))
            self._prefill_call(order[: self._rows])
            for slot in [slot for slot, rest in self._unread.items() if not rest]:
                del self._unread[slot]
        jax.block_until_ready(self._state.length)  # to know what is reading and what is writing
        self.usage.prefill_s += time.perf_counter() - started

    def _reuse(self) -> set[int]:
        """Takes what empty slots open with from the cache of a slot that has it.

            slot     0        1        2        3        opens with
            unread   i i a a  i i a a  i i b b  i i b b  instruction and its task's observation
            1st      reads    later    later    later
            2nd      writes   copies   copies   later    1 copies i i a, 2 copies i i
            3rd      writes   writes   writes   copies   3 copies i i b from 2

        Returns:
          The slots that had better wait until another one has read what they share with it.
        """
        later: set[int] = set()
        for slot in sorted(slot for slot in self._unread if self._length[slot] == 0):
            ids = self._unread[slot]
            donor = max(range(self.slots), key=lambda s: (_common(ids, self._cached[s]), s == slot))
            shared = _common(ids, self._cached[donor])
            coming = max((_common(ids, others) for others in self._coming(slot, later)), default=0)
            if coming - shared >= _SHARED_LEAST:
                later.add(slot)
            elif shared >= _SHARED_LEAST:
                if donor != slot:
                    self._state = self._programs.copy(self._state, donor, slot)
                self._cached[slot] = ids[:shared]
                self._length[slot] = shared
                self._unread[slot] = ids[shared:]
                self.usage.reused += shared
        return later

    def _coming(self, slot: int, later: set[int]) -> list[list[int]]:
        """What the caches of other slots will hold when these have read.

        Of the empty slots, only those before this one count: else each would wait for the other.
        """
        return [
            self._cached[other][: self._length[other]] + ids
            for other, ids in self._unread.items()
            if other != slot and other not in later and (self._length[other] > 0 or other < slot)
        ]

    def _prefill_call(self, slots: list[int]) -> None:
        """One call of fixed shape: slots read, in this order, as much as goes into its rows.

        What a slot has not read is cut into chunks, a row each.
        """
        longest = max(len(self._unread[slot]) for slot in slots)
        chunk = next((size for size in self._chunks if size >= longest), self._chunks[-1])
        cut = [
            (slot, self._unread[slot][start : start + chunk])
            for slot in slots
            for start in range(0, len(self._unread[slot]), chunk)
        ][: self._rows]
        tokens = np.zeros((self._rows, chunk), np.int32)
        index = np.full(self._rows, self.slots, np.int32)  # out of range: padding
        starts, counts = np.zeros(self._rows, np.int32), np.zeros(self._rows, np.int32)
        newest = np.zeros(self._rows, bool)
        for row, (slot, ids) in enumerate(cut):
            tokens[row, : len(ids)] = ids
            index[row], starts[row], counts[row] = slot, self._length[slot], len(ids)
            newest[row] = row + 1 == len(cut) or cut[row + 1][0] != slot
            self._feed(slot, ids)
            self._unread[slot] = self._unread[slot][len(ids) :]
            self.usage.prefilled += len(ids)
        self._state = self._programs.prefill(
            self._params,
            self._state,
            PrefillRows(slots=index, tokens=tokens, starts=starts, counts=counts, newest=newest),
        )

    def _feed(self, slot: int, ids: list[int]) -> None:
        """Records that the ids went into the slot's cache."""
        self._cached[slot] = self._cached[slot][: self._length[slot]] + ids
        self._length[slot] += len(ids)

    def _write(self) -> dict[int, Response]:
        """One chunk of decoding in all slots whose turn is being written."""
        started = time.perf_counter()
        writing = self._writing
        tokens, budget = np.full(self.slots, -1, np.int32), np.zeros(self.slots, np.int32)
        longest = 0
        for slot in writing:
            ids = self._turns[slot].ids
            longest = max(longest, int(self._length[slot]) + len(ids[:-1]))  # the last is not fed
            tokens[slot] = ids[-1] if ids else -1
            budget[slot] = self.sampling.max_new_tokens - len(ids)
        self._state, chunk = self._programs.decode(
            self._params,
            self._state,
            tokens=tokens,
            budget=budget,
            key=self._base_key,
            episodes=self._episodes,
            longest=longest,
        )
        chunk = jax.device_get(chunk)
        self.usage.decode_s += time.perf_counter() - started
        self.usage.generated += int(chunk.count.sum())
        self._note_reading(int(chunk.count.max()), writing)
        responses = {}
        for slot in writing:
            turn, count = self._turns[slot], chunk.count[slot]
            turn.ids += chunk.tokens[slot, :count].tolist()
            turn.log_probs += chunk.log_probs[slot, :count].tolist()
            going_on, ended = bool(chunk.writing[slot]), bool(chunk.ended[slot])
            response = self._over(turn, int(count), going_on, ended)
            if response is not None:
                del self._turns[slot]
                self._feed(slot, response.ids[:-1])  # the last id, fed or not, opens the next turn
                self._unfed[slot] = response.ids[-1:]
                responses[slot] = response
        return responses

    def _note_reading(self, steps: int, writing: list[int]) -> None:
        """Counts decoding steps, and the least time that their reading takes."""
        self.usage.places += self.slots * steps
        if self._bandwidth:
            live = sum(int(self._length[slot]) + len(self._turns[slot].ids) for slot in writing)
            read = self._weight_bytes + self._token_bytes * live
            self.usage.read_s += steps * read / self._bandwidth

    def _over(self, turn: _Turn, new: int, going_on: bool, ended: bool) -> Response | None:
        """The turn, if it is over after the `new` tokens of a chunk."""
        if self.sampling.stop and (found := self._stopped(turn.ids, new)):
            end, stop = found
            return Response(turn.ids[:end], turn.log_probs[:end], Ending.STOP, stop)
        if ended:
            ending = Ending.END_OF_TURN
        elif not going_on:
            full = len(turn.ids) < self.sampling.max_new_tokens
            ending = Ending.CONTEXT_FULL if full else Ending.MAX_TOKENS
        elif 0 < self._deadline_s < time.monotonic() - turn.started:
            ending = Ending.DEADLINE
        else:
            return None
        return Response(turn.ids, turn.log_probs, ending)

    def _stopped(self, ids: list[int], new: int) -> tuple[int, str] | None:
        """(number of ids up to the end of the first stop string, that string), if there is one.

        It ends within the `new` last ids: those before were looked through after their chunk.
        """
        assert self._text is not None, "stop strings need the text of the ids"
        for end in range(len(ids) - new + 1, len(ids) + 1):
            text = self._text(ids[:end])
            found = [stop for stop in self.sampling.stop if stop in text]
            if found:
                return end, min(found, key=text.index)
        return None


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _common(ids: Sequence[int], cached: Sequence[int]) -> int:
    """How many ids two lists open with in common, short of all of the first.

    The last id is encoded in any case: the policy writes after its hidden state.
    """
    low, high = 0, max(0, min(len(ids) - 1, len(cached)))
    while low < high:  # they have the first `low` in common, and no more than `high`
        middle = (low + high + 1) // 2
        if ids[low:middle] == cached[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
