"""Files that a stage leaves: JSON written whole or not at all, and the mark of its end."""

import json
import math
import os
import pathlib
import time
from typing import Any

from spa_jax import run as run_lib
from spa_jax import schema
from spa_jax.runtime import distributed


def write_json(path: pathlib.Path, value: Any) -> None:
    """`write_text` of a JSON value; a number that is not finite, which JSON has not, is null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it.

    Of several processes the first does.
    """
    if not distributed.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_done(folder: pathlib.Path, title: str) -> bool:
    """Whether the stage of this folder has ended; says so."""
    marker = run_lib.done(folder)
    done = distributed.broadcast(f"{title}: done", marker.exists)
    if done:
        print(f"{title}: already done ({marker})", flush=True)
    return done


def has_all(folder: pathlib.Path, title: str) -> bool:
    """Whether a folder of episodes has ended with all of them: no environment error is left."""
    marker = run_lib.done(folder)

    def complete() -> bool:
        return marker.exists() and read_done(folder).get("failures") == 0

    found = distributed.broadcast(f"{title}: all episodes", complete)
    if found:
        print(f"{title}: already done ({marker})", flush=True)
    return found


def read_done(folder: pathlib.Path) -> dict[str, Any]:
    """What the mark of a folder's end says.

    Raises:
      UserError: it is no JSON object.
    """
    remedy = "remove it, and give the stage's command again"
    return schema.read(dict[str, Any], run_lib.done(folder), remedy=remedy)


def mark_done(folder: pathlib.Path, started: float, **results: Any) -> None:
    """Marks the stage of this folder as ended; every process ends it here."""
    seconds = round(time.time() - started, 1)
    write_json(run_lib.done(folder), {"seconds": seconds, **results})
    distributed.barrier(f"{folder}: done")
