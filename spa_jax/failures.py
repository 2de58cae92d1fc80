"""Episodes that were asked for and are in no outcome: the environment failed, or one did not fit.

They are recorded whole in failures.jsonl, beside the episodes that were played.  On the terminal
each kind is told once, the first with its traceback, and then counted.
"""

import json
import os
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator

import tqdm

from spa_jax import store
from spa_jax.errors import UserError
from spa_jax.texts import replace_surrogates
from spa_jax.trajectory import Status, Trajectory

FAILURES = "failures.jsonl"
_KINDS = 5  # that are told on the terminal
_LINE = 500  # characters of what is told


def is_left_out(trajectory: Trajectory) -> bool:
    """Whether nothing was played because the opening does not fit into the context."""
    return trajectory.status is Status.CONTEXT_FULL and not trajectory.steps


def count(folder: pathlib.Path, played: Collection[store.Key]) -> tuple[int, int]:
    """Episodes of a folder that the environment failed, and that were left out; each key once.

    Args:
      folder: of the episodes.
      played: the keys of those that have an outcome: a failure that was tried again is none.
    """
    status = {key: state for key, state, _ in _records(folder) if key not in played}
    left_out = sum(state == Status.CONTEXT_FULL for state in status.values())
    return len(status) - left_out, left_out


def left_out(folder: pathlib.Path) -> dict[store.Key, str]:
    """What was said of the episodes that did not fit, by key."""
    return {key: said for key, state, said in _records(folder) if state == Status.CONTEXT_FULL}


def last(folder: pathlib.Path) -> str:
    """What the environment's last failure said, in one line; "" if there is none."""
    said = [said for _, state, said in _records(folder) if state == Status.ENV_ERROR]
    return shown(said[-1]) if said else ""


def shown(said: str) -> str:
    """The first line of what a failure says, as any terminal can show it."""
    return replace_surrogates(said.partition("\n")[0])[0][:_LINE]


def _records(folder: pathlib.Path) -> Iterator[tuple[store.Key, str, str]]:
    """(key, status, what was said) of each line, of all processes' files.

    Raises:
      UserError: a line is no record of a failure.
    """
    stem, suffix = os.path.splitext(FAILURES)
    for path in sorted(folder.glob(f"{stem}*{suffix}")):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    break  # torn: the stage repairs it when it starts again
                try:
                    record = json.loads(line)
                    key = (record["task"], record["seed"], record["attempt"])
                    yield key, str(record["status"]), str(record["final_observation"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}:{number}: no record of a failed episode ({error}); delete the line"
                    ) from error


class Told:
    """Tells of failures while a stage plays: the first of each kind, then how many are like it.

    Args:
      write: writes lines to the terminal.
    """

    def __init__(self, write: Callable[[str], None] | None = None):
        self._write = write or (lambda text: tqdm.tqdm.write(text, file=sys.stderr))
        self._kinds: Counter[str] = Counter()
        self._traced = False

    def tell(self, trajectory: Trajectory) -> None:
        """Tells of a failed or left out episode."""
        first, _, traceback = trajectory.final_observation.partition("\n")
        kind = shown(re.sub(r"\d+", "#", first))
        self._kinds[kind] += 1
        if self._kinds[kind] > 1 or len(self._kinds) > _KINDS:
            return
        what = "left out" if is_left_out(trajectory) else "environment error"
        self._write(f"{what}: task {trajectory.task!r}: {shown(first)}")
        if traceback and not self._traced:
            self._traced = True
            text, _ = replace_surrogates(traceback)
            self._write("\n".join(f"  | {line}" for line in text.splitlines()))

    def conclude(self, folder: pathlib.Path) -> None:
        """Says how many there were."""
        for kind, found in self._kinds.most_common(_KINDS):
            if found > 1:
                self._write(f"{found} times in all (# is a number): {kind}")
        if self._kinds:
            self._write(f"recorded whole: {folder / FAILURES}")
