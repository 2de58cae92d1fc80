"""The trainer's way to any text environment behind OpenEnv's protocol (--env=openenv).

Such a server has no list of tasks, so a task is a seed: task i of a split is named "<split>-<i>",
and a hash of the name is the seed of its reset.  Which fields of its actions and observations mean
what is read off its /schema.  Where that is not enough, an `OpenEnvMapping` says it: the
environment's author once, in the schema of the observation, under "x-spa-jax"; whoever trains in
the JSON file --openenv_mapping, whose keys win.
"""

import dataclasses
import difflib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spa_jax.config import EnvConfig
from spa_jax.envs import boundary
from spa_jax.envs.client import EnvClient, Wire
from spa_jax.envs.protocol import USER_ERROR, EnvError, Observation, Task
from spa_jax.envs.text import parse_action
from spa_jax.errors import UserError

OPENENV = "openenv"
NONE = "none"  # as a mapping's "progress": no field says it
EXTENSION = "x-spa-jax"  # the key of a mapping in the schema of an observation

# Usual names of what an environment says and of what it is told, best first.
_TEXTS = (
    "text",
    "observation",
    "prompt",
    "message",
    "echoed_message",
    "content",
    "response",
    "result",
    "output",
    "stdout",
)
_ACTIONS = ("text", "action", "message", "command", "content", "code")


_NUMBERS = ("reward_scale", "reward_range")  # the keys that are no texts


@dataclasses.dataclass(frozen=True)
class OpenEnvMapping:
    """What the fields of an OpenEnv environment mean.  An empty name is chosen by the schema.

    Attributes:
      instruction: the text before the first observation.
      action: the field of an action that gets the policy's; empty: the one text that it needs.
      text: the field of an observation that the policy reads; empty: by its usual name.
      reward: R of an episode: "last", the reward that ends it; "sum" of its rewards; or the field
        of the last observation that this names.
      reward_scale: R is multiplied by it; what is below 0 then counts as 0, and what is above 1 is
        refused.  None: by 1, and what is below 0 is refused too.
      reward_range: [LOW, HIGH], what the environment pays at the least and at the most: R is
        mapped onto [0, 1].  None: it is not.
      success: a flag of an observation, or its opposite with "!" before it; empty: that the episode
        ended with R = 1.  A field `success` is not taken by its name: many environments say by it
        that a command ran.
      grounded: the same for whether the action could be executed, such as "!error"; empty:
        `grounded` if there is one, else always.
      progress: how much of the task is done, a number in [0, 1] or null; "none": nothing says it;
        empty: `progress` if there is one that is no text.

    Raises:
      UserError: if a value has the wrong type, or makes no sense.
    """

    instruction: str = (
        "Read what the environment shows and decide what to do. Answer with one line: "
        '"Action: " and then the action.'
    )
    action: str = ""
    text: str = ""
    reward: str = "last"
    reward_scale: float | None = None
    reward_range: tuple[float, float] | None = None
    success: str = ""
    grounded: str = ""
    progress: str = ""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name not in _NUMBERS and not isinstance(value, str):
                raise UserError(f'"{name}" must be a text, not {value!r:.100}')
        scale, ends = self.reward_scale, self.reward_range
        if scale is not None and (not _is_number(scale) or scale == 0):
            raise UserError(f'"reward_scale" must be a number other than 0, not {scale!r:.100}')
        if ends is not None:
            pair = isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))
            if not pair or not ends[0] < ends[1]:
                raise UserError(
                    '"reward_range" must be two numbers, the lesser first, such as [-1, 1], not '
                    f"{ends!r:.100}"
                )
            object.__setattr__(self, "reward_range", (float(ends[0]), float(ends[1])))
            if scale is not None:
                raise UserError('"reward_scale" and "reward_range" exclude each other: drop one')
        if not self.reward:
            raise UserError('"reward" must be "last", "sum" or a field of the observation')
        if self.progress.startswith("!"):
            raise UserError('"progress" must be a field with a number, which has no opposite')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KEYS = tuple(field.name for field in dataclasses.fields(OpenEnvMapping))


