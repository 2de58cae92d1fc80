"""What travels between an environment server and its clients.

The wire is OpenEnv's WebSocket session protocol: one JSON object a message.

    client -> server   {"type": "reset", "data": {"task", "split", "seed", "prompt", "expert"}}
                       {"type": "step", "data": {"text": ..., "parsed": false}}
                       {"type": "state"}   {"type": "close"}
    server -> client   {"type": "observation", "data": {"observation": {...}, "reward", "done"}}
                       {"type": "state", "data": {"episode_id", "step_count", ...}}
                       {"type": "error", "data": {"message", "code", "retryable"[, "traceback"]}}

One connection is one session, and one session owns one environment process.  The same messages
go over HTTP, one game a request (POST /reset and /step).

**An action is parsed once**, by `spa_jax.envs.text.parse_action`, where a policy's text first comes
to us.  For a policy that we play that is `spa_jax.rollout`: it records the action, and sends it
with "parsed": true.  A client that leaves "parsed" out sends what its model wrote ("Thought: ...
Action: ...", or an action alone), and the server's session parses that.  An engine is given the
action and parses nothing.
"""

import dataclasses
from typing import Any

# Codes of OpenEnv's protocol.
INVALID_JSON = "INVALID_JSON"
UNKNOWN_TYPE = "UNKNOWN_TYPE"
VALIDATION_ERROR = "VALIDATION_ERROR"  # a message that makes no sense: do not send it again
CAPACITY_REACHED = "CAPACITY_REACHED"  # every session is taken: try again later
USER_ERROR = "FACTORY_ERROR"  # no environment can be made of the user's data or request
ENV_ERROR = "EXECUTION_ERROR"  # the environment failed: reset the session and try again
SESSION_ERROR = "SESSION_ERROR"  # the session is over, for being idle: open another one
NO_SERVER = "NO_SERVER"  # ours, never on the wire: nobody answers, for as long as a client waits


class EnvError(Exception):
    """The environment, or the way to it, failed; nobody's outcome.

    Attributes:
      code: one of the codes above.
      retryable: whether a reset and another try can help.
      traceback: of the environment's own error; empty if there is none.
    """

    def __init__(
        self, message: str, code: str = ENV_ERROR, retryable: bool = True, traceback: str = ""
    ):
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.traceback = traceback

    @property
    def full_message(self) -> str:
        """The message, and below it the traceback."""
        return f"{self}\n{self.traceback}".rstrip()


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the environment answers to a reset or a step.

    Attributes:
      text: the observation as the policy reads it.
      reward: of this step; the full reward is 1.0, paid when the task is done.
      done: whether the episode has ended.
      success: whether the task was solved, now or earlier in the episode.
      grounded: whether the action was executable; True after a reset.
      instruction: how to play, at a reset; empty afterwards.
      task: the task's name in its split.
      task_type: its kind, for tables by type.
      expert_action: what the expert would do next, if the reset asked for it.
      admissible: what could be done now, if the reset asked for the expert and the environment
        can list it.  No policy reads it.
      progress: how much of the task is done now, in [0, 1]; None if the environment does not know.
        Credit is judged by it.  No policy reads it.
    """

    text: str
    reward: float
    done: bool
    success: bool
    grounded: bool
    instruction: str = ""
    task: str = ""
    task_type: str = ""
    expert_action: str = ""
    admissible: tuple[str, ...] = ()
    progress: float | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One game of a split.

    Attributes:
      task: its name, unique in the split.
      split: the split.
      task_type: its kind.
      layout: a hash of receptacles, placements and goal: equal for games that are the
        same room with the same goal.
      seed: the generator's seed; None for games that were not generated.
    """

    task: str
    split: str
    task_type: str
    layout: str
    seed: int | None = None


def observation_to_wire(observation: Observation) -> dict[str, Any]:
    """The `data` of an observation message."""
    fields = dataclasses.asdict(observation)
    return {"reward": fields.pop("reward"), "done": fields.pop("done"), "observation": fields}
