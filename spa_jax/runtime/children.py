"""Programs that a program of ours runs: Ctrl-C on the terminal is not theirs, our end is."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence

# What tells such a program to call `at_end_of_parent`.
FLAG = "--exit_with_parent"


def run(command: Sequence[str]) -> int:
    """Runs a program that takes `FLAG` to its end; returns its exit status.

    It gets a session of its own, because Ctrl-C reaches all processes of a terminal's session that
    are in the foreground.  It ends with this process, however this process ends.
    """
    child = subprocess.Popen([*command, FLAG], stdin=subprocess.PIPE, start_new_session=True)
    with child:
        try:
            return child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
            raise


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
