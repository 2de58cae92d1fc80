"""Chips by the name that a topology starts with: what a device has, and what it can do at most.

Memory is what the compiler leaves to a program: its own refusals say how much that is (libtpu
0.0.42).  Peaks are the vendor's (cloud.google.com/tpu/docs/v5e and so on), of bfloat16.
"""

import dataclasses

from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      hbm_gib: memory that a program can have, GiB.
      flops: products' peak, a second.
      bandwidth: of its memory, bytes a second.
      hertz: of the clock that the compiler's cycles are of.
    """

    hbm_gib: float
    flops: float
    bandwidth: float
    hertz: float


CHIPS = {
    "v4": Chip(hbm_gib=30.75, flops=275e12, bandwidth=1228e9, hertz=1.05e9),
    "v5e": Chip(hbm_gib=15.75, flops=197e12, bandwidth=819e9, hertz=1.5e9),
    "v5p": Chip(hbm_gib=95.74, flops=459e12, bandwidth=2765e9, hertz=1.75e9),
    "v6e": Chip(hbm_gib=31.25, flops=918e12, bandwidth=1640e9, hertz=1.75e9),
}


def of(topology: str) -> Chip:
    """The chip of a topology such as v5e:4x4.

    Raises:
      UserError: it is none that is known.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not all(part.isdecimal() for part in shape.split("x")):
        raise UserError(
            f"--compile={topology}: write CHIP:SHAPE, such as v5e:4x4 or v5p:2x2x2; the chips are "
            + ", ".join(CHIPS)
            + " (a GPU's compiler is not asked: it estimates no cycles)"
        )
    return CHIPS[name]
