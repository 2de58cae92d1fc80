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


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What suits a device.

    Attributes:
      order: of the cache's axes in memory; None: as the arrays have them.
      chunks: tokens of a chunk that a prefill call reads, ascending: the compiled shapes.
    """

    order: CacheOrder | None = None
    chunks: tuple[int, ...] = (16, 24, 32, 48)


CPU = Tuning()


def of(platform: str, kv_heads: int) -> Tuning:
    """What suits a platform.

    Args:
      platform: a device's: cpu, gpu or tpu.
      kv_heads: key heads of a layer that lie on one device.
    """
    if platform != "tpu":
        return CPU
    return Tuning(order=_ONE_HEAD if kv_heads == 1 else _OUTERMOST)
