"""Several real processes, joined by jax.distributed over loopback, train as one does.

Tolerance: as `test_updates` for sums in another order; after three steps of Adam parameters agree
to 2e-3 of the learning rate, but for entries whose gradient is rounding (`_alike`).
"""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from spa_jax.config import DistributedConfig
from spa_jax.errors import UserError
from spa_jax.runtime import distributed
from tests import programs
from tests.runtime import member

RATE = 1e-2  # of `member.OPTIMIZER`


def _members(folder: pathlib.Path, count: int, devices: int, *more: str):
    """Runs `member` in so many processes with so many devices each; (exit code, output) of each."""
    port = programs.free_port()
    environment = programs.environment(devices)
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.runtime.member",
                str(folder),
                str(port),
                str(count),
                str(index),
                *more,
            ],
            cwd=programs.ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(count)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out) for p, out in zip(processes, said, strict=True)]


def _alike(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith("metric ") or name == "contributions":
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=2e-5, err_msg=name)
        else:
            off = np.abs(ours[name] - value) / RATE
            assert np.quantile(off, 0.99) < 2e-3 and off.max() < 0.2, (name, off.max())


def _compare(folder: pathlib.Path) -> None:
    one = member.updates(member.trainer_of("pmap", 1))
    for name in ("pmap", "mesh"):
        with np.load(folder / f"{name}.npz") as found:
            _alike(dict(found), one)


def test_two_processes_of_two_devices_update_as_one_and_end_together(tmp_path):
    """Checkpoints restore bit for bit, and a failure ends even one that is in a collective."""
    ended = _members(tmp_path, 2, 2, "mistake")
    for code, said in ended:
        assert code == 2, said
    assert "the dog ate it" in ended[1][1]
    assert "error: process 1 ended: the dog ate it" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]
    _compare(tmp_path)


@pytest.mark.slow
def test_four_processes_update_as_one(tmp_path):
    for code, said in _members(tmp_path, 4, 1):
        assert code == 0, said
    _compare(tmp_path)


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_both_without_a_traceback(tmp_path):
    for code, said in _members(tmp_path, 2, 1, "full disk"):
        assert code == 2, said
        assert "the disk is full" in said and "Traceback" not in said


@pytest.mark.parametrize(("process", "words"), [(1, "nothing answers there after 1 s")])
def test_a_coordinator_that_is_not_there(process, words):
    config = DistributedConfig(
        coordinator_address=f"127.0.0.1:{programs.free_port()}",
        num_processes=2,
        process_id=process,
        connect_timeout_s=1,
    )
    with pytest.raises(UserError, match=words):
        distributed.initialize(config)


def test_one_process_is_alone():
    distributed.initialize(DistributedConfig())  # does nothing
    assert (distributed.count(), distributed.index()) == (1, 0)
    assert distributed.share([1, 2, 3]) == [1, 2, 3] and distributed.is_first()
    assert distributed.broadcast("x", lambda: 5) == 5
    distributed.assert_equal("x", 5)
    distributed.barrier("x")