def _checked(given: Any, source: str) -> dict[str, Any]:
    """Some of a mapping's keys with their values.

    Args:
      given: what should be them.
      source: where it is from, for messages.

    Raises:
      UserError: if it is no mapping, or a key or a value is wrong.
    """
    if not isinstance(given, dict):
        raise UserError(f"{source}: a mapping is a JSON object with keys of {', '.join(_KEYS)}")
    for key in given:
        if key not in _KEYS:
            (nearest,) = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)
            raise UserError(
                f'{source}: there is no key "{key}"; did you mean "{nearest}"? '
                f"The keys are {', '.join(_KEYS)}"
            )
    try:
        OpenEnvMapping(**given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return given


def _read_mapping(path: str) -> dict[str, Any]:
    """The keys in the file --openenv_mapping; none if there is no such flag.

    Raises:
      UserError: if it cannot be read, or a key or a value is wrong.
    """
    if not path:
        return {}
    source = f"--openenv_mapping={path}"
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source} is no whole JSON file: {error}") from error
    return _checked(given, source)


class OpenEnvClient(EnvClient):
    """A server of a text environment.

    Args:
      address: see `EnvClient`.
      env: the --openenv_* settings.
      wait_s: see `EnvClient`.
      token: see `EnvClient`.

    Raises:
      UserError: if --openenv_mapping is not a mapping's file, or a setting makes no sense.
    """

    def __init__(
        self, address: str, env: EnvConfig, wait_s: float = 120.0, token: str | None = None
    ):
        super().__init__(address, wait_s=wait_s, token=token)
        self._count = env.openenv_tasks
        self._given = _read_mapping(env.openenv_mapping)
        if env.openenv_success:
            self._given |= {"success": env.openenv_success}
        if env.openenv_reward_scale:
            scale = {"reward_scale": env.openenv_reward_scale}
            self._given |= _checked(scale, f"--openenv_reward_scale={env.openenv_reward_scale:g}")
            self._given.pop("reward_range", None)
        if env.openenv_reward_range:
            source = f"--openenv_reward_range={env.openenv_reward_range}"
            if env.openenv_reward_scale:
                raise UserError(f"{source} and --openenv_reward_scale exclude each other: drop one")
            self._given |= _checked({"reward_range": _ends(env.openenv_reward_range)}, source)
            self._given["reward_scale"] = None
        self._mapping: OpenEnvMapping | None = None

    def tasks(self, split: str) -> list[Task]:
        """--openenv_tasks tasks; another split has others."""
        if self._count < 1:
            raise UserError("--openenv_tasks must be at least 1")
        names = [f"{split}-{i}" for i in range(self._count)]
        return [Task(name, split, "", layout=name, seed=seed_of(name)) for name in names]

    def wire(self) -> "TextWire":
        """How a new session talks.

        Raises:
          UserError: if the schema does not say which field is which, or lacks one that the mapping
            names.
        """
        if self._mapping is None:
            schema = self._get("/schema", timeout_s=10.0)
            self._mapping = complete_mapping(schema, self._given)
            if not self._mapping.success and "success" in _shown(schema) and not self.notes:
                self.noted(
                    "its field 'success' is not read, because many environments say by it that a "
                    "command ran: an episode succeeds that ends with R = 1 "
                    "(--openenv_success=success takes it)"
                )
        return TextWire(self._mapping, self.noted)


def _ends(text: str) -> list[Any]:
    """The two numbers of LOW,HIGH; whatever else it is, for a message."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text.split(",")


def _shown(schema: Any) -> Mapping[str, Any]:
    """The fields of an observation in a schema that has been read."""
    return schema["observation"].get("properties", {})


def seed_of(task: str) -> int:
    """The seed of a task's reset, below 2^31."""
    return zlib.crc32(task.encode()) >> 1


