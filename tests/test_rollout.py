"""When an episode ends."""

import pytest

from spa_jax.envs.protocol import Observation
from spa_jax.rollout import Player, _outcome
from spa_jax.trajectory import Status, Step


def _observation(**changes) -> Observation:
    fields = {"text": "", "reward": 0.0, "done": False, "success": False, "grounded": True}
    return Observation(**fields | changes)


def _steps(grounded: str) -> list[Step]:
    return [Step("", "go", "go", mark == "+") for mark in grounded]


@pytest.mark.parametrize(
    ("grounded", "give_up_after", "status"),
    [
        ("", 3, None),
        ("--", 3, None),
        ("---", 3, Status.FAILURE),
        ("+---", 3, Status.FAILURE),
        ("--+-", 3, None),  # in a row
        ("-----", 0, None),
        ("-", 1, Status.FAILURE),
        ("++++++", 3, Status.MAX_STEPS),
        ("+++---", 3, Status.MAX_STEPS),  # both: the step limit is named
    ],
)
def test_an_episode_ends_after_its_steps_or_when_it_is_stuck(grounded, give_up_after, status):
    player = Player("alfworld", "p", 0, max_steps=6, prompt="short", give_up_after=give_up_after)
    assert _outcome(_observation(), _steps(grounded), player) is status


def test_the_environment_decides_first():
    player = Player("alfworld", "p", 0, max_steps=2, prompt="short", give_up_after=2)
    stuck = _steps("--")
    won = _observation(done=True, success=True, reward=1.0)
    assert _outcome(won, stuck, player) is Status.SUCCESS
    assert _outcome(_observation(done=True), [], player) is Status.FAILURE
