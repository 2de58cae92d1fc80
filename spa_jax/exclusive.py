"""One writer a stage: a lock that dies with its process, however that ends.

W/.locks/NAME holds who has it.  The lock is the system's (flock), so nothing is left to clean up
after a kill, and over NFS it holds as far as the server's locks do.
"""

import fcntl
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterable
from typing import IO

from spa_jax.errors import UserError

FOLDER = ".locks"
_held: dict[pathlib.Path, IO[str]] = {}


def claim(workdir: pathlib.Path, names: Iterable[str]) -> None:
    """Holds parts of a run until this process ends; what it holds already stays its own.

    Args:
      workdir: of the run.
      names: of the parts, such as `sft` or `evaluate-spa`.

    Raises:
      UserError: another process holds one of them; says which, and since when.
    """
    for name in names:
        path = (workdir / FOLDER / name).resolve()
        if path not in _held:
            _held[path] = _locked(path, workdir, name)


def _locked(path: pathlib.Path, workdir: pathlib.Path, name: str) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{workdir}: {holder} is at work on its {name}; two would write into each other's "
            "files. Wait until it ends, stop it, or give another --workdir"
        ) from None
    except OSError as error:  # a file system that knows no locks
        print(f"warning: {path}: no lock ({error}); start nothing twice", file=sys.stderr)
        return file
    file.seek(0)
    file.truncate()
    since = time.strftime("%H:%M:%S %Z")
    program = pathlib.Path(sys.argv[0]).stem
    file.write(f"{program} (process {os.getpid()} on {socket.gethostname()}, since {since})\n")
    file.flush()
    return file
