"""Trajectories on disk: one line of JSON each, in append-only files.

Exactly-once exploration rests on this file: an episode is on disk when its
line, *with its newline*, is.  An append is one `write` under a lock followed
by `fsync`, so whatever kills the process, at most the last line is torn, and
`repair` cuts it off at the next start.  Readers sort by key, so that nothing
depends on the order in which episodes happened to finish.

Several processes of a run append to a file of their own each, beside the one that all read
(`shard`); `merge` brings what they wrote into it.
"""

import fcntl
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from spa_jax import trajectory as trajectory_lib
from spa_jax.errors import UserError
from spa_jax.texts import replace_surrogates
from spa_jax.trajectory import Trajectory

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
Key = tuple[str, int, int]


def append(path: str | os.PathLike[str], record: Trajectory) -> None:
    """Adds one episode at the end of `path` and waits until the disk has it.

    Args:
      path: the JSON-lines file; made, with its folder, if it is not there.
      record: the trajectory.

    Raises:
      UserError: if the file ends in a torn line (call `repair` at start).
    """
    append_line(path, _line(record))


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Adds a line, which ends in a newline, as `append`."""
    path = pathlib.Path(path)
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _ends_with_newline(file):
            raise UserError(
                f"{path}: the last line is not complete, and appending would spoil it for good; "
                "start the stage again, which repairs the file first"
            )
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync_folder(path.parent)


def repair(path: str | os.PathLike[str]) -> int:
    """Cuts an unterminated last line off; returns how many bytes went.

    To be called when a stage starts, before anything is read or appended.  A
    file that is not there, or ends in a newline, stays as it is.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if _ends_with_newline(file):
            return 0
        size = file.seek(0, os.SEEK_END)
        keep = _last_newline(file, size) + 1
        file.truncate(keep)
        os.fsync(file.fileno())
    return size - keep


def read(path: str | os.PathLike[str]) -> list[Trajectory]:
    """All episodes of a file, sorted by their key (task, seed, attempt).

    Raises:
      UserError: if the file is not there, a line is not a trajectory of this
        schema (names file and line), or two lines have the same key.
    """
    path = pathlib.Path(path)
    found: dict[Key, tuple[int, Trajectory]] = {}
    for number, trajectory in _parse(path):
        if trajectory.key in found:
            raise UserError(
                f"{path}:{number}: the episode {trajectory.key} is already in line "
                f"{found[trajectory.key][0]}; delete one of the two lines"
            )
        found[trajectory.key] = (number, trajectory)
    return [found[key][1] for key in sorted(found)]


def keys(path: str | os.PathLike[str]) -> set[Key]:
    """The keys of the episodes in a file; empty if the file is not there.

    Raises:
      UserError: as `read`.
    """
    path = pathlib.Path(path)
    return {trajectory.key for trajectory in read(path)} if path.exists() else set()


def write(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> None:
    """Writes a whole file at once: under a temporary name, then renamed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for trajectory in trajectories:
                file.write(_line(trajectory))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def shard(path: str | os.PathLike[str], process: int) -> pathlib.Path:
    """The file that one process of several appends to: trajectories.process_3.jsonl, say."""
    path = pathlib.Path(path)
    return path.with_name(f"{path.stem}.process_{process}{path.suffix}")


def merge(path: str | os.PathLike[str]) -> None:
    """Repairs `path` and its shards and brings all into `path`; the shards are gone then.

    To be called while nobody appends.  Killed at any moment and called again, it loses nothing.

    Raises:
      UserError: as `read`, or if two files have different episodes of the same key.
    """
    path = pathlib.Path(path)
    repair(path)
    shards = sorted(path.parent.glob(f"{path.stem}.process_*{path.suffix}"))
    if not shards:
        return
    found = {t.key: t for t in read(path)} if path.exists() else {}
    for file in shards:
        repair(file)
        for trajectory in read(file):
            if found.setdefault(trajectory.key, trajectory) != trajectory:
                raise UserError(
                    f"{file}: its episode {trajectory.key} is another one than an earlier file's; "
                    "delete one of the two lines"
                )
    write(path, [found[key] for key in sorted(found)])
    for file in shards:
        file.unlink()


def _line(trajectory: Trajectory) -> bytes:
    record = trajectory_lib.to_json(trajectory)
    try:
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise UserError(
            f"episode {trajectory.key}, played by {trajectory.policy}: {_not_finite(record)} is no "
            "finite number, and the episode is not written; the policy's or the estimator's "
            "arithmetic overflows: give --compute_dtype=float32, or use another checkpoint"
        ) from error
    return text.encode("ascii") + b"\n"


def _not_finite(value: Any, name: str = "") -> str:
    """The name of the first number that is not finite: "steps.3.reward"; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name
    nested: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict | list | tuple):
        nested = value.items() if isinstance(value, dict) else enumerate(value)
    found = (_not_finite(part, f"{name}.{key}".lstrip(".")) for key, part in nested)
    return next((one for one in found if one), "")


def _parse(path: pathlib.Path) -> Iterator[tuple[int, Trajectory]]:
    """(line number from 1, trajectory) of each line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage that writes it first")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                raise UserError(
                    f"{path}:{number}: the line is not complete (a run was killed while writing "
                    "it); start that stage again, which repairs the file, or delete the line"
                )
            try:
                found = trajectory_lib.from_line(line)
                yield number, found or trajectory_lib.from_json(_record(line))
            except trajectory_lib.TrajectoryError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: not JSON ({error}); delete the line to play this episode "
                    "again"
                ) from error


def _record(line: bytes) -> Any:
    """A line's JSON; a lone surrogate, which older versions let pass, becomes U+FFFD."""
    record = json.loads(line)
    return _replaced(record) if _SURROGATE.search(line) else record


def _replaced(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part) for part in value]
    return replace_surrogates(value)[0] if isinstance(value, str) else value


def _ends_with_newline(file: BinaryIO) -> bool:
    """Whether an open binary file is empty or ends in a newline."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _last_newline(file: BinaryIO, size: int, block: int = 1 << 20) -> int:
    """Offset of the last newline before `size`, or -1; reads backwards."""
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        offset = file.read(end - start).rfind(b"\n")
        if offset >= 0:
            return start + offset
        end = start
    return -1


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
