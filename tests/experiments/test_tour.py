"""The tour, as a newcomer runs it: every stage, and the report."""

import json
import re

import pytest

from spa_jax.envs.guess import Guess
from tests import programs


@pytest.mark.slow
def test_it_shows_every_stage(tmp_path):
    out = programs.succeed(
        "tour",
        "--flagfile=experiments/presets/tour.flags",
        f"--workdir={tmp_path}",
        f"--policy={tmp_path / 'start'}",
    )
    assert re.search(r"RESULT base_success=0\.\d{4} spa_success=0\.\d{4} .*games=100 ", out)
    assert "<svg" in (tmp_path / "report.html").read_text()
    judged = json.loads((tmp_path / "estimator.json").read_text())
    assert judged["trajectories"] == 100 and 0 <= judged["subgoal_auc"] <= 1


def test_the_expert_halves_what_it_can_be():
    env = Guess()
    shared = [set(env.tasks(split)) for split in env.splits]
    assert not set.intersection(*shared)
    for task in env.tasks("heldout")[:50]:
        told, steps = [env.reset(task, 0).progress], 0
        done = False
        while not done:
            now = env.step(env.expert())
            done, steps = now.done, steps + 1
            told.append(now.progress)
        assert now.success and steps <= 7 and told[-1] == 1
        assert told == sorted(told) and told[0] == 0
    env.reset("number_0", 0)
    assert not env.step("guess 101").grounded
