"""Episodes as the report shows them: each step's text, and what the step got beside it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from spa_jax.trajectory import Step, Trajectory


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar from the middle of its box to one side.

    Attributes:
      value: what it stands for.
      width: its length as a share of half the box, in [0, 1].
    """

    value: float
    width: float


@dataclasses.dataclass(frozen=True)
class StepView:
    """One row: the text, and beside it what the step got (None: not annotated).

    Attributes:
      number: from 1, as people count.
      observation: what the policy read.
      thought: what it wrote before its action (or all of it, without an action).
      action: the command that was sent; empty if none could be read.
      remainder: what it wrote after its action.
      grounded: whether the environment could execute the action.
      contribution: c_k.
      reward: the fused reward.
      sum: c_1 + ... + c_k.
    """

    number: int
    observation: str
    thought: str
    action: str
    remainder: str
    grounded: bool
    contribution: Bar | None
    reward: Bar | None
    sum: float | None


@dataclasses.dataclass(frozen=True)
class Line:
    """The running sum as a drawing in a box of 100 by 100, y downwards.

    Attributes:
      points: "x,y x,y ..." from (0, 0) to the last step.
      end: (x, y) of the last point.
      zero: y of 0.
      outcome: y of the final reward.
      ungrounded: (x, y) after each step that could not be executed.
    """

    points: str
    end: tuple[float, float]
    zero: float
    outcome: float
    ungrounded: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class View:
    """One episode."""

    trajectory: Trajectory
    steps: tuple[StepView, ...]
    total: float | None
    grounded: int
    line: Line | None


def is_annotated(trajectory: Trajectory) -> bool:
    """Whether there are steps, and all of them have a contribution."""
    steps = trajectory.steps
    return bool(steps) and all(step.contribution is not None for step in steps)


def running_sum(trajectory: Trajectory) -> np.ndarray:
    """[steps + 1] float64: b, b + c_1, ... of an annotated trajectory, b expected at the start."""
    contributions = [step.contribution for step in trajectory.steps]
    start = trajectory.expected or 0.0
    return np.cumsum(np.asarray([start, *contributions], np.float64))


def bar_scale(trajectories: Sequence[Trajectory]) -> float:
    """What a full bar stands for: the largest |c| or |reward|, so that all bars compare."""
    values = [
        abs(value)
        for trajectory in trajectories
        for step in trajectory.steps
        for value in (step.contribution, step.reward)
        if value is not None
    ]
    return max(values, default=0.0) or 1.0


def view(trajectory: Trajectory, scale: float) -> View:
    """An episode with its bars drawn to `scale`."""
    sums = running_sum(trajectory) if is_annotated(trajectory) else None
    steps = tuple(
        _step(k, step, scale, None if sums is None else float(sums[k + 1]))
        for k, step in enumerate(trajectory.steps)
    )
    return View(
        trajectory=trajectory,
        steps=steps,
        total=None if sums is None else float(sums[-1]),
        grounded=sum(step.grounded for step in trajectory.steps),
        line=None if sums is None else _line(trajectory, sums),
    )


def _step(k: int, step: Step, scale: float, total: float | None) -> StepView:
    thought, action, remainder = _split(step)
    return StepView(
        number=k + 1,
        observation=step.observation.strip(),
        thought=thought,
        action=action,
        remainder=remainder,
        grounded=step.grounded,
        contribution=_bar(step.contribution, scale),
        reward=_bar(step.reward, scale),
        sum=total,
    )


def _split(step: Step) -> tuple[str, str, str]:
    """The response around its action; an action that was rewritten stands after the response."""
    response, action = step.response.strip(), step.action.strip()
    before, found, after = response.rpartition(action) if action else (response, "", "")
    if action and not found:
        return response, action, ""
    return before.strip(), action, after.strip()


def _bar(value: float | None, scale: float) -> Bar | None:
    return None if value is None else Bar(value, min(1.0, abs(value) / scale))


def _line(trajectory: Trajectory, sums: np.ndarray) -> Line:
    top = max(1.0, float(sums.max()), trajectory.final_reward)
    bottom = min(0.0, float(sums.min()))
    # A margin of 6 keeps strokes and dots inside the box.
    x = 2 + 96 * np.arange(len(sums)) / (len(sums) - 1)

    def height(value: float) -> float:
        return round(94 - 88 * (float(value) - bottom) / (top - bottom), 2)

    points = [(round(float(x_k), 2), height(s)) for x_k, s in zip(x, sums, strict=True)]
    return Line(
        points=" ".join(f"{px},{py}" for px, py in points),
        end=points[-1],
        zero=height(0.0),
        outcome=height(trajectory.final_reward),
        ungrounded=tuple(
            point
            for point, step in zip(points[1:], trajectory.steps, strict=True)
            if not step.grounded
        ),
    )
