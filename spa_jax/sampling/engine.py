"""The generation engine: a host-side shell around `decode`.

It holds `slots` conversations on the device.  A caller says which ids to append to which
slot (`append`) and lets some slots write a turn (`generate`); nothing that is in the cache
is ever encoded again, not even by another slot (episodes open with the same instruction),
and no shape depends on the data.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.models import transformer
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.sampling import decode
from spa_jax.trajectory import Sampling

_CHUNKS = (8, 32)  # tokens a prefill call appends to a slot: the compiled shapes
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
        self._params = jax.jit(transformer.unstack)(params)
        self._state = decode.empty_state(config, slots, context_length)
        self._length = np.zeros(slots, np.int64)
        self._unfed: list[list[int]] = [[] for _ in range(slots)]
        # The ids whose keys and values lie in a slot's cache; they outlive the conversation.
        self._cached: list[list[int]] = [[] for _ in range(slots)]
        self._base_key = jax.random.key(seed)
        self._keys = jax.random.split(self._base_key, slots)
        self._prefill = jax.jit(functools.partial(decode.prefill, config), donate_argnums=1)
        self._copy = jax.jit(decode.copy_cache, donate_argnums=0)
        self._decode = jax.jit(
            functools.partial(
                decode.decode_turn,
                config,
                end_of_turn=end_of_turn,
                max_new_tokens=sampling.max_new_tokens,
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
        key = jax.random.fold_in(self._base_key, episode)
        self._keys = self._keys.at[slot].set(key)

    def fits(self, slot: int, ids: Sequence[int]) -> bool:
        """Whether the slot has room for `ids` and one more token."""
        return self._length[slot] + len(self._unfed[slot]) + len(ids) < self.context_length

    def append(self, ids: Mapping[int, Sequence[int]]) -> None:
        """Appends ids to slots, `{slot: ids}`, in chunks of fixed shape."""
        pending = {slot: self._unfed[slot] + list(new) for slot, new in ids.items()}
        for slot in pending:
            self._unfed[slot] = []
        self._reuse(pending)
        while pending:
            chunk = _CHUNKS[-1] if max(map(len, pending.values())) > _CHUNKS[0] else _CHUNKS[0]
            # The longest first: they are the ones that need another call anyway.
            order = sorted(pending, key=lambda slot: -len(pending[slot]))
            small = max(1, self.slots // 4)
            rows = self.slots if len(order) > 2 * small else small
            self._prefill_chunk(order[:rows], pending, rows, chunk)
            pending = {slot: rest for slot, rest in pending.items() if rest}

    def _reuse(self, pending: dict[int, list[int]]) -> None:
        """Takes what empty slots open with from the cache of a slot that has it."""
        fresh = [slot for slot in pending if self._length[slot] == 0]
        for place, slot in enumerate(fresh):
            ids = pending[slot]
            donor = max(range(self.slots), key=lambda s: (_common(ids, self._cached[s]), s == slot))
            shared = _common(ids, self._cached[donor])
            if shared >= _SHARED_LEAST:
                if donor != slot:
                    self._state = self._copy(self._state, donor, slot)
                self._cached[slot] = ids[:shared]
                self._length[slot] = shared
                pending[slot] = ids[shared:]
                self.reused_tokens += shared
                continue
            # Nobody has it yet: this slot is the first, if others are to follow.
            wanted = max((_common(ids, pending[other]) for other in fresh[place + 1 :]), default=0)
            if wanted >= _SHARED_LEAST:
                opening = {slot: ids[:wanted]}
                while opening[slot]:
                    self._prefill_chunk([slot], opening, max(1, self.slots // 4), _CHUNKS[-1])
                pending[slot] = ids[wanted:]

    def _prefill_chunk(
        self, slots: list[int], pending: dict[int, list[int]], rows: int, chunk: int
    ) -> None:
        every = rows == self.slots
        tokens = np.zeros((rows, chunk), np.int32)
        index = np.full(rows, self.slots, np.int32)  # out of range: padding
        starts, counts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for place, slot in enumerate(slots):
            row = slot if every else place
            head, pending[slot] = pending[slot][:chunk], pending[slot][chunk:]
            tokens[row, : len(head)] = head
            index[row], starts[row], counts[row] = slot, self._length[slot], len(head)
            self._feed(slot, head)
            self.prefilled_tokens += len(head)
        self._state = self._prefill(
            self._params, self._state, tokens, starts, counts, None if every else index
        )

    def _feed(self, slot: int, ids: list[int]) -> None:
        """Records that the ids went into the slot's cache."""
        self._cached[slot] = self._cached[slot][: self._length[slot]] + ids
        self._length[slot] += len(ids)

    def generate(self, slots: Sequence[int]) -> dict[int, Response]:
        """Lets the policy write one turn in each of `slots`, all of them prefilled."""
        active = np.zeros(self.slots, bool)
        active[list(slots)] = True
        self._state, turn = self._decode(self._params, self._state, jnp.asarray(active), self._keys)
        tokens, log_probs, count, ended = jax.device_get(
            (turn.tokens, turn.log_probs, turn.count, turn.ended)
        )
        responses = {}
        for slot in slots:
            ids = tokens[slot, : count[slot]].tolist()
            self._feed(slot, ids[:-1])  # the last one was not
            self._unfed[slot] = ids[-1:]
            self.generated_tokens += len(ids)
            responses[slot] = Response(
                ids, log_probs[slot, : count[slot]].tolist(), bool(ended[slot])
            )
        return responses


def _common(ids: Sequence[int], cached: Sequence[int]) -> int:
    """How many ids two lists open with in common, short of all of the first.

    The last id is encoded in any case: the policy writes after its hidden state.
    """
    limit = min(len(ids) - 1, len(cached))
    return next((n for n in range(limit) if ids[n] != cached[n]), max(limit, 0))
