"""Accelerators: what one has, and what it can do at most.

TPUs by the name that a topology starts with.  Their memory is what the compiler leaves to a
program: its own refusals say how much that is (libtpu 0.0.42).  Peaks are the vendors', of bfloat16
without sparsity: cloud.google.com/tpu/docs/v5e and so on; the data sheets of NVIDIA's A100, H100,
H200 and L4 (SXM where there is a choice).
"""

import dataclasses

from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that a device can do.

    Attributes:
      flops: products, a second.
      bandwidth: of its memory, bytes a second.
    """

    flops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip(Peak):
    """A TPU that can be compiled for.

    Attributes:
      hbm_gib: memory that a program can have, GiB.
      hertz: of the clock that the compiler's cycles are of.
    """

    hbm_gib: float
    hertz: float


CHIPS = {
    "v4": Chip(hbm_gib=30.75, flops=275e12, bandwidth=1228e9, hertz=1.05e9),
    "v5e": Chip(hbm_gib=15.75, flops=197e12, bandwidth=819e9, hertz=1.5e9),
    "v5p": Chip(hbm_gib=95.74, flops=459e12, bandwidth=2765e9, hertz=1.75e9),
    "v6e": Chip(hbm_gib=31.25, flops=918e12, bandwidth=1640e9, hertz=1.75e9),
}

# How JAX's `device_kind` begins, up to the end of a word.  A longer name comes first.
_KINDS: dict[str, Peak] = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5e": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v5p": CHIPS["v5p"],
    "TPU v6": CHIPS["v6e"],
    "TPU v6e": CHIPS["v6e"],
    "NVIDIA A100-SXM4-40GB": Peak(flops=312e12, bandwidth=1555e9),
    "NVIDIA A100": Peak(flops=312e12, bandwidth=2039e9),
    "NVIDIA H100": Peak(flops=989e12, bandwidth=3350e9),
    "NVIDIA H200": Peak(flops=989e12, bandwidth=4800e9),
    "NVIDIA L4": Peak(flops=121e12, bandwidth=300e9),
}


def peak(kind: str) -> Peak | None:
    """What a device can do at most, by JAX's `device_kind`; None of one that is not known."""
    return next(
        (
            known
            for name, known in _KINDS.items()
            if kind.startswith(name) and not kind[len(name) : len(name) + 1].isalnum()
        ),
        None,
    )


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
