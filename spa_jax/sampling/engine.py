"""The generation engine: a host-side shell around `decode`, with continuous batching.

It holds `slots` conversations on the device.  A caller gives a slot what it reads next
(`submit`) and calls `advance`, which reads for some slots, writes a few tokens in all that
have read, and hands back the turns that ended; who is slow holds nobody up.  Nothing that is
in the cache is ever encoded again, not even by another slot (episodes open with the same
instruction), and no shape depends on the data.

Two slots, chunks of 3 steps; `i` the shared instruction, `o` observation, `w` written, `e`
end of turn (written by the policy, fed as the first token of the next observation):

                   slot 0                        slot 1
    submit         i i i o o                     (its environment is still thinking)
    advance        reads 5, writes w w w w
    submit                                       i i i o
    advance        writes w e, the turn ends     copies i i i from slot 0, reads o, writes w e
    cache          i i i o o w w w w w           i i i o w
    length         10                            5       places beyond are masked
    submit         o o                           o
    advance        reads e o o at 10, 11, 12     reads e o at 5, 6, in the same call

    (slot 0 wrote 4 tokens in its first chunk: one before the first step, one in each of 3.)
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from spa_jax.models import transformer
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.sampling import decode
from spa_jax.trajectory import Sampling

_CHUNKS = (16, 24, 32, 48)  # tokens a prefill call appends to a slot: the compiled shapes
_STEPS = 4  # decoding steps between two looks at who has ended
_SHARED_LEAST = 16  # tokens; a shorter opening is encoded again (not tuned)


@dataclasses.dataclass(frozen=True)
class Response:
    """One turn of the policy.

    Attributes:
      ids: the sampled ids; the last is the end-of-turn token if `ended`.
      log_probs: log softmax(logits / temperature) of each id.
      ended: whether the policy closed the turn itself.
    """

    ids: list[int]
    log_probs: list[float]
    ended: bool


@dataclasses.dataclass
class _Turn:
    """A turn while it is written."""

    ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Multi-turn sampling over a fixed number of slots."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        slots: int,
        context_length: int,
        sampling: Sampling,
        end_of_turn: int,
        seed: int,
    ) -> None:
        """Allocates the cache and compiles nothing yet.

        Args:
          config: the model's shape.
          params: its (stacked) parameters.
          slots: conversations held at once.
          context_length: tokens a conversation may have.
          sampling: how tokens are drawn.
          end_of_turn: the id that closes a turn.
          seed: the base of every episode's random key.
        """
        self.slots = slots
        self.context_length = context_length
        self.sampling = sampling
        self.generated_tokens = 0
        self.prefilled_tokens = 0
        self.reused_tokens = 0
        self._config = config
        self._params = jax.jit(transformer.unstack, static_argnames="dtype")(
            params, dtype=config.dtype
        )
        self._state = decode.empty_state(config, slots, context_length)
        self._rows = max(1, slots // 3)  # slots that a prefill call reads for
        self._length = np.zeros(slots, np.int64)  # at the start of a turn that is being written
        self._unfed: list[list[int]] = [[] for _ in range(slots)]
        self._unread: dict[int, list[int]] = {}
        self._turns: dict[int, _Turn] = {}
        # The ids whose keys and values lie in a slot's cache; they outlive the conversation.
        self._cached: list[list[int]] = [[] for _ in range(slots)]
        self._base_key = jax.random.key(seed)
        self._keys = jax.random.split(self._base_key, slots)
        self._prefill = jax.jit(functools.partial(decode.prefill, config), donate_argnums=1)
        self._copy = jax.jit(decode.copy_cache, donate_argnums=0)
        self._decode = jax.jit(
            functools.partial(
                decode.decode_chunk,
                config,
                steps=_STEPS,
                end_of_turn=end_of_turn,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            ),
            donate_argnums=1,
        )

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
        key = jax.random.fold_in(self._base_key, episode)
        self._keys = self._keys.at[slot].set(key)

    def fits(self, slot: int, ids: Sequence[int]) -> bool:
        """Whether the slot has room for `ids` and one more token."""
        return self._length[slot] + len(self._unfed[slot]) + len(ids) < self.context_length

    @property
    def busy(self) -> bool:
        """Whether a slot still reads or writes."""
        return bool(self._unread or self._turns)

    def submit(self, slot: int, ids: Sequence[int]) -> None:
        """Gives a slot what it reads next; when it has, the policy writes a turn in it."""
        self._unread[slot] = self._unfed[slot] + list(ids)
        self._unfed[slot] = []

    def advance(self) -> dict[int, Response]:
        """Reads and writes a little; returns the turns that ended, by slot."""
        self._read()
        return self._write() if self._turns else {}

    def _read(self) -> None:
        """Prefills full calls, longest first, and the rest of them if few others write."""
        self._reuse()
        while self._unread:
            if len(self._unread) < min(self._rows, len(self._turns)):
                return  # they wait for company: a call costs the same for fewer slots
            order = sorted(self._unread, key=lambda slot: -len(self._unread[slot]))
            self._prefill_chunk(order[: self._rows])
            for slot in [slot for slot, rest in self._unread.items() if not rest]:
                del self._unread[slot]
                self._turns[slot] = _Turn()

    def _reuse(self) -> None:
        """Takes what empty slots open with from the cache of a slot that has it."""
        fresh = [slot for slot in self._unread if self._length[slot] == 0]
        for place, slot in enumerate(fresh):
            ids = self._unread[slot]
            donor = max(range(self.slots), key=lambda s: (_common(ids, self._cached[s]), s == slot))
            shared = _common(ids, self._cached[donor])
            if shared >= _SHARED_LEAST:
                if donor != slot:
                    self._state = self._copy(self._state, donor, slot)
                self._cached[slot] = ids[:shared]
                self._length[slot] = shared
                self._unread[slot] = ids[shared:]
                self.reused_tokens += shared
                continue
            # Nobody has it yet: this slot is the first, if others are to follow.
            others = (self._unread[other] for other in fresh[place + 1 :])
            wanted = max((_common(ids, other) for other in others), default=0)
            while wanted - self._length[slot] >= _SHARED_LEAST:
                self._prefill_chunk([slot], wanted - int(self._length[slot]))

    def _prefill_chunk(self, slots: list[int], at_most: int = _CHUNKS[-1]) -> None:
        """One call of fixed shape: each slot reads as much as goes into it."""
        longest = min(at_most, max(len(self._unread[slot]) for slot in slots))
        chunk = next((size for size in _CHUNKS if size >= longest), _CHUNKS[-1])
        tokens = np.zeros((self._rows, chunk), np.int32)
        index = np.full(self._rows, self.slots, np.int32)  # out of range: padding
        starts, counts = np.zeros(self._rows, np.int32), np.zeros(self._rows, np.int32)
        for row, slot in enumerate(slots):
            count = min(chunk, at_most, len(self._unread[slot]))
            head, self._unread[slot] = self._unread[slot][:count], self._unread[slot][count:]
            tokens[row, :count] = head
            index[row], starts[row], counts[row] = slot, self._length[slot], count
            self._feed(slot, head)
            self.prefilled_tokens += count
        self._state = self._prefill(self._params, self._state, index, tokens, starts, counts)

    def _feed(self, slot: int, ids: list[int]) -> None:
        """Records that the ids went into the slot's cache."""
        self._cached[slot] = self._cached[slot][: self._length[slot]] + ids
        self._length[slot] += len(ids)

    def _write(self) -> dict[int, Response]:
        """One chunk of decoding in all slots whose turn is being written."""
        tokens, budget = np.full(self.slots, -1, np.int32), np.zeros(self.slots, np.int32)
        for slot, turn in self._turns.items():
            tokens[slot] = turn.ids[-1] if turn.ids else -1
            budget[slot] = self.sampling.max_new_tokens - len(turn.ids)
        self._state, chunk = self._decode(self._params, self._state, tokens, budget, self._keys)
        chunk = jax.device_get(chunk)
        responses = {}
        for slot, turn in list(self._turns.items()):
            count = chunk.count[slot]
            turn.ids += chunk.tokens[slot, :count].tolist()
            turn.log_probs += chunk.log_probs[slot, :count].tolist()
            self.generated_tokens += int(count)
            if not chunk.writing[slot]:
                del self._turns[slot]
                self._feed(slot, turn.ids[:-1])  # the last one was not
                self._unfed[slot] = turn.ids[-1:]
                responses[slot] = Response(turn.ids, turn.log_probs, bool(chunk.ended[slot]))
        return responses


def _common(ids: Sequence[int], cached: Sequence[int]) -> int:
    """How many ids two lists open with in common, short of all of the first.

    The last id is encoded in any case: the policy writes after its hidden state.
    """
    limit = min(len(ids) - 1, len(cached))
    return next((n for n in range(limit) if ids[n] != cached[n]), max(limit, 0))
