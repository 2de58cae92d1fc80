"""One writer a stage, by real processes."""

import os
import signal
import subprocess
import sys

import pytest

from spa_jax import exclusive
from spa_jax.errors import UserError

_HOLD = """
import pathlib, sys, time
from spa_jax import exclusive
exclusive.claim(pathlib.Path(sys.argv[1]), sys.argv[2:])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, tmp_path, "sft", "explore"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_writer_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(UserError, match=rf"process {holder.pid} on .*is at work on its explore"):
        exclusive.claim(tmp_path, ["explore"])
    exclusive.claim(tmp_path, ["annotate"])  # another part
    exclusive.claim(tmp_path, ["annotate"])  # its own
    exclusive.claim(tmp_path / "other", ["sft"])  # another run


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_dies_with_its_process(holder, tmp_path, how):
    holder.send_signal(how)
    holder.wait()
    exclusive.claim(tmp_path, ["sft", "explore"])
    assert f"process {os.getpid()} " in (tmp_path / exclusive.FOLDER / "sft").read_text()


