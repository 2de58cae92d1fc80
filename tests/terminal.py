"""A program on a terminal of its own, where Ctrl-C can be pressed."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping

from tests import programs

# Makes the terminal that is standard input the one that controls this session.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """`python ARGS`, with a terminal as its standard input, output and error.

    Attributes:
      process: the program.
      said: what it has written to the terminal so far.
    """

    def __init__(self, *args: str, environment: Mapping[str, str] | None = None):
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 120))  # without a size tqdm draws no bar
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *args],
            cwd=programs.ROOT,
            env=environment or programs.environment(),
            start_new_session=True,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
            while found := os.read(self._ours, 4096):
                self.said += found.decode(errors="replace")

    def press_ctrl_c(self) -> None:
        """The terminal sends SIGINT to all processes of its foreground group."""
        os.write(self._ours, b"\x03")

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Waits while the program runs; fails if it ends before that."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                self._reader.join(timeout=10)
                raise AssertionError(f"ended with {self.process.returncode}: {self.said!r}")
            assert time.monotonic() < deadline, f"not in time: {self.said}"
            time.sleep(0.002)

    def wait_for(self, words: str) -> None:
        """Waits until it has said this."""
        self.wait_until(lambda: words in self.said)

    def end(self, timeout: float = 60) -> int:
        """Waits for its end; the exit code."""
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()
            self._reader.join(timeout=10)
            os.close(self._ours)

    def end_by_ctrl_c(self, timeout: float = 60) -> None:
        """Waits for its end, which must be that of a program that was interrupted."""
        assert self.end(timeout) == 130, self.said
        assert "Traceback" not in self.said and "KeyboardInterrupt" not in self.said
