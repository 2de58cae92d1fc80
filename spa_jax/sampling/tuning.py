"""How the engine's programs are laid out for a kind of device; none of it changes a token.

The cache's axes are the same everywhere (`attention.LayerCache`).  What differs is the order in
which they lie in memory.  A token is written at (slot, place), and a TPU writes in place only
where these two are outermost; else it copies the whole cache into that order and back:

    keys     [slots, heads, K, places]      in memory  slots, places, heads, K    (0, 3, 1, 2)
    values   [slots, heads, places, K]      in memory  slots, places, heads, K    (0, 2, 1, 3)

With a single key head the order is slots, heads, places, K: else a TPU, whose tiles are of the
two innermost axes, would pad that one head to several.
"""

import dataclasses

from spa_jax.models.kernels.attention import CacheOrder

_OUTERMOST = CacheOrder(keys=(0, 3, 1, 2), values=(0, 2, 1, 3))
_ONE_HEAD = CacheOrder(keys=(0, 1, 3, 2), values=(0, 1, 2, 3))


# Of an accelerator: up to some 250 tokens a call cost it what reading the weights costs, and each
# row's scores over the whole context have to lie somewhere.
_CHUNKS, _MOST_ROWS = (64, 256), 4
# Decoding reads a quarter or all of the places.  A TPU copies a part before it multiplies it: by
# its compiler's cycles a step takes 0.68 of the time with a quarter of 4096, and no less with half.
_PARTS = (4, 1)
_LANES = 128  # places that a TPU reads at once


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What suits a device.

    Attributes:
      order: of the cache's axes in memory; None: as the arrays have them.
      chunks: tokens of a chunk that a prefill call reads, ascending: the compiled shapes.
      most_rows: chunks that a prefill call reads, at most.
      parts: decoding has a program for each of these parts of the context, of the first 1 / part
        of the places; the largest part is 1.
    """

    order: CacheOrder | None = None
    chunks: tuple[int, ...] = (16, 24, 32, 48)
    most_rows: int = 1 << 30
    parts: tuple[int, ...] = (1,)

    def rows(self, slots: int) -> int:
        """Chunks that a prefill call reads."""
        return min(-(-slots // 4), self.most_rows)

    def places(self, context_length: int) -> tuple[int, ...]:
        """The numbers of places that decoding reads, ascending; the last is all."""
        found = {-(-context_length // (part * _LANES)) * _LANES for part in self.parts if part > 1}
        return (*sorted(n for n in found if n < context_length), context_length)


CPU = Tuning()


def of(platform: str, kv_heads: int) -> Tuning:
    """What suits a platform.

    Args:
      platform: a device's: cpu, gpu or tpu.
      kv_heads: key heads of a layer that lie on one device.
    """
    if platform == "cpu":
        return CPU
    if platform != "tpu":
        return Tuning(chunks=_CHUNKS, most_rows=_MOST_ROWS)
    order = _ONE_HEAD if kv_heads == 1 else _OUTERMOST
    return Tuning(order=order, chunks=_CHUNKS, most_rows=_MOST_ROWS, parts=_PARTS)
