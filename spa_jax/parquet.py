"""Tables of records in Parquet, by pyarrow, which is no requirement of ours."""

import importlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spa_jax.errors import UserError

ENDING = ".parquet"


def write(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records, whole or not at all.

    Raises:
      UserError: pyarrow is not installed.
    """
    arrow = _pyarrow(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        arrow.parquet.write_table(arrow.Table.from_pylist(list(records)), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of each row; fields that are null are left out.

    A column has a place for each field in every row, so null is how a record lacks one.

    Raises:
      UserError: pyarrow is not installed, or the file is no table.
    """
    arrow = _pyarrow(path)
    try:
        rows = arrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, arrow.ArrowException) as error:
        first = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: cannot be read as Parquet ({first})") from error
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", _known(row)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(inner) for name, inner in value.items() if inner is not None}
    return [_known(inner) for inner in value] if isinstance(value, list) else value


def _pyarrow(path: pathlib.Path) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow: pip install pyarrow, or use JSON lines"
        ) from error
