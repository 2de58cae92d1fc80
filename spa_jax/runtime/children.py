"""Programs that a program of ours runs: Ctrl-C on the terminal is not theirs, our end is."""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

# What tells such a program to call `at_end_of_parent`.
FLAG = "--exit_with_parent"


def run(command: Sequence[str]) -> int:
    """Runs a program that takes `FLAG` to its end; returns its exit status.

    It gets a session of its own, because Ctrl-C reaches all processes of a terminal's session that
    are in the foreground.  It ends with this process, however this process ends.
    """
    with start(command) as child:
        try:
            return child.wait()
        except BaseException:
            kill(child)
            raise


def start(
    command: Sequence[str],
    *,
    log: pathlib.Path | None = None,
    cores: Collection[int] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Starts a program that takes `FLAG`, as `run`; the caller keeps what is returned.

    Args:
      command: the program.
      log: what it says goes to this file; None: it goes where ours goes.
      cores: that it may use; empty: those of this process.
      env: its environment; None: ours.
    """
    with contextlib.ExitStack() as files:
        out = files.enter_context(log.open("wb")) if log else None
        child = subprocess.Popen(
            [*command, FLAG],
            stdin=subprocess.PIPE,
            start_new_session=True,
            stdout=out,
            stderr=subprocess.STDOUT if log else None,
            env=env,
        )
    # Before it starts threads, which have the cores of the thread that starts them: Python has
    # not read its first module yet.
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(child.pid, cores)
    return child


def kill(child: subprocess.Popen) -> None:
    """Ends a program that `start` started, with the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def at_end_of_parent(do: Callable[[], object]) -> None:
    """Calls `do`, in a thread, when standard input closes: who held its other end is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        do()

    threading.Thread(target=wait, daemon=True).start()


def end_session() -> None:
    """Ends this process and those that it started, if `run` started it; else this one alone."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
