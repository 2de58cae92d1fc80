"""The one record of spa_jax: an episode that somebody played.

Exploration writes trajectories, the progress estimator annotates them, PPO
reads them, evaluation and the report read them.  On disk a trajectory is one
line of JSON (`spa_jax.store`).

One integer a token says who wrote it:

    token_ids  <user> You see a mug. <assistant> take mug <eot> \n <user> ...
    step_id    -1     -1  -1 -1 -1   -1          0    0   0     -1 -1     ...

`step_id[i] == -1` is context (instructions, observations, template tokens,
forced ends of turn); `step_id[i] == k` is a token that the policy wrote in
step `k`.  Masks, step ends, values a step and grounding are all derived from
it (`spa_jax.batching`).
"""

import dataclasses
import enum
import math
from typing import Annotated, Any

import pydantic
from pydantic import Field

from spa_jax import schema as schema_lib
from spa_jax.errors import UserError
from spa_jax.schema import Count, Flag, Number, Share, Size, Text

SCHEMA_VERSION = 2
_READ = (1, 2)  # what `from_json` reads; 1 knew nothing of progress
_FORBID = pydantic.ConfigDict(extra="forbid")  # a field that is not known is no field of ours
_Integer = Annotated[int, Field(strict=True)]
_Owner = Annotated[int, Field(strict=True, ge=-1, le=2**31 - 1)]


class TrajectoryError(UserError):
    """A record that is not a trajectory of this schema; says which field and what to do."""


class Status(enum.StrEnum):
    """How an episode ended.  `ENV_ERROR` is nobody's outcome: it never reaches a loss."""

    SUCCESS = "success"  # the environment paid the full reward
    FAILURE = "failure"  # the environment ended it with less, or --give_up_after did
    MAX_STEPS = "max_steps"  # the limit on environment steps was reached
    MAX_TOKENS = "max_tokens"  # the policy did not end its turn within the limit
    CONTEXT_FULL = "context_full"  # the next turn would not fit into the context
    DEADLINE = "deadline"  # a turn took longer than its wall-clock limit
    ENV_ERROR = "env_error"  # the environment failed


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens were drawn.  The policy is softmax(logits / temperature).

    `temperature == 0` is greedy decoding; `top_k == 0` and `top_p == 1` cut nothing.  A turn
    ends with the token that completes one of the texts of `stop`.
    """

    __pydantic_config__ = _FORBID

    temperature: Annotated[Number, Field(ge=0)] = 1.0
    top_k: Count = 0
    top_p: Annotated[Share, Field(gt=0)] = 1.0
    max_new_tokens: Size = 32
    stop: tuple[Text, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """One environment step: what the policy read, what it wrote, what came of it.

    Attributes:
      observation: the text that the policy read before it acted (without the
        instruction, which the trajectory holds once).
      response: the text that the policy wrote, without the end-of-turn token.
      action: the command that was read out of `response` and sent to the
        environment; empty if none could be read.
      grounded: whether the environment could execute the action.
      policy_version: the update count of the weights that wrote the step.
      progress: how much of the task was done after the step, in [0, 1], as the environment says;
        None if it does not.  No policy reads it.
      partial: whether a limit cut the turn (tokens, context, deadline): its action was not sent
        to the environment.
      contribution: c_k of the progress estimator; None until annotated.
      reward: the fused reward of the step; None until annotated.
    """

    __pydantic_config__ = _FORBID

    observation: Text
    response: Text
    action: Text
    grounded: Flag
    policy_version: Count = 0
    contribution: Number | None = None
    reward: Number | None = None
    partial: Flag = False
    progress: Share | None = None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One episode.

    Attributes:
      env: the environment's name, such as "alfworld".
      task: the environment's own name of the task.
      task_type: its kind, for tables by type; may be empty.
      split: the data split that the task came from.
      seed: the seed of the rollout; (task, seed, attempt) is the key.
      attempt: the rollout's index among those of the same task and seed.
      retry: how many environment errors came before; not part of the key.
      policy: who played: "expert", or the policy's path.
      status: how the episode ended.
      final_reward: R in [0, 1], paid by the environment at the end.
      instruction: the text before the first observation, shown once.
      steps: the environment steps, in order.
      final_observation: what the environment answered to the last action.
      initial_progress: `Step.progress` before the first step.
      expected: the R that the estimator expects before the first step: with the contributions it
        adds up to the estimate of R; None until annotated.
      sampling: how tokens were drawn; None for a scripted policy.
      token_ids: exactly the ids that the policy read and wrote (empty for a
        scripted policy: `chat.encode_trajectory` makes them).
      step_id: the step that wrote each token, -1 for context; same length.
      log_probs: log softmax(logits / temperature)[token] of each policy token
        when it was drawn, 0 for context; same length.
      ref_log_probs: the same under the reference policy; None until annotated.
      ref_policy: which policy that was (`provenance.policy_digest`); empty until annotated.
      schema: SCHEMA_VERSION.
    """

    __pydantic_config__ = _FORBID

    env: Text
    task: Text
    split: Text
    seed: _Integer
    attempt: Count
    policy: Text
    status: Status
    final_reward: Share
    instruction: Text
    steps: tuple[Step, ...]
    final_observation: Text = ""
    initial_progress: Share | None = None
    expected: Number | None = None
    task_type: Text = ""
    retry: Count = 0
    sampling: Sampling | None = None
    token_ids: tuple[Count, ...] = ()
    step_id: tuple[_Owner, ...] = ()
    log_probs: tuple[Number, ...] = ()
    ref_log_probs: tuple[Number, ...] | None = None
    ref_policy: Text = ""
    schema: Count = SCHEMA_VERSION

    @property
    def key(self) -> tuple[str, int, int]:
        """(task, seed, attempt): what exactly-once exploration counts."""
        return (self.task, self.seed, self.attempt)

    @property
    def success(self) -> bool:
        """Whether the environment paid the full reward."""
        return self.status is Status.SUCCESS

    @property
    def predicted(self) -> float:
        """The estimator's R of an annotated episode."""
        return (self.expected or 0.0) + math.fsum(step.contribution or 0.0 for step in self.steps)

    @property
    def progress(self) -> tuple[float, ...] | None:
        """What was done before the first step and after each, n + 1 numbers; None if unknown."""
        known = (self.initial_progress, *(step.progress for step in self.steps))
        told = tuple(p for p in known if p is not None)
        return told if len(told) == len(known) else None


