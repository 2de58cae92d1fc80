"""Exploration records every episode exactly once, however often it, an environment's process or
the server is killed."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from spa_jax import exclusive, store
from spa_jax.envs.alfworld.generate import generate
from spa_jax.envs.local import LocalServer
from spa_jax.server_config import ServerConfig
from spa_jax.trajectory import Status, Trajectory, from_json
from tests import programs, tiny

GAMES, ROLLOUTS = 3, 4
KEYS = GAMES * ROLLOUTS


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("explore")
    generate(root / "games" / "train", games=GAMES, seed=3)
    return (
        f"--policy={tiny.tiny_policy(root / 'tiny')}",
        f"--alfworld_data={root / 'games'}",
        f"--rollouts={ROLLOUTS}",
        "--slots=3",
        "--max_steps=6",
        "--max_new_tokens=12",
        "--context_length=512",
    )


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory) -> list[Trajectory]:
    workdir = tmp_path_factory.mktemp("unbroken")
    said = programs.succeed("explore", f"--workdir={workdir}", *flags)
    assert f"episodes={KEYS}" in said
    played = store.read(workdir / "iteration_0" / "explore" / "trajectories.jsonl")
    assert len(played) == KEYS
    # The comparison is worth something: episodes differ, and have several steps.
    assert len({t.token_ids for t in played}) == KEYS
    assert max(len(t.steps) for t in played) > 1
    assert {t.status for t in played} <= {Status.MAX_STEPS, Status.MAX_TOKENS}
    return played


def _kill_and_resume(workdir: pathlib.Path, flags, kills: int, seed: int) -> list[Trajectory]:
    """Kills the stage `kills` times, each when a random number of episodes more are done."""
    file = workdir / "iteration_0" / "explore" / "trajectories.jsonl"
    rng = random.Random(seed)
    command = ("explore", f"--workdir={workdir}", *flags)
    for _ in range(kills):
        enough = programs.lines(file) + rng.randint(1, max(1, KEYS // (kills + 2)))
        programs.kill_when(programs.start(*command), lambda n=enough: programs.lines(file) >= n)
        assert programs.lines(file) < KEYS, "killed too late to mean anything"
        if rng.random() < 0.5:  # what a kill inside a write would leave behind
            with file.open("ab") as torn:
                torn.write(b'{"env": "alfworld", "ta')
    programs.succeed(*command)
    return store.read(file)  # refuses a key that is there twice


def _compare(played: list[Trajectory], unbroken: list[Trajectory]) -> None:
    assert [t.key for t in played] == [t.key for t in unbroken]
    for ours, theirs in zip(played, unbroken, strict=True):
        assert ours.token_ids == theirs.token_ids, ours.key
        assert ours.steps == theirs.steps, ours.key
        assert ours.status is theirs.status, ours.key
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


def test_killed_once(flags, unbroken, tmp_path):
    _compare(_kill_and_resume(tmp_path, flags, kills=1, seed=0), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", (1, 2))
def test_killed_at_several_random_moments(flags, unbroken, tmp_path, seed):
    _compare(_kill_and_resume(tmp_path, flags, kills=4, seed=seed), unbroken)


@pytest.mark.slow
def test_the_tokens_do_not_depend_on_how_many_episodes_are_played_at_once(
    flags, unbroken, tmp_path
):
    programs.succeed("explore", f"--workdir={tmp_path}", *flags, "--slots=5")
    _compare(store.read(tmp_path / "iteration_0" / "explore" / "trajectories.jsonl"), unbroken)


def _workers(server: int) -> list[int]:
    """The environment processes of a server: the children of its fork server."""
    with contextlib.suppress(psutil.Error):
        return [w.pid for child in psutil.Process(server).children() for w in child.children()]
    return []


def _games(flags: tuple[str, ...]) -> str:
    return next(f.partition("=")[2] for f in flags if f.startswith("--alfworld_data="))


def _compare_with_failures(workdir: pathlib.Path, unbroken: list[Trajectory]) -> None:
    """Every episode is there once and is the unbroken run's; failures are somewhere else."""
    folder = workdir / "iteration_0" / "explore"
    played = store.read(folder / "trajectories.jsonl")  # refuses a key that is there twice
    _compare(played, unbroken)
    lines = (folder / "failures.jsonl").read_text().splitlines()  # a key is there once a retry
    failures = [from_json(json.loads(line)) for line in lines]
    assert failures and {t.status for t in failures} == {Status.ENV_ERROR}
    assert {t.key for t in failures} <= {t.key for t in played}
    retries = {t.key: t.retry for t in played}
    for key in {t.key for t in failures}:
        assert sorted(t.retry for t in failures if t.key == key) == list(range(retries[key]))


