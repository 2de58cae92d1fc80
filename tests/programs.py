"""Running the stages as a user does: in processes of their own."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Ours, with one CPU device: eight virtual ones would only make the stages slower."""
    count = "--xla_force_host_platform_device_count"
    flags = [f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(count)]
    if devices > 1:
        flags.append(f"{count}={devices}")
    return dict(os.environ) | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}


def start(stage: str, *flags: str, devices: int = 1) -> subprocess.Popen:
    """Starts `python -m experiments.STAGE`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{stage}", *flags],
        cwd=ROOT,
        env=environment(devices),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_all(count: int, stage: str, *flags: str, devices: int = 1) -> list[subprocess.Popen]:
    """Starts a stage in several processes that share it, over loopback."""
    shared = (f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}")
    return [
        start(stage, *flags, *shared, f"--process_id={i}", devices=devices) for i in range(count)
    ]


def finish_all(
    processes: list[subprocess.Popen], timeout: float = 600
) -> list[subprocess.CompletedProcess]:
    """Waits for all processes of a stage; none outlives the others for long."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        try:
            return list(pool.map(lambda p: finish(p, timeout), processes))
        finally:
            for process in processes:
                process.kill()


def succeed_all(count: int, stage: str, *flags: str, devices: int = 1) -> None:
    """Runs a stage in several processes, which must all succeed."""
    for done in finish_all(start_all(count, stage, *flags, devices=devices)):
        assert done.returncode == 0, done.stdout + done.stderr


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
    process: subprocess.Popen,
    condition: Callable[[], bool],
    timeout: float = 300,
    how: signal.Signals = signal.SIGKILL,
) -> str:
    """Kills the stage itself once the condition holds; fails if it ended before that."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError("ended before it was killed: " + "".join(process.communicate()))
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)
    os.kill(process.pid, how)
    return "".join(process.communicate(timeout=60))


def lines(path: pathlib.Path) -> int:
    """Whole lines of a file; 0 if it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
