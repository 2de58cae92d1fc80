"""Ctrl-C in small programs: at once, in the middle of a long call, deferred, pressed twice."""

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest

from spa_jax.runtime import interrupt
from tests import programs

# One call of the C library for minutes; Python handles no signal meanwhile.
_STUCK = """
import hashlib, os
def stick():
    os.write(1, b"stuck\\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
_BARE = """
from spa_jax.runtime import interrupt
interrupt.install()
interrupt.watch()
"""
_STAGE = """
from spa_jax.config import DistributedConfig
from spa_jax.runtime import interrupt, preemption, setup
interrupt.install()
"""
_DEFERRED = """
def main():
    with preemption.deferred():
        stick()
setup.program(main, DistributedConfig())
"""


def _start(program: str, wait_for: str = "stuck") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=programs.ROOT,
        env=programs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == wait_for
    return process


def _end(process: subprocess.Popen) -> str:
    """What it said on the standard error, once it has ended with 130."""
    try:
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    return said


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (_BARE + _STUCK + "stick()", "stopped by Ctrl-C\n"),
        (
            _STAGE + _STUCK + "setup.program(stick, DistributedConfig())",
            "stopped by Ctrl-C; run the same command again to continue\n",
        ),
    ],
    ids=["a program", "a stage"],
)
def test_one_press_ends_a_program_in_the_middle_of_a_long_call(program, said):
    process = _start(program)
    process.send_signal(signal.SIGINT)
    assert _end(process) == said


_SLEEPS = """
def main():
    import signal, threading, time
    def press():
        time.sleep(0.5)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    if %s:
        threading.Thread(target=press).start()
    try:
        print("busy", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
setup.program(main, DistributedConfig())
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stage_cleans_up_at_the_first_press(elsewhere):
    """Also where another thread takes the signal, which then interrupts no wait of the main one."""
    process = _start(_STAGE + _SLEEPS % elsewhere, "busy")
    if not elsewhere:
        process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "cleaned up\n"), said
    assert said == "stopped by Ctrl-C; run the same command again to continue\n"


def test_an_update_that_hangs_ends_at_the_second_press():
    process = _start(_STAGE + _STUCK + _DEFERRED)
    process.send_signal(signal.SIGINT)
    time.sleep(4.5)
    assert process.poll() is None  # one press waits for the update
    process.send_signal(signal.SIGINT)
    assert _end(process).splitlines() == [
        "Ctrl-C: ends after this update, which is saved; press again to end at once",
        "ended at once: Ctrl-C was pressed again",
    ]


def test_an_update_that_ends_ends_the_stage():
    work = """
import os, signal
def main():
    with preemption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.asked()
        print("asked", flush=True)
        preemption.stop(3, 9)
setup.program(main, DistributedConfig())
"""
    said = _end(_start(_STAGE + work, "asked"))
    assert said.splitlines()[-1] == (
        "stopped by Ctrl-C after update 3 of 9, which is saved; run the same command again to "
        "continue"
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_exception_that_python_drops_is_raised_again(how):
    """Python ignores what is raised in a callback of the garbage collector; JAX has one."""
    work = f"""
import gc, os, sys, time
sent = []
def callback(*_):
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), {int(how)})
def main():
    gc.callbacks.append(callback)
    print("busy", flush=True)
    gc.collect()
    time.sleep(60)
setup.program(main, DistributedConfig())
"""
    process = _start(_STAGE + work, "busy")
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + how, said
    name = "SIGTERM" if how is signal.SIGTERM else "Ctrl-C"
    assert said == f"stopped by {name}; run the same command again to continue\n"


def test_processes_can_be_started_that_never_see_it():
    with interrupt.unseen():
        pool = multiprocessing.get_context("spawn").Pool(2)
    with pool:
        for _ in range(4):
            assert signal.SIGINT in pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, []))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_ignored_ctrl_c_stays_ignored():
    """In a background job of a script a shell ignores it: such a job must live on."""
    work = (
        """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""
        + _STAGE
    )
    work += """
def main():
    os.kill(os.getpid(), signal.SIGINT)
    print("alive", flush=True)
setup.program(main, DistributedConfig())
"""
    process = _start(work, "alive")
    assert process.wait(timeout=20) == 0
    process.communicate()
