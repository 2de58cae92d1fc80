"""What a compiler made of the engine's programs, read off its optimised HLO."""

import math
import re
from collections.abc import Iterator

from spa_jax.sampling.programs import Shape

_OPENS = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_RESULT = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = \(?\w+\[([\d,]*)\].*? ([\w\-]+)\(")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_MOVES = ("copy", "copy-start", "transpose")


def cache_copies(hlo: str, shape: Shape) -> int:
    """How many times a program copies all keys, or all values, of a layer.

    A copy is written to memory: one inside a fusion counts if the fusion does nothing after it.
    An update in place is none, and neither is a cache that is small enough to be brought into the
    chip's own memory (`S(1)`), as it lies, before it is read.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
      shape: the engine's.

    Returns:
      The instructions; one in a loop counts once.
    """
    config = shape.config
    size = shape.slots * config.num_kv_heads * config.head_dim * shape.context_length
    found = [of for of in _instructions(hlo) if of[2] == size and not _fetched(*of[3:])]
    fused = set(_CALLS.findall(hlo))
    moved_inside = {inside for inside, root, _, op, _ in found if root and op in _MOVES}
    return sum(
        op in _MOVES or (op == "fusion" and "kind=kLoop" in line and bool(moved_inside & {called}))
        for inside, _, _, op, line in found
        if inside not in fused
        for called in _CALLS.findall(line) or [""]
    )


def _fetched(op: str, line: str) -> bool:
    return op == "copy-start" and "S(1)" in line


def _instructions(hlo: str) -> Iterator[tuple[str, bool, int, str, str]]:
    """(its computation, whether it is the root, numbers of its first result, operation, line)."""
    inside = ""
    for line in hlo.splitlines():
        if (opened := _OPENS.match(line)) and not line.startswith(" "):
            inside = opened[1]
        elif result := _RESULT.match(line):
            root, sizes, op = result.groups()
            yield inside, bool(root), math.prod(int(n) for n in sizes.split(",") if n), op, line
