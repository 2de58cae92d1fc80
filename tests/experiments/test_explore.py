"""Exploration records every episode exactly once, however often it is killed."""

import pathlib
import random

import pytest

from spa_jax import store
from spa_jax.envs.alfworld.generate import generate
from spa_jax.trajectory import Status, Trajectory
from tests import tiny
from tests.experiments import stages

GAMES, ROLLOUTS = 3, 4
KEYS = GAMES * ROLLOUTS


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("explore")
    generate(root / "games" / "train", games=GAMES, seed=3)
    return (
        f"--policy={tiny.tiny_policy(root / 'tiny')}",
        f"--alfworld_data={root / 'games'}",
        f"--rollouts={ROLLOUTS}", "--slots=3", "--max_steps=6", "--max_new_tokens=12",
        "--context_length=512",
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory) -> list[Trajectory]:
    workdir = tmp_path_factory.mktemp("unbroken")
    said = stages.succeed("explore", f"--workdir={workdir}", *flags)
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
        enough = stages.lines(file) + rng.randint(1, max(1, KEYS // (kills + 2)))
        stages.kill_when(stages.start(*command), lambda n=enough: stages.lines(file) >= n)
        assert stages.lines(file) < KEYS, "killed too late to mean anything"
        if rng.random() < 0.5:  # what a kill inside a write would leave behind
            with file.open("ab") as torn:
                torn.write(b'{"env": "alfworld", "ta')
    stages.succeed(*command)
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
    stages.succeed("explore", f"--workdir={tmp_path}", *flags, "--slots=5")
    _compare(store.read(tmp_path / "iteration_0" / "explore" / "trajectories.jsonl"), unbroken)
