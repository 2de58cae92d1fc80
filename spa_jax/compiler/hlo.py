"""What an optimised program does, read off its text: what travels, what is copied, what it takes.

XLA's own `cost_analysis` counts a loop's body once.  Here every instruction counts as often as the
loops around it run:

    ENTRY main           x 1
      while body         x 28      28 layers: the trips are a constant of the loop's condition
        fusion           x 28

Cycles are those that the TPU's compiler estimates for each instruction; they leave out what waits
for another chip, and Pallas kernels.
"""

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

_WIDTHS = {"pred": 1, "f8": 1, "bf16": 2}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "%name = shape opcode(operands), attributes"; a tuple's shape may hold comments.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLS = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # the compiler writes the largest number where it has none
_CHAIN = re.compile(r'chain_id="(\d+)"')
_PLACED = re.compile(r"\w+\[[\d,]*\]\{[^}]*\}")  # an array's shape and how it lies
_OWN = "S(1)"
_MOVES = ("copy", "copy-start", "transpose")
_CONSTANT = re.compile(r"^s32\[\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text.

    Attributes:
      name: of its result.
      shape: of its result, as written.
      opcode: what it does.
      rest: operands and attributes, as written.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> str:
        """The text between its brackets."""
        return self.rest.partition(")")[0]

    @property
    def largest(self) -> int:
        """Bytes of the largest array of its result."""
        return max((size for _, _, size in arrays(self.shape)), default=0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that devices exchange.

    Attributes:
      kind: all-gather, all-reduce, ...
      dtype: of the numbers that travel.
      size: bytes of all of its results or operands together, whichever are more.
      times: how often it runs.
      in_loop: whether a loop runs it.
    """

    kind: str
    dtype: str
    size: int
    times: int
    in_loop: bool

    @property
    def total(self) -> int:
        """Bytes a device."""
        return self.size * self.times


class Program:
    """An optimised program's text."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], [])
                if header[1]:
                    self._entry = header[2]
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs, by its name."""
        return self._counted(trips=True)

    def _counted(self, *, trips: bool) -> dict[str, int]:
        """How often each computation runs; `trips`: whether a loop's trips count."""
        counts: Counter[str] = Counter({self._entry: 1})
        for name in self._in_order:
            for instruction in self.computations[name]:
                for role, called in _called(instruction):
                    often = self._trips(instruction) if trips and role == "body" else 1
                    counts[called] += counts[name] * often
        return counts

    @functools.cached_property
    def _in_order(self) -> list[str]:
        """The computations, callers before what they call."""
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for instruction in self.computations[name]:
                for _, called in _called(instruction):
                    visit(called)
            order.append(name)

        visit(self._entry)
        return order[::-1]

    @functools.cached_property
    def _in_loops(self) -> set[str]:
        """The computations that a loop runs."""
        inside: set[str] = set()
        for name in self._in_order:
            for instruction in self.computations[name]:
                for role, called in _called(instruction):
                    if role == "body" or name in inside:
                        inside.add(called)
        return inside

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: the constant that its condition compares with."""
        condition = next(called for role, called in _called(loop) if role == "condition")
        names, found = [condition], []
        for name in names:
            for instruction in self.computations.get(name, []):
                if instruction.opcode == "constant" and _CONSTANT.match(instruction.shape):
                    found.append(int(instruction.operands))
                names += [called for _, called in _called(instruction) if called not in names]
        return max([1, *found])

    def _instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all that runs."""
        for name in self._in_order:
            for instruction in self.computations[name]:
                yield name, instruction

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """What devices exchange, each thing once, however many fusions a transfer hides in."""
        found: list[Collective] = []
        chains: set[str] = set()
        shapes = {i.name: i.shape for _, i in self._instructions()}
        for name, instruction in self._instructions():
            kind = next((k for k in _COLLECTIVES if instruction.opcode in (k, f"{k}-start")), None)
            chain = _CHAIN.search(instruction.rest)
            if kind is None or (chain and chain[1] in chains):
                continue
            if chain:  # its start, its steps and its end each repeat it
                chains.add(chain[1])
            results = list(arrays(instruction.shape))
            named = re.findall(r"%([\w.\-]+)", instruction.operands)
            operands = [a for n in named for a in arrays(shapes.get(n, ""))]
            size = max(sum(s for *_, s in results), sum(s for *_, s in operands))
            if instruction.opcode.endswith("-start"):  # its result holds the operand too
                size = max(s for *_, s in results)
            found.append(
                Collective(
                    kind=kind,
                    dtype=results[0][0],
                    size=size,
                    times=self.times[name],
                    in_loop=name in self._in_loops,
                )
            )
        return found

    @property
    def collective_bytes(self) -> int:
        """Bytes a device that collectives move in one run."""
        return sum(c.total for c in self.collectives)

    def by_kind(self) -> dict[str, int]:
        """Bytes a device by kind of collective."""
        totals: defaultdict[str, int] = defaultdict(int)
        for c in self.collectives:
            totals[c.kind] += c.total
        return dict(totals)

    @functools.cached_property
    def cycles(self) -> int:
        """Cycles of one run of the instructions that the compiler has estimated."""
        total = 0
        for name, instruction in self._instructions():
            found = _CYCLES.search(instruction.rest)
            if found and int(found[1]) < _NO_ESTIMATE:
                total += self.times[name] * int(found[1])
        return total

    @functools.cached_property
    def flops(self) -> int:
        """Of the products of one run: 2 x (elements of the result) x (what is summed over)."""
        total = 0
        for name in self._in_order:
            shapes = {i.name: i.shape for i in self.computations[name]}
            for instruction in self.computations[name]:
                if instruction.opcode in ("dot", "convolution"):
                    total += self.times[name] * _product_flops(instruction, shapes)
        return total

    def copies(self, elements: int) -> int:
        """How often one run writes an array of so many numbers to memory in another order.

        A fusion that does more than that writes no copy, and what it turns inside is a tile.  An
        array that is fetched into the chip's own memory (`S(1)`), or written back from it, as it
        lies, is none either.

        Args:
          elements: those of a layer's keys in a cache.
        """
        fused = {
            called
            for _, instruction in self._instructions()
            if instruction.opcode == "fusion"
            for _, called in _called(instruction)
        }
        count = 0
        for name, instruction in self._instructions():
            first = instruction.shape.partition("}")[0]
            if name in fused or next(arrays(first), ("", 0))[1] != elements:
                continue
            if instruction.opcode == "copy-start" and _lies_as_before(instruction.shape):
                continue
            opcodes = [instruction.opcode]
            if instruction.opcode == "fusion":
                opcodes += [self._root(called) for _, called in _called(instruction)]
            if any(opcode in _MOVES for opcode in opcodes):
                count += self.times[name]
        return count

    def _root(self, computation: str) -> str:
        """The opcode of its result, which is its last line."""
        return self.computations[computation][-1].opcode


def _lies_as_before(shape: str) -> bool:
    """Whether (target, source, flag) of a move from memory to memory are in one order."""
    target, source = _PLACED.findall(shape)[:2]
    moves = _OWN in target or _OWN in source
    return moves and target.replace(_OWN, "") == source.replace(_OWN, "")


def arrays(shape: str) -> Iterator[tuple[str, int, int]]:
    """(dtype, elements, bytes) of every array of a shape as written; of u32[] flags too."""
    for dtype, axes in _SHAPE.findall(shape):
        elements = math.prod(int(n) for n in axes.split(",") if n)
        yield dtype, elements, elements * _width(dtype)


def _width(dtype: str) -> int:
    """Bytes of a number."""
    if dtype in _WIDTHS:
        return _WIDTHS[dtype]
    digits = re.search(r"\d+", dtype)
    return max(1, int(digits[0]) // 8) if digits else 0


def _called(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """(role, computation) of what an instruction runs."""
    for role, names in _CALLS.findall(instruction.rest):
        for name in re.findall(r"[\w.\-]+", names):
            yield role, name


def _product_flops(instruction: Instruction, shapes: dict[str, str]) -> int:
    """Of a product or a convolution that stands for one."""
    result = next(arrays(instruction.shape))[1]
    names = re.findall(r"%([\w.\-]+)", instruction.operands)
    left, right = (list(_axes(shapes.get(name, ""))) for name in names[:2])
    if instruction.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        over = math.prod(left[int(i)] for i in (summed[1] if summed else "").split(",") if i)
        return 2 * result * over
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None or not right:
        return 0
    inputs, kernel, outputs = (
        dict(zip(marks, sizes, strict=False))
        for marks, sizes in zip(
            labels.groups(), (left, right, _axes(instruction.shape)), strict=True
        )
    )
    flops = 2.0 * result * kernel["i"]
    for axis in kernel.keys() - {"i", "o"}:
        # A product over several axes is written as a convolution over windows that hang out of the
        # array: what lies outside is not multiplied.
        flops *= min(inputs[axis], outputs[axis]) * kernel[axis] / outputs[axis]
    return int(flops)


def _axes(shape: str) -> list[int]:
    """The axes of the first array of a shape."""
    found = _SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []
