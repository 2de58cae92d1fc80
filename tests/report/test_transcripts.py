import dataclasses

import numpy as np
import pytest

from spa_jax.report import transcripts
from spa_jax.trajectory import Status, Step, Trajectory


def episode(*steps, task="a", status=Status.SUCCESS, reward=1.0):
    return Trajectory(
        env="alfworld", task=task, split="valid", seed=0, attempt=0, policy="p", status=status,
        final_reward=reward, instruction="", steps=tuple(steps),
    )


def step(contribution=None, reward=None, *, response="look", action="look", grounded=True):
    return Step(
        "You see.", response, action, grounded, contribution=contribution, reward=reward
    )


def test_running_sum_by_hand():
    t = episode(step(0.25), step(-0.5), step(1.0))
    np.testing.assert_allclose(transcripts.running_sum(t), [0, 0.25, -0.25, 0.75])
    assert [s.sum for s in transcripts.view(t, 1.0).steps] == [0.25, -0.25, 0.75]
    t = dataclasses.replace(t, expected=0.5)
    np.testing.assert_allclose(transcripts.running_sum(t), [0.5, 0.75, 0.25, 1.25])
    assert t.predicted == 1.25


def test_half_annotated_is_not_annotated():
    assert not transcripts.is_annotated(episode(step(0.1), step(None)))
    assert not transcripts.is_annotated(episode())
    view = transcripts.view(episode(step(0.1), step(None)), 1.0)
    assert view.line is None and view.total is None


def test_all_bars_have_one_scale():
    first, second = episode(step(0.2, -0.3)), episode(step(-0.6, 0.1))
    scale = transcripts.bar_scale([first, second])
    assert scale == 0.6
    drawn = transcripts.view(first, scale).steps[0]
    assert drawn.contribution.width == pytest.approx(1 / 3)
    assert (drawn.reward.value, drawn.reward.width) == (-0.3, pytest.approx(0.5))
    assert transcripts.bar_scale([episode(step())]) == 1.0
    assert transcripts.bar_scale([episode(step(0.0, 0.0))]) == 1.0


@pytest.mark.parametrize(
    "response, action, expected",
    [
        ("Thought: hm.\nAction: go to desk 1", "go to desk 1",
         ("Thought: hm.\nAction:", "go to desk 1", "")),
        ("look, I look", "look", ("look, I", "look", "")),  # the last one is the action
        ("go  to desk 1", "go to desk 1", ("go  to desk 1", "go to desk 1", "")),
        ("take mug then stop", "take mug", ("", "take mug", "then stop")),
        ("no idea", "", ("no idea", "", "")),
        ("", "", ("", "", "")),
    ],
)
def test_the_action_inside_the_response(response, action, expected):
    view = transcripts.view(episode(step(response=response, action=action)), 1.0).steps[0]
    assert (view.thought, view.action, view.remainder) == expected


def test_the_line_holds_zero_the_outcome_and_every_sum():
    t = episode(step(0.5), step(1.0, grounded=False), step(-2.0), reward=1.0)
    line = transcripts.view(t, 1.0).line
    points = [tuple(map(float, pair.split(","))) for pair in line.points.split()]
    assert len(points) == 4 and line.end == points[-1]
    assert line.ungrounded == (points[2],)
    heights = [y for _, y in points]
    # Sums 0, 0.5, 1.5, -0.5 on a scale from -0.5 (94) to 1.5 (6).
    assert heights == [72.0, 50.0, 6.0, 94.0]
    assert (line.zero, line.outcome) == (72.0, 28.0)
    assert [x for x, _ in points] == [2, 34, 66, 98]
