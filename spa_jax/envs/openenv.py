"""The trainer's way to any text environment behind OpenEnv's protocol (--env=openenv).

Such a server has no list of tasks, so a task is a seed: task i of a split is named "<split>-<i>",
and a hash of the name is the seed of its reset.  Which fields of its actions and observations mean
what is read off its /schema, or said by the --openenv_* flags.
"""

import json
import math
import zlib
from typing import Any

from spa_jax.config import EnvConfig
from spa_jax.envs.client import EnvClient, Wire
from spa_jax.envs.protocol import USER_ERROR, EnvError, Observation, Task
from spa_jax.errors import UserError

OPENENV = "openenv"

# Usual names of what an environment says and of what it is told, best first.
_TEXTS = (
    "text", "observation", "prompt", "message", "echoed_message", "content", "response", "result",
    "output", "stdout",
)  # fmt: skip
_ACTIONS = ("text", "action", "message", "command", "content", "code")


class OpenEnvClient(EnvClient):
    """A server of a text environment.

    Args:
      address: see `EnvClient`.
      env: the --openenv_* settings.
      wait_s: see `EnvClient`.
      token: see `EnvClient`.
    """

    def __init__(
        self, address: str, env: EnvConfig, wait_s: float = 120.0, token: str | None = None
    ):
        super().__init__(address, wait_s=wait_s, token=token)
        self._env = env
        self._fields: dict[str, str] | None = None

    def tasks(self, split: str) -> list[Task]:
        """--openenv_tasks tasks; another split has others."""
        if self._env.openenv_tasks < 1:
            raise UserError("--openenv_tasks must be at least 1")
        names = [f"{split}-{i}" for i in range(self._env.openenv_tasks)]
        return [Task(name, split, "", layout=name, seed=seed_of(name)) for name in names]

    def wire(self) -> "TextWire":
        """How a new session talks.

        Raises:
          UserError: if the schema does not say which field is which, or lacks one that a flag
            names.
        """
        if self._fields is None:
            self._fields = _choose_fields(self._get("/schema", timeout_s=10.0), self._env)
        return TextWire(self._env, self._fields)


def seed_of(task: str) -> int:
    """The seed of a task's reset, below 2^31."""
    return zlib.crc32(task.encode()) >> 1


def _choose_fields(schema: Any, env: EnvConfig) -> dict[str, str]:
    """Which field is the text, the action, success and grounding; "" where there is none."""
    try:
        action, observation = schema["action"], schema["observation"]
        told, shown = action.get("properties", {}), observation.get("properties", {})
        texts = [name for name in shown if shown[name].get("type") == "string"]
        tells = [name for name in told if told[name].get("type") == "string"]
        needed = [name for name in tells if name in action.get("required", [])]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("--env_address: /schema is not that of an OpenEnv server") from error
    return {
        "text": _field("openenv_text", env.openenv_text, shown, texts, _TEXTS),
        "action": _field("openenv_action", env.openenv_action, told, needed or tells, _ACTIONS),
        "success": _flag("openenv_success", env.openenv_success, shown, "success"),
        "grounded": _flag("openenv_grounded", env.openenv_grounded, shown, "grounded"),
    }


def _field(flag: str, wanted: str, known: Any, texts: list[str], usual: tuple[str, ...]) -> str:
    if wanted:
        return _flag(flag, wanted, known, "")
    for name in usual:
        if name in texts:
            return name
    if len(texts) == 1:
        return texts[0]
    raise UserError(f"--{flag}: which field is it? There are: {', '.join(known) or 'none'}")


def _flag(flag: str, wanted: str, known: Any, default: str) -> str:
    if not wanted:
        return default if default in known else ""
    # A schema without properties belongs to a server that does not say what it sends.
    if known and wanted.removeprefix("!") not in known:
        raise UserError(f"--{flag}={wanted}: there is no such field, but: {', '.join(known)}")
    return wanted


class TextWire(Wire):
    """One session's requests and answers, translated.

    Args:
      env: the --openenv_* settings.
      fields: what `_choose_fields` found.
    """

    def __init__(self, env: EnvConfig, fields: dict[str, str]):
        self._env, self._fields = env, fields
        self._paid = 0.0
        self._task = ""

    def reset(self, task: str, split: str, seed: int, expert: bool, prompt: str) -> dict[str, Any]:
        """The data of a reset; the environment's seed is the task's."""
        if expert:
            raise EnvError("an OpenEnv environment has no expert: give a --policy", USER_ERROR,
                           retryable=False)  # fmt: skip
        self._paid, self._task = 0.0, task
        return {"seed": seed_of(task)}

    def step(self, action: str) -> dict[str, Any]:
        """The data of a step."""
        self._task = ""
        return {self._fields["action"]: action}

    def read(self, data: dict[str, Any]) -> Observation:
        """The observation in an answer.

        Raises:
          EnvError: if the answer lacks a field, or R is not in [0, 1].
        """
        shown, first = data.get("observation"), self._task
        if not isinstance(shown, dict) or self._fields["text"] not in shown:
            raise EnvError(
                f"the environment's observation has no field {self._fields['text']!r}: see "
                "--openenv_text", USER_ERROR, retryable=False,
            )  # fmt: skip
        text, done = shown[self._fields["text"]], bool(data.get("done"))
        reward = self._reward(data.get("reward"), shown, done)
        success = self._holds("success", shown, done and reward == 1.0)
        return Observation(
            text=text if isinstance(text, str) else json.dumps(text), reward=reward, done=done,
            success=success, grounded=self._holds("grounded", shown, True),
            instruction=self._env.openenv_instruction if first else "", task=first,
        )  # fmt: skip

    def _holds(self, name: str, shown: dict[str, Any], otherwise: bool) -> bool:
        field = self._fields[name]
        if not field:
            return otherwise
        value = bool(shown.get(field.removeprefix("!")))
        return not value if field.startswith("!") else value

    def _reward(self, paid: Any, shown: dict[str, Any], done: bool) -> float:
        """What the episode is paid so far, of which the last is R."""
        choice = self._env.openenv_reward
        self._paid += float(paid or 0.0)
        chosen = {"last": paid, "sum": self._paid}.get(choice, shown.get(choice))
        try:
            reward = float(chosen or 0.0) * self._env.openenv_reward_scale
        except (TypeError, ValueError) as error:
            raise EnvError(f"--openenv_reward={choice}: the environment sent {chosen!r:.100}",
                           USER_ERROR, retryable=False) from error  # fmt: skip
        # Sums of rewards are as exact as floats are.
        reward = round(reward, 9)
        if done and not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
            raise EnvError(
                f"an episode was paid R = {reward:g}, not in [0, 1]: choose --openenv_reward and "
                "--openenv_reward_scale", USER_ERROR, retryable=False,
            )  # fmt: skip
        return reward