def test_a_second_exploration_of_a_folder_is_refused(flags, tmp_path):
    """This process holds what the first one would."""
    exclusive.claim(tmp_path, ["explore"])
    done = programs.run("explore", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 2 and f"(process {os.getpid()} on " in done.stderr
    assert "is at work on its explore" in done.stderr
    assert not list(tmp_path.rglob("trajectories*"))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_environments_killed_and_stopped_at_random_moments(flags, unbroken, tmp_path, seed):
    rng, sent = random.Random(seed), []
    config = ServerConfig(
        _games(flags), prompt="short", max_sessions=3, step_deadline_s=3.0, reset_deadline_s=20.0
    )
    with LocalServer(config, start_deadline_s=120, token="") as server:
        command = (
            "explore",
            f"--workdir={tmp_path}",
            *flags,
            "--max_retries=1000",
            f"--env_address={server.address}",
        )
        process = programs.start(*command)
        while process.poll() is None and len(sent) < 10:
            if workers := _workers(server.pid):
                # The first two are one of each kind, at once: the games last a second or two.
                kinds = (signal.SIGKILL, signal.SIGSTOP)
                how = kinds[len(sent)] if len(sent) < 2 else rng.choice(kinds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), how)
                    sent.append(how)
            time.sleep(rng.uniform(0.05, 0.5) if len(sent) > 1 else 0.01)
        done = programs.finish(process)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(sent) == {signal.SIGKILL, signal.SIGSTOP}
    _compare_with_failures(tmp_path, unbroken)


def _serve(flags: tuple[str, ...], port: int) -> tuple[subprocess.Popen, int]:
    """A server on that port, and the port."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.serve_env",
            f"--alfworld_data={_games(flags)}",
            "--prompt=short",
            f"--port={port}",
        ],
        cwd=programs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    match = re.search(r":(\d+)$", process.stdout.readline().strip())
    assert match
    return process, int(match[1])


@pytest.mark.slow
def test_the_server_killed_and_started_again(flags, unbroken, tmp_path):
    server, port = _serve(flags, 0)
    file = tmp_path / "iteration_0" / "explore" / "trajectories.jsonl"
    try:
        process = programs.start(
            "explore",
            f"--workdir={tmp_path}",
            *flags,
            "--max_retries=20",
            f"--env_address=http://127.0.0.1:{port}",
        )
        for enough in (1, 5):
            while programs.lines(file) < enough and process.poll() is None:
                time.sleep(0.002)
            server.kill()
            server.wait()
            assert process.poll() is None and programs.lines(file) < KEYS, "killed too late"
            time.sleep(1)
            server, _ = _serve(flags, port)
        done = programs.finish(process)
        assert done.returncode == 0, done.stdout + done.stderr
        _compare_with_failures(tmp_path, unbroken)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("policy", ["expert", "tiny"])
def test_an_environment_that_always_fails_is_tried_so_often_and_is_nobodys_failure(
    policy, flags, tmp_path
):
    tiny_flags = [f for f in flags if "alfworld" not in f and "rollouts" not in f]
    chosen = ["--policy=expert"] if policy == "expert" else tiny_flags
    command = (
        "explore",
        "--env=custom",
        "--custom_data=tests.envs.odd:Doomed",
        "--rollouts=1",
        "--max_retries=2",
        "--max_steps=3",
        f"--workdir={tmp_path}",
        f"--out={tmp_path}",
        *chosen,
        "--games=3",
    )
    said = programs.succeed(*command, "--max_failed_share=0.7")
    assert "RESULT success=1.0000" in said and "episodes=1" in said
    assert [t.task for t in store.read(tmp_path / "trajectories.jsonl")] == ["train_13"]
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").open()]
    assert {f["status"] for f in failures} == {"env_error"}
    tries = sorted((f["task"], f["retry"]) for f in failures)
    if policy == "expert":  # its tries are one call; what is recorded is the last
        assert [retry for _, retry in tries] == [2, 2]
    else:
        assert [retry for _, retry in tries] == [0, 1, 2, 0, 1, 2]
    assert all(f["seed"] == 0 for f in failures)
    (tmp_path / "done.json").unlink()
    refused = programs.run(*command)  # what survives is not said to be all
    assert refused.returncode == 2 and "RESULT" not in refused.stdout
    assert "the environment failed 2 of 3 episodes" in refused.stderr
    assert "--max_failed_share (is 0.2)" in refused.stderr
    assert not (tmp_path / "done.json").exists()
