"""Servers that go and come, and one with as many sessions as it may have."""

import concurrent.futures
import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spa_jax.envs import benchmarks, capacity
from spa_jax.envs.client import EnvClient
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import CAPACITY_REACHED, ENV_ERROR, EnvError
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

_REPOSITORY = Path(__file__).parents[2]


def _serve(port: int, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.serve_env",
            "--env=custom",
            "--custom_data=tests.envs.odd:Odd",
            f"--port={port}",
            *flags,
        ],
        cwd=_REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _listening(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    match = re.match(r"listening on (\S+)", process.stdout.readline())
    assert match
    return match[1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_client_survives_the_servers_death_and_return(how):
    process = _serve(0)
    try:
        address = _listening(process)
        session = EnvClient(address).session()
        session.reset("train_0", "train")
        process.send_signal(how)
        process.wait(timeout=60)
        with pytest.raises(EnvError) as caught:
            session.step("echo")
        assert (caught.value.code, caught.value.retryable) == (ENV_ERROR, True)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            answer = thread.submit(session.reset, "train_1", "train")
            time.sleep(0.5)
            assert not answer.done()
            process = _serve(int(address.rsplit(":", 1)[1]))
            assert answer.result(timeout=120).text.startswith("train_1")
        session.close()
    finally:
        process.kill()
        process.wait()


def test_sigterm_lets_a_call_finish_and_turns_newcomers_away():
    process = _serve(0, "--drain_s=60")
    try:
        address = _listening(process)
        busy, late = EnvClient(address).session(), EnvClient(address, wait_s=0)
        busy.reset("train_0", "train")
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            answer = thread.submit(busy.step, "sleep 4")
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            with contextlib.suppress(UserError), late.session() as session:
                with pytest.raises(EnvError) as caught:
                    session.reset("train_1", "train")
                assert caught.value.code == CAPACITY_REACHED
            assert answer.result(timeout=60).text == "1: 4"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("env", ["webshop", "virtualhome"])
def test_256_sessions_at_once(env, tmp_path):
    """One process each; every one is reset and plays while all others are open."""
    from importlib import import_module

    generate = import_module(f"spa_jax.envs.{env}.generate").generate
    if env == "webshop":
        data = generate(tmp_path / "data", products=120, goals=60, seed=5)
    else:
        generate(tmp_path / "data" / "test", 6, 1)
        data = tmp_path / "data"
    if (free := capacity.free_mb()) < 256 * 20:
        pytest.skip(f"needs memory for 256 processes; {free:.0f} MB are free")
    config = ServerConfig(
        str(data), env=env, max_sessions=256, reset_deadline_s=600, step_deadline_s=600
    )
    with LocalServer(config, start_deadline_s=120) as server:
        client = server.client(timeout_s=900)
        tasks = client.tasks("test")
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(client.session()) for _ in range(256)]

            def begin(number: int) -> str:
                task = tasks[number % len(tasks)].task
                return sessions[number].reset(task, "test").text

            with concurrent.futures.ThreadPoolExecutor(16) as threads:
                first = list(threads.map(begin, range(256)))
                workers = {s.state()["worker"] for s in sessions}
                assert len(workers) == 256
                steps = list(threads.map(lambda s: s.step("nonsense"), sessions))
            # As what each adds to the machine's load: shared pages are counted once.
            used = sum(_pss_mb(pid) for pid in workers)
            print(f"{env}: 256 processes have {used:.0f} MB, {used / 256:.1f} each")
            assert used / 256 < benchmarks.BENCHMARKS[env].worker_mb
            assert all(first) and not any(step.grounded for step in steps)
            with server.client(wait_s=0).session() as late:
                with pytest.raises(EnvError) as caught:
                    late.reset(tasks[0].task, "test")
            assert caught.value.code == CAPACITY_REACHED


def _pss_mb(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.partition("Pss:")[2].split()[0]) / 1024
