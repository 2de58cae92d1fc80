"""When an episode ends."""

import pytest

from spa_jax.envs.protocol import Observation, Task
from spa_jax.rollout import Job, Player, _Episode, _final_reward, _outcome
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


@pytest.mark.parametrize(
    ("observation", "status", "reward"),
    [
        (_observation(done=True, success=True, reward=1.0), Status.SUCCESS, 1.0),
        (_observation(done=True, reward=0.5), Status.FAILURE, 0.5),  # bought nearly the right thing
        (_observation(reward=0.5), Status.MAX_STEPS, 0.0),  # not ended by the environment
    ],
)
def test_the_final_reward_is_what_the_environment_paid_at_the_end(observation, status, reward):
    player = Player("webshop", "p", 0, max_steps=2, prompt="short")
    assert _outcome(observation, _steps("++"), player) is status
    episode = _Episode(Job(Task("goal_1", "test", "", ""), 0, 0))
    episode.observation = observation
    record = episode.result(player, status, "", reward=_final_reward(episode))
    assert record.final_reward == reward and record.success == (reward == 1.0)
