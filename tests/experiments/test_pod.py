"""Several processes, each with its own environment server, end as a single one does.

Tolerance: their episodes are the same tokens; recorded log-probabilities to 1e-4 (batches of
other sizes); after PPO, whose Adam divides a gradient by its own size, weights to 2% of the
learning rate times the updates for 99 entries in 100, and to the whole of it for all (an entry
whose gradient is rounding may go either way).
"""

import os
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
import safetensors.numpy

from spa_jax import store
from spa_jax.envs.local import LocalServer
from spa_jax.server_config import ServerConfig
from spa_jax.training import metrics
from tests import programs, tiny

pytestmark = [pytest.mark.slow, pytest.mark.pod]

GAMES, ROLLOUTS, RATE = 5, 2, 1e-3
MANY = 600  # rollouts a game: more than are played before a signal comes
ENV = ("--env=custom", "--custom_data=tests.envs.odd:Split")
PLAY = (
    *ENV,
    f"--games={GAMES}",
    f"--rollouts={ROLLOUTS}",
    "--slots=3",
    "--max_steps=4",
    "--max_new_tokens=12",
    "--context_length=512",
)
LONG = (*PLAY, f"--rollouts={MANY}")
ROWS = ("--row_length=256", "--policy_slots=96", "--step_slots=16", "--rows_per_device=1")
PROGRESS = ("--progress_epochs=6", "--progress_batch_size=4", "--progress_width=16")
PPO = (
    "--ppo_epochs=4",
    "--ppo_batch_size=4",
    f"--ppo_learning_rate={RATE}",
    "--ppo_checkpoint_every=3",
)
UPDATES = 4 * 3
WEIGHTS = pathlib.Path("iteration_0/ppo/policy/model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Most of what these processes compute is to compile the same programs: keep them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> pathlib.Path:
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def _whole(policy: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
    """explore -> progress -> annotate -> PPO -> evaluate twice -> report."""
    return (
        "run_spa",
        f"--workdir={workdir}",
        f"--policy={policy}",
        f"--base={policy}",
        *PLAY,
        *ROWS,
        *PROGRESS,
        *PPO,
        "--heldout_split=other",
        "--heldout_games=3",
    )


def _ppo(policy: pathlib.Path, workdir: pathlib.Path, single: pathlib.Path) -> tuple[str, ...]:
    """PPO on the single process's episodes."""
    folder = workdir / "iteration_0"
    (folder / "explore").mkdir(parents=True)
    for name in ("annotated.jsonl", "explore/chat.json"):
        shutil.copy(single / "iteration_0" / name, folder / name)
    return ("train_ppo", f"--workdir={workdir}", f"--policy={policy}", *ROWS, *PPO)


@pytest.fixture(scope="module")
def single(policy, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("single")
    programs.succeed(*_whole(policy, workdir))
    return workdir


def _weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(workdir / WEIGHTS)


def _same_run(ours: pathlib.Path, theirs: pathlib.Path, policy: pathlib.Path) -> None:
    played, expected = (
        store.read(w / "iteration_0" / "explore" / "trajectories.jsonl") for w in (ours, theirs)
    )
    assert len(expected) == GAMES * ROLLOUTS and len({t.token_ids for t in expected}) > GAMES
    assert [t.key for t in played] == [t.key for t in expected]
    for a, b in zip(played, expected, strict=True):
        assert (a.token_ids, a.steps, a.final_reward) == (b.token_ids, b.steps, b.final_reward)
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
    start = safetensors.numpy.load_file(policy / "model.safetensors")
    found, wanted = _weights(ours), _weights(theirs)
    assert found.keys() == wanted.keys() == start.keys()
    moved = max(float(np.abs(wanted[name] - start[name]).max()) for name in start)
    assert moved > RATE, "PPO changed nothing, so nothing was compared"
    for name, value in wanted.items():
        off = np.abs(found[name] - value) / (RATE * UPDATES)
        assert np.quantile(off, 0.99) < 0.02 and off.max() < 1, (name, off.max())


def _one_writer(workdir: pathlib.Path, count: int) -> None:
    """What all share was written once; each process's own files are merged."""
    folder = workdir / "iteration_0"
    lines = metrics.read_metrics(folder / "ppo" / "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(1, UPDATES + 1))
    assert not list((folder / "explore").glob("trajectories.process_*"))
    assert len(list((folder / "explore").glob("server.process_*.log"))) == count


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_processes_end_as_one(count, devices, single, policy, tmp_path):
    """Of five games one of two processes plays three, one of four plays two.

    (tests/runtime/test_distributed.py has the update on a mesh across processes.)
    """
    command = _whole(policy, tmp_path)
    programs.succeed_all(count, *command, devices=devices)
    _one_writer(tmp_path, count)
    _same_run(tmp_path, single, policy)
    assert (tmp_path / "report.html").exists()
    assert len(store.read(tmp_path / "eval" / "spa" / "trajectories.jsonl")) == 3
    if count == 4:
        again = programs.finish_all(programs.start_all(2, *command))
        assert [done.returncode for done in again] == [0, 0], again[0].stderr + again[1].stderr
        assert "already done" in again[1].stdout


def _wait_for(processes, condition, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, "ended too early: " + "".join(ended[0].communicate())
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)


def test_sigterm_to_one_process_saves_and_ends_all(single, policy, tmp_path):
    """And run again, they end bit for bit as two that were not stopped."""
    for name in ("unbroken", "broken"):
        command = _ppo(policy, tmp_path / name, single)
        if name == "broken":
            processes = programs.start_all(2, *command)
            file = tmp_path / name / "iteration_0" / "ppo" / "metrics.jsonl"
            _wait_for(processes, lambda f=file: programs.lines(f) >= 4)
            os.kill(processes[1].pid, signal.SIGTERM)
            started = time.monotonic()
            ended = programs.finish_all(processes)
            assert time.monotonic() - started < 30
            for done in ended:
                assert done.returncode == 143, done.stderr
                assert "stopped by SIGTERM after update" in done.stderr
                assert "Traceback" not in done.stderr
            written = metrics.read_metrics(file)[-1]["update"]
            assert 4 <= written < UPDATES, "stopped too late to mean anything"
            assert f"after update {written} of {UPDATES}" in ended[0].stderr
        programs.succeed_all(2, *command)
    ours, theirs = _weights(tmp_path / "broken"), _weights(tmp_path / "unbroken")
    for name, value in theirs.items():
        assert ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_playing_ends_all_at_once(how, policy, tmp_path):
    command = ("explore", f"--workdir={tmp_path}", f"--policy={policy}", *LONG)
    processes = programs.start_all(2, *command)
    files = [
        tmp_path / "iteration_0" / "explore" / f"trajectories.process_{i}.jsonl" for i in (0, 1)
    ]
    _wait_for(processes, lambda: all(programs.lines(file) >= 3 for file in files))
    os.kill(processes[0].pid, how)
    started = time.monotonic()
    ended = programs.finish_all(processes)
    assert time.monotonic() - started < 30
    assert [done.returncode for done in ended] == [128 + how] * 2, ended[0].stderr + ended[1].stderr
    said = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "stopped by Ctrl-C"}[how]
    assert said in ended[0].stderr
    assert f"process 0 ended: was {said}" in ended[1].stderr
    before = sum(programs.lines(file) for file in files)
    assert before < MANY * GAMES, "stopped too late to mean anything"
    # One process goes on where two were.
    programs.succeed(*command)
    assert len(store.read(files[0].with_name("trajectories.jsonl"))) == MANY * GAMES


def test_a_server_that_dies_for_good_ends_all_with_the_reason(policy, tmp_path):
    config = ServerConfig(
        data_dir="tests.envs.odd:Split", prompt="short", max_sessions=3, env="custom"
    )
    file = tmp_path / "iteration_0" / "explore" / "trajectories.process_1.jsonl"
    command = ("explore", f"--workdir={tmp_path}", f"--policy={policy}", *LONG)
    with LocalServer(config, token="") as server:
        port = f"--coordinator_address=127.0.0.1:{programs.free_port()}"
        shared = (port, "--num_processes=2", "--env_wait_s=3")
        processes = [
            programs.start(*command, *shared, "--process_id=0"),
            programs.start(*command, *shared, "--process_id=1", f"--env_address={server.address}"),
        ]
        _wait_for(processes, lambda: programs.lines(file) >= 2)
        os.kill(server.pid, signal.SIGKILL)
        ended = programs.finish_all(processes, timeout=90)
    assert [done.returncode for done in ended] == [2, 2], ended[0].stderr + ended[1].stderr
    assert "no environment server answers" in ended[1].stderr
    assert "process 1 ended: no environment server answers" in ended[0].stderr
    assert "Traceback" not in ended[0].stderr + ended[1].stderr
    programs.succeed_all(2, *command)  # each with a server of its own
    assert len(store.read(file.with_name("trajectories.jsonl"))) == MANY * GAMES


def test_a_process_that_is_killed_while_training_ends_the_other(single, policy, tmp_path):
    processes = programs.start_all(2, *_ppo(policy, tmp_path, single), "--ppo_epochs=400")
    file = tmp_path / "iteration_0" / "ppo" / "metrics.jsonl"
    _wait_for(processes, lambda: programs.lines(file) >= 4)
    os.kill(processes[1].pid, signal.SIGKILL)
    ended = programs.finish_all(processes, timeout=150)
    assert ended[0].returncode not in (0, -signal.SIGKILL), ended[0].stderr
