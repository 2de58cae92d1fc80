"""How far numbers are from recorded ones, and whether that is near enough."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The error that an element x of a recorded array X may have; the parts add up.

    Attributes:
      absolute: this much.
      relative: times |x|.
      of_largest: times max |X|.
    """

    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0

    def bound(self, recorded: np.ndarray) -> np.ndarray:
        """The error that each element of `recorded` may have."""
        size = np.abs(recorded)
        largest = np.max(size, initial=0.0, where=np.isfinite(size))
        return self.absolute + self.relative * size + self.of_largest * largest


EXACT = Tolerance()  # integers, names
# What the recorded numbers came with: 1e-5 for forward values, rewards and advantages, 1e-4
# relative for gradients and weights.  Beyond 1 a float32 has fewer digits after the point.
FORWARD = Tolerance(absolute=1e-5, relative=1e-6)
GRADIENT = Tolerance(absolute=5e-7, relative=1e-4, of_largest=1e-5)
STATISTIC = Tolerance(absolute=3e-5, relative=3e-6)  # sums over some hundred tokens
COEFFICIENT = Tolerance(absolute=1e-6)


@dataclasses.dataclass(frozen=True)
class Error:
    """An array's largest error, measured by its tolerance.

    Attributes:
      name: the array and the element.
      error: |ours - recorded|; infinite for another shape, or where only one is nan.
      allowed: what the element may have.
    """

    name: str
    error: float
    allowed: float

    @property
    def share(self) -> float:
        """error / allowed; a miss above 1."""
        if not self.error:
            return 0.0
        return self.error / self.allowed if self.allowed else math.inf


class Comparison:
    """The arrays of one case, compared one after the other.

    Attributes:
      errors: the largest error of every array that was compared.
      failures: what else is wrong with the case.
      unchecked: what the case holds and nothing here computes.
      notes: how something was read.
    """

    def __init__(self) -> None:
        self.errors: list[Error] = []
        self.failures: list[str] = []
        self.unchecked: list[str] = []
        self.notes: list[str] = []

    def add(
        self, name: str, ours: Any, recorded: Any, tolerance: Tolerance, slack: Any = 0.0
    ) -> None:
        """Compares one array, or one number; arguments as `largest_error`."""
        self.errors.append(largest_error(name, ours, recorded, tolerance, slack))

    def need(self, names: Iterable[str], prefix: str = "") -> None:
        """Fails the case for each array or number of these that was to be compared and was not."""
        for name in sorted(set(names)):
            if prefix + name not in self.compared:
                self.failures.append(f"{prefix}{name} is missing; fetch the file again")

    def copy(self) -> "Comparison":
        """One to go on with, that leaves this one as it is."""
        other = Comparison()
        other.errors, other.failures = list(self.errors), list(self.failures)
        other.unchecked, other.notes = list(self.unchecked), list(self.notes)
        return other

    @property
    def compared(self) -> set[str]:
        """The names of the arrays that were compared, without elements and remarks."""
        return {error.name.split("[")[0].split(" (")[0] for error in self.errors}

    @property
    def misses(self) -> list[str]:
        """A line for everything that makes the case miss."""
        wrong = [e for e in self.errors if not e.share <= 1.0]
        lines = [f"{e.name}: error {e.error:.2e}, allowed {e.allowed:.2e}" for e in wrong]
        nothing = [] if self.errors or self.failures else ["nothing in it could be compared"]
        return self.failures + lines + nothing

    @property
    def worst(self) -> Error:
        """The error that takes most of its tolerance."""
        return max(self.errors, key=lambda e: e.share, default=Error("nothing", 0.0, 0.0))


def largest_error(
    name: str, ours: Any, recorded: Any, tolerance: Tolerance, slack: Any = 0.0
) -> Error:
    """The element whose error takes most of what it may have; nan equals nan, inf equals inf.

    Args:
      name: the array's.
      ours: array-like, numbers or names.
      recorded: the same.
      tolerance: what the errors may be.
      slack: what each may be beyond that; the array's shape, or a number.
    """
    a, b = np.asarray(ours), np.asarray(recorded)
    if a.shape != b.shape:
        return Error(f"{name} (shape {list(a.shape)}, recorded {list(b.shape)})", math.inf, 0.0)
    if not b.size:
        return Error(name, 0.0, 0.0)
    if a.dtype.kind in "US" or b.dtype.kind in "US":
        error = np.where(a.astype(str) == b.astype(str), 0.0, math.inf)
        bound = np.zeros(b.shape)
    else:
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
            error = np.where(np.isnan(error), math.inf, error)
            bound = tolerance.bound(np.where(np.isfinite(b), b, 0.0)) + slack
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error == 0, 0.0, error / bound)
    at = np.unravel_index(int(np.argmax(share)), b.shape)
    where = _element(name, at)
    return Error(where, float(error[at]), float(bound[at]))


def _element(name: str, at: Sequence[Any]) -> str:
    return name + (f"[{', '.join(str(int(i)) for i in at)}]" if at else "")


def check_padding(result: Comparison, name: str, scores: np.ndarray, count: np.ndarray) -> None:
    """Behind the `count` [B] scores of a row of `scores` [B, S] there is nothing: 0, or nan."""
    behind = np.arange(scores.shape[1]) >= np.asarray(count)[:, None]
    rest = np.nan_to_num(scores[behind].astype(np.float64))
    result.add(f"{name} (padding)", np.zeros_like(rest), rest, FORWARD)