def complete_mapping(schema: Any, given: Mapping[str, Any]) -> OpenEnvMapping:
    """The mapping of a server, with the names of all fields; "" where there is no such field.

    Args:
      schema: the answer of /schema.
      given: keys that are known without it; they win over those that the schema declares.

    Raises:
      UserError: if the schema does not say which field is which, or lacks one that is named.
    """
    try:
        action, observation = schema["action"], schema["observation"]
        sent, shown = action.get("properties", {}), observation.get("properties", {})
        texts = [name for name in shown if _says(shown[name], "string", observation)]
        sent_texts = [name for name in sent if _says(sent[name], "string", action)]
        needed = [name for name in sent_texts if name in action.get("required", [])]
        declared = observation.get(EXTENSION, {})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("--env_address: /schema is not that of an OpenEnv server") from error
    declared = _checked(declared, f"{EXTENSION} in the schema of the server at --env_address")
    keys = {**declared, **given}
    # A file's way to map rewards wins over the schema's.
    if given.get("reward_range") is not None:
        keys["reward_scale"] = None
    elif given.get("reward_scale") is not None:
        keys["reward_range"] = None
    mapping = OpenEnvMapping(**keys)
    return dataclasses.replace(
        mapping,
        text=_field("text", mapping.text, known=shown, texts=texts, usual=_TEXTS),
        action=_field(
            "action", mapping.action, known=sent, texts=needed or sent_texts, usual=_ACTIONS
        ),
        success=_flag("success", mapping.success, shown, ""),
        grounded=_flag("grounded", mapping.grounded, shown, "grounded"),
        progress=_progress(mapping.progress, observation),
    )


def _says(field: Any, kind: str, root: Mapping[str, Any], depth: int = 8) -> bool:
    """Whether a field of a JSON schema may be of a type, alone or beside others, such as null."""
    if not isinstance(field, Mapping) or not depth:
        return False
    types = field.get("type")
    if types == kind or (isinstance(types, list) and kind in types):
        return True
    values = [field["const"]] if "const" in field else field.get("enum") or []
    if types is None and kind == "string" and any(isinstance(value, str) for value in values):
        return True
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in field.get(key) or []]
    name = str(field.get("$ref", "")).removeprefix("#/$defs/")
    if name:
        parts.append((root.get("$defs") or {}).get(name))
    return any(_says(part, kind, root, depth - 1) for part in parts)


def _progress(wanted: str, observation: Mapping[str, Any]) -> str:
    """The field that tells it; "" for none."""
    if wanted == NONE:
        return ""
    shown = observation.get("properties", {})
    usual = "" if _says(shown.get("progress"), "string", observation) else "progress"
    return _flag("progress", wanted, shown, usual)


def _field(
    key: str, wanted: str, *, known: Mapping[str, Any], texts: list[str], usual: tuple[str, ...]
) -> str:
    if wanted:
        return _flag(key, wanted, known, "")
    for name in usual:
        if name in texts:
            return name
    if len(texts) == 1:
        return texts[0]
    fields = ", ".join(known) or "none"
    raise UserError(
        f'--openenv_mapping: which field is the {key}? Say it by the key "{key}" of that file; '
        f"there are: {fields}"
    )


def _flag(key: str, wanted: str, known: Mapping[str, Any], default: str) -> str:
    if not wanted:
        return default if default in known else ""
    # A schema without properties belongs to a server that does not say what it sends.
    if known and wanted.removeprefix("!") not in known:
        raise UserError(
            f'--openenv_mapping: "{key}": "{wanted}": there is no such field, but: '
            f"{', '.join(known)}"
        )
    return wanted


def _user_error(message: str) -> EnvError:
    """An error that only the user can mend: the run stops with it."""
    return EnvError(message, USER_ERROR, retryable=False)


_REMEDY = (
    "--openenv_reward_range=LOW,HIGH maps what it pays onto [0, 1] (-1,1 where a loss pays -1, a "
    "draw 0 and a win 1); --openenv_reward_scale=S multiplies it, and what is below 0 then counts "
    'as 0; "reward" in --openenv_mapping says which of its numbers is R'
)


