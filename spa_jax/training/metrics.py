"""One line of numbers an update: in `metrics.jsonl`, and in TensorBoard's files.

    {"update": 12, "time": 1767225600.0, "loss": 0.71, "valid_loss": null}

`metrics.jsonl` is the record (the report reads it); TensorBoard's event files
are a view of it.  Every line is valid JSON: a nan or an infinity becomes null.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from spa_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends the metrics of a stage; one process of a run may hold an enabled one.

    An unterminated last line, which a killed process leaves, is cut off when
    the file is opened.  The files are made at the first `write`.
    """

    def __init__(self, folder: Path | str, enabled: bool = True):
        """Opens nothing yet.

        Args:
          folder: the stage's folder, such as `W/sft`; made when it is needed.
          enabled: otherwise nothing is written.
        """
        self._folder = Path(folder)
        self._enabled = enabled
        self._file: IO[str] | None = None
        self._tensorboard: Any = None
        self._purge_step: int | None = None

    @property
    def path(self) -> Path:
        """The JSON lines."""
        return self._folder / METRICS_FILE

    def write(self, update: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line and flushes it.

        Args:
          update: how many optimiser updates came before, or the number of this one.
          metrics: name -> number (a Python, NumPy or JAX scalar).

        Raises:
          ValueError: if a metric is called "update" or "time".
          TypeError: if a value is not one number.
        """
        if taken := {"update", "time"} & metrics.keys():
            raise ValueError(f"a metric cannot be called {', '.join(sorted(taken))}")
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        record: dict[str, Any] = {"update": int(update), "time": round(now, 3)}
        record |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        file = self._open()
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, int(update), walltime=now)

    def truncate_after(self, update: int) -> None:
        """Forgets every line of a later update than `update`; for a resume from a checkpoint.

        The file is rewritten under another name and renamed, so a kill leaves
        either the old or the new one.  TensorBoard is told to drop the same part.

        Raises:
          UserError: if the file has a line that is no metrics record.
        """
        self.close()
        self._purge_step = int(update) + 1
        if not self._enabled or not self.path.exists():
            return
        lines = [line for line, record in _records(self.path) if record["update"] <= update]
        _rewrite(self.path, "".join(line + "\n" for line in lines))

    def close(self) -> None:
        """Closes the files; a later `write` opens them again."""
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
        self._file = self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> IO[str]:
        if self._file is not None:
            return self._file
        # Here and not above: reading metrics must not need TensorBoard's protobufs.
        from tensorboardX import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(self._folder / TENSORBOARD_FOLDER), purge_step=self._purge_step, flush_secs=10
        )
        self._purge_step = None
        return self._file


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in order; null reads as nan.

    An unterminated last line is left out: its writer was killed, or is at work.

    Raises:
      UserError: naming file and line, if another line is no metrics record.
    """
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, record in _records(Path(path))
    ]


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    records = []
    # What follows the last newline is empty or torn.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["update"], int):
                raise TypeError("its update is not an integer")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a line of metrics ({error}); delete the line, or the file"
            ) from error
        records.append((line, record))
    return records


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _rewrite(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
