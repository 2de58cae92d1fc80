"""Running the stages as a user does: in processes of their own."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Ours, with one CPU device: eight virtual ones would only make the stages slower."""
    return dict(os.environ) | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def start(stage: str, *flags: str) -> subprocess.Popen:
    """Starts `python -m experiments.STAGE`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{stage}", *flags],
        cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 600) -> subprocess.CompletedProcess:
    """Waits for a stage; its output."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(stage: str, *flags: str) -> subprocess.CompletedProcess:
    """Runs a stage to its end."""
    return finish(start(stage, *flags))


def succeed(stage: str, *flags: str) -> str:
    """Runs a stage that must succeed; what it printed."""
    done = run(stage, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_when(
    process: subprocess.Popen, condition: Callable[[], bool], timeout: float = 300
) -> str:
    """SIGKILLs the stage itself once the condition holds; fails if it ended before that."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError("ended before it was killed: " + "".join(process.communicate()))
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    return "".join(process.communicate(timeout=60))


def lines(path: pathlib.Path) -> int:
    """Whole lines of a file; 0 if it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