class TextWire(Wire):
    """One session's requests and answers, translated.

    Args:
      mapping: what `complete_mapping` made.
      noted: takes what was done to an answer, for whoever plays.
    """

    def __init__(self, mapping: OpenEnvMapping, noted: Callable[[str], None] = lambda what: None):
        self._mapping, self._noted = mapping, noted
        self._paid = 0.0
        self._task = ""

    def reset(
        self, task: str, split: str, *, seed: int, expert: bool, prompt: str
    ) -> dict[str, Any]:
        """The data of a reset; the environment's seed is the task's."""
        if expert:
            raise _user_error("an OpenEnv environment has no expert: give a --policy")
        self._paid, self._task = 0.0, task
        return {"seed": seed_of(task)}

    def step(self, text: str, parsed: bool) -> dict[str, Any]:
        """The data of a step."""
        self._task = ""
        return {self._mapping.action: text if parsed else parse_action(text)}

    def read(self, data: dict[str, Any]) -> Observation:
        """The observation in an answer.

        Raises:
          EnvError: if the answer lacks a field, one has another type, R is not in [0, 1], or the
            episode ended at its reset.
        """
        shown, first, field = data.get("observation"), self._task, self._mapping.text
        if not isinstance(shown, dict) or field not in shown:
            raise _user_error(
                f'the environment\'s observation has no field {field!r}: see "text" in '
                "--openenv_mapping"
            )
        text = "" if shown[field] is None else shown[field]
        try:
            done = boundary.flag("done", data.get("done", shown.get("done")) or False)
        except ValueError as error:
            raise _user_error(f"the environment answered, and {error}") from error
        if first and done:
            raise _user_error(
                f"the environment ended task {first!r} at its reset, before anything was played: "
                "an episode begins with done=false"
            )
        reward = self._reward(data.get("reward", shown.get("reward")), shown, done)
        now = Observation(
            text=text if isinstance(text, str) else json.dumps(text),
            reward=reward,
            done=done,
            success=self._success(shown, done and reward == 1.0),
            grounded=_holds(self._mapping.grounded, shown, True),
            instruction=self._mapping.instruction if first else "",
            task=first,
            progress=self._progress(shown),
        )
        try:
            boundary.check_outcome(now)
        except ValueError as error:
            named = f" of its field {self._mapping.success!r}" if self._mapping.success else ""
            raise _user_error(
                f'the environment answered with the success{named}: {error}; "success", "progress" '
                f"and the rewards of --openenv_mapping say which fields mean what; {_REMEDY}"
            ) from error
        return now

    def _success(self, shown: dict[str, Any], otherwise: bool) -> bool:
        """Whether the task is solved: what the flag says, if there is one."""
        field = self._mapping.success
        if not field or field.startswith("!"):
            return _holds(field, shown, otherwise)
        try:
            return boundary.flag(f"field {field!r}", shown.get(field) or False)
        except ValueError as error:
            raise _user_error(
                f'the environment answered, and {error}; name another by "success" in '
                "--openenv_mapping"
            ) from error

    def _progress(self, shown: dict[str, Any]) -> float | None:
        """How much of the task is done; None if no field says it, or this observation's is null."""
        field = self._mapping.progress
        try:
            return boundary.progress(shown.get(field)) if field else None
        except ValueError as error:
            raise _user_error(
                f"the environment's field {field!r}: {error}; name another one, or "
                f'"{NONE}", by "progress" in --openenv_mapping'
            ) from error

    def _reward(self, paid: Any, shown: dict[str, Any], done: bool) -> float:
        """R of an episode that has ended; 0 before."""
        mapping = self._mapping
        choice = mapping.reward
        try:
            self._paid += boundary.number("reward", 0.0 if paid is None else paid)
            chosen = {"last": paid, "sum": self._paid}.get(choice, shown.get(choice))
            if not done:
                return 0.0
            reward = boundary.number("reward", 0.0 if chosen is None else chosen)
        except ValueError as error:
            raise _user_error(
                f'the environment answered, and {error} ("reward": "{choice}" in --openenv_mapping)'
            ) from error
        if mapping.reward_range is not None:
            low, high = mapping.reward_range
            mapped = (reward - low) / (high - low)
        else:
            mapped = reward * (mapping.reward_scale or 1.0)
        mapped = round(mapped, 9)  # sums of rewards are as exact as floats are
        if mapped < 0 and mapping.reward_scale is not None:
            self._noted("R was below 0 and counts as 0, as --openenv_reward_scale has it")
            return 0.0
        if not 0.0 <= mapped <= 1.0:
            raise _user_error(f"an episode was paid R = {mapped:g}, not in [0, 1]: {_REMEDY}")
        return mapped


def _holds(field: str, shown: dict[str, Any], otherwise: bool) -> bool:
    """Whether an observation's flag, or its opposite, is true; `otherwise` without a flag."""
    if not field:
        return otherwise
    value = bool(shown.get(field.removeprefix("!")))
    return not value if field.startswith("!") else value