def to_json(trajectory: Trajectory) -> dict[str, Any]:
    """The trajectory as plain JSON values."""
    return dataclasses.asdict(trajectory) | {"status": trajectory.status.value}


def from_json(record: Any) -> Trajectory:
    """Reads back what `to_json` made, and records of schema 1 as those of this one.

    Raises:
      TrajectoryError: if the record is of another schema version, lacks a field,
        has an unknown one or one of another type or out of range, or its per-token lists differ
        in length.
    """
    if not isinstance(record, dict):
        raise TrajectoryError(f"expected a JSON object, got {type(record).__name__}")
    if record.get("schema") not in _READ:
        raise TrajectoryError(
            f"trajectory schema {record.get('schema')!r}, this version reads 1 and 2; "
            "explore again, or read it with the version that wrote it"
        )
    try:
        trajectory = _SCHEMA.validate_python(record | {"schema": SCHEMA_VERSION})
    except pydantic.ValidationError as error:
        raise TrajectoryError(f"not a trajectory: {schema_lib.said(error)}") from error
    _check(trajectory)
    return trajectory


def from_line(line: bytes) -> Trajectory | None:
    """`from_json` of a line of JSON, faster; None where `from_json` must say why not.

    Args:
      line: UTF-8.
    """
    if b'"schema":' not in line:  # a missing field would have its default
        return None
    try:
        trajectory = _SCHEMA.validate_json(line)
    except pydantic.ValidationError:
        return None
    if trajectory.schema != SCHEMA_VERSION:
        return None
    _check(trajectory)
    return trajectory


_SCHEMA = pydantic.TypeAdapter(Trajectory)


def _check(trajectory: Trajectory) -> None:
    length = len(trajectory.token_ids)
    for name in ("step_id", "log_probs", "ref_log_probs"):
        values = getattr(trajectory, name)
        if values is not None and len(values) != length:
            raise TrajectoryError(f"{name} has {len(values)} entries for {length} token_ids")
    if length and max(trajectory.step_id) >= len(trajectory.steps):
        raise TrajectoryError(
            f"step_id names step {max(trajectory.step_id)} of {len(trajectory.steps)} steps"
        )
    written = [k for k in trajectory.step_id if k >= 0]
    if written != sorted(written):
        raise TrajectoryError(
            "step_id goes back to an earlier step; each is written once, in order"
        )
