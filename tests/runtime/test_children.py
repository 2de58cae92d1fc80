"""A program that ours runs: Ctrl-C does not reach it, and it ends with ours, however that ends."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from spa_jax.runtime import children
from tests import programs
from tests.terminal import Terminal

# A program of ours that runs one that has started a third; each is named by its process id.
_CHILD = """
import os, subprocess, sys, time
from spa_jax.runtime import children
assert sys.argv[1:] == [children.FLAG]
children.at_end_of_parent(children.end_session)
third = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(f"pids {os.getpid()} {third.pid} .", flush=True)
time.sleep(60)
"""
_PARENT = f"""
import sys
from spa_jax.runtime import children
try:
    children.run([sys.executable, "-c", {_CHILD!r}])
except KeyboardInterrupt:
    sys.exit(130)
"""


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_exit_status_is_the_childs():
    assert children.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_ctrl_c_on_the_terminal_reaches_only_the_parent_which_ends_the_child():
    terminal = Terminal("-c", _PARENT)
    terminal.wait_for(" .")
    pids = [int(word) for word in terminal.said.split() if word.isdigit()]
    terminal.press_ctrl_c()
    terminal.end_by_ctrl_c()
    assert len(pids) == 2 and all(map(_gone, pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_when_the_parent_is_killed(how):
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], cwd=programs.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split() if word.isdigit()]
    parent.send_signal(how)
    parent.wait(timeout=20)
    parent.stdout.close()
    assert len(pids) == 2 and all(map(_gone, pids))
