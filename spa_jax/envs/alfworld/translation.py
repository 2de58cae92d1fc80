"""The planner's translation of a game, kept in the user's cache.

It takes six sevenths of a reset (60 to 200 ms), and depends on the game's text alone: what one
arm of a study, or one attempt, has translated, every other one reads in 2 ms (8 to 22 KB a game).
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import zlib
from collections.abc import Callable
from typing import Any

_LEVEL = 1  # of the compression: speed, a fifth of the size


def cached(translate: Callable[[str, str], Any], folder: pathlib.Path) -> Callable[[str, str], Any]:
    """`translate(domain, problem)`, each answer kept in a file of `folder`.

    A file that cannot be read is made anew, and a folder that cannot be written is none.  Files
    are pickles: `folder` must be the user's own, as compiled code must.
    """

    def read_or_translate(domain: str, problem: str) -> Any:
        path = folder / f"{_name(domain, problem)}.pickle.z"
        with contextlib.suppress(OSError, ValueError, EOFError, zlib.error, pickle.PickleError):
            return pickle.loads(zlib.decompress(path.read_bytes()))
        made = translate(domain, problem)
        with contextlib.suppress(OSError):
            _write(path, zlib.compress(pickle.dumps(made), _LEVEL))
        return made

    return read_or_translate


def user_folder() -> pathlib.Path:
    """Where the translations of this user's games lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "spa_jax" / "alfworld"


@functools.cache
def _version() -> str:
    return importlib.metadata.version("fast-downward-textworld")


def _name(domain: str, problem: str) -> str:
    """A name of what is translated and by whom."""
    text = "\0".join((_version(), domain, problem))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(path: pathlib.Path, data: bytes) -> None:
    """Under a temporary name first: other processes read the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
