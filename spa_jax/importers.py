"""Other people's logs as trajectories: the ShareGPT style of the SPA authors' data.

[{"id": ..., "conversations": [
    {"from": "human", "value": "Interact with a household to solve a task. ..."},
    {"from": "gpt",   "value": "OK"},                        <- acknowledgement, dropped
    {"from": "human", "value": "You are in the middle of a room. ..."},
    {"from": "gpt",   "value": "Thought: ...\\nAction: go to desk 1"},
    {"from": "human", "value": "Observation: On the desk 1, you see ..."},
    ...]}, ...]

or OpenAI's: {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}.
"""

import codecs
import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from spa_jax import parquet
from spa_jax.errors import UserError
from spa_jax.texts import replace_surrogates
from spa_jax.trajectory import Status, Step, Trajectory

VALID_SHARE = 0.1  # of the tasks of a log, held out
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_ACKNOWLEDGEMENT = re.compile(r"ok(ay)?\W*", re.IGNORECASE)
_ACTION = re.compile(r"^\s*Action:\s*(.*?)\s*$", re.MULTILINE)


def read_log(path: str | os.PathLike[str], *, env: str, split: str = "train") -> list[Trajectory]:
    """Reads conversations: a JSON list of records, a record a line, or a row of Parquet each.

    A record's turns are its "conversations" ("from", "value") or its "messages" ("role",
    "content").  The first human turn is the instruction if the answer is an acknowledgement: a bare
    "OK", or a turn that says `"loss": false`; otherwise it is the first observation.  A system turn
    at the start belongs to the instruction.  Texts are kept as they are, but for lone surrogates,
    which are replaced and counted.  The log does not say whether an action was executable: every
    step counts as grounded, which is no matter for imitation.  A record's own `reward` (1 if it has
    none) is the final reward; its `game_file` or `id` names the task, and a task that comes several
    times gives several attempts.

    Args:
      path: the file, in UTF-8 or with a byte order mark.
      env: the environment's name.
      split: the data split that the tasks came from.

    Returns:
      Trajectories without tokens (`chat.encode_trajectory` makes them), in the file's order.

    Raises:
      UserError: not such a file; names the line or the record, and the turn.
    """
    path = pathlib.Path(path)
    attempts: collections.Counter[str] = collections.Counter()
    trajectories: list[Trajectory] = []
    replaced = 0
    for where, record in _records(path):
        talk = _talk(where, record)
        replaced += talk.replaced
        named = str(record.get("game_file") or record.get("id", len(trajectories)))
        task, count = replace_surrogates(named)
        replaced += count
        about = {"env": env, "split": split, "task": task}
        trajectories.append(_trajectory(where, record, talk, attempt=attempts[task], **about))
        attempts[task] += 1
    if replaced:
        print(f"{path}: {replaced} lone surrogates were replaced (half of an emoji, say)")
    return trajectories


def _records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) of a JSON list, of JSON lines, or of a Parquet table's rows."""
    if path.suffix == parquet.ENDING:
        yield from parquet.read(path)
        return
    try:
        data = path.read_bytes()
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = data.decode("utf-16" if data.startswith(marks) else "utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 ({error})") from error
    if text.lstrip().startswith("{") and len(text.strip().splitlines()) > 1:
        yield from _lines(path, text)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if isinstance(records, dict) and records.keys() & {"conversations", "messages"}:
        records = [records]  # a file of one line
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON list of conversations, or one a line")
    for number, record in enumerate(records):
        yield f"{path}: record {number}", record


def _lines(path: pathlib.Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: cannot be read as JSON ({error})") from error


@dataclasses.dataclass(frozen=True)
class _Talk:
    """The turns of a record.

    Attributes:
      system: the text of the system turns at its start.
      texts: human, gpt, human, ...
      acknowledged: whether the first answer only acknowledges the instruction.
      replaced: how many lone surrogates its texts had.
    """

    system: str
    texts: list[str]
    acknowledged: bool
    replaced: int


def _talk(where: str, record: Any) -> _Talk:
    turns = None
    if isinstance(record, dict):
        turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        raise UserError(f'{where}: expected an object with a list of "conversations" or "messages"')
    system, replaced = "", 0
    texts: list[str] = []
    trained: list[bool] = []
    for i, turn in enumerate(turns):
        role, text = _turn(f"{where}, turn {i}", turn)
        text, count = replace_surrogates(text)
        replaced += count
        if role == "system" and not texts:
            system = f"{system}\n\n{text}" if system else text
            continue
        if role == "system" or _ROLES[role] != len(texts) % 2:
            raise UserError(
                f"{where}, turn {i}: comes from {role!r}; human and gpt must take turns, "
                "human first"
            )
        texts.append(text)
        trained.append(turn.get("loss") is not False or not _ROLES[role])
    acknowledged = len(texts) > 2 and (
        not trained[1] or _ACKNOWLEDGEMENT.fullmatch(texts[1].strip()) is not None
    )
    first = 2 if acknowledged else 0
    if not all(trained[first:]):
        at = trained.index(False, first)
        raise UserError(
            f'{where}, turn {at}: says "loss": false, and only the first answer, which '
            "acknowledges the instruction, can be left out of training: remove the record"
        )
    return _Talk(system, texts, acknowledged, replaced)


def _turn(where: str, turn: Any) -> tuple[str, str]:
    """(role, text) of a turn."""
    given = turn if isinstance(turn, dict) else {}
    role = given.get("from", given.get("role"))
    text = given.get("value", given.get("content"))
    if isinstance(text, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in text]
        known = [part for part in parts if isinstance(part, str)]
        text = "".join(known) if len(known) == len(parts) else None
    if role not in (*_ROLES, "system") or not isinstance(text, str):
        raise UserError(
            f'{where}: expected {{"from": "human" or "gpt", "value": text}}, or "role" and '
            '"content"'
        )
    return role, text


def _trajectory(
    where: str, record: Any, talk: _Talk, *, env: str, split: str, task: str, attempt: int
) -> Trajectory:
    """The trajectory of a record's turns."""
    instruction, texts = talk.system, talk.texts
    if talk.acknowledged:
        instruction = f"{talk.system}\n\n{texts[0]}" if talk.system else texts[0]
        texts = texts[2:]
    steps = []
    for observation, response in zip(texts[::2], texts[1::2], strict=False):
        actions = _ACTION.findall(response)
        steps.append(Step(observation, response, actions[-1] if actions else "", grounded=True))
    if not steps:
        raise UserError(f"{where}: holds no step (an observation and a response to it)")
    reward = record.get("reward", 1.0)
    if not isinstance(reward, (int, float)) or not 0 <= reward <= 1:
        raise UserError(f"{where}: reward {reward!r} is not a number from 0 to 1")
    return Trajectory(
        env=env,
        task=task,
        split=split,
        seed=0,
        attempt=attempt,
        policy="imported",
        status=Status.SUCCESS if reward == 1 else Status.FAILURE,
        final_reward=float(reward),
        instruction=instruction,
        steps=tuple(steps),
        final_observation=texts[-1] if len(texts) % 2 else "",
    )


def demonstrations(
    path: str | os.PathLike[str], *, env: str, seed: int, valid_share: float = VALID_SHARE
) -> dict[str, list[Trajectory]]:
    """The demonstrations of a log, as `read_log` reads it: its episodes whose reward is 1.

    Args:
      path: the JSON file.
      env: the environment's name.
      seed: of the choice of the tasks that are held out.
      valid_share: the share of those tasks.

    Returns:
      "train": the episodes to learn from; "valid": those held out.  The episodes of a task are
      in one of the two.

    Raises:
      UserError: the file is not such a log, or does not hold two tasks that were solved.
    """
    solved = [t for t in read_log(path, env=env) if t.success]
    tasks = sorted({t.task for t in solved})
    if len(tasks) < 2:
        raise UserError(
            f"{path}: holds {len(tasks)} tasks that were solved; some are held out to stop SFT by "
            "their loss, so at least 2 are needed"
        )
    if not 0 < valid_share < 1:
        raise UserError(f"--valid_share={valid_share}: give a share between 0 and 1")
    held_out = min(max(1, round(valid_share * len(tasks))), len(tasks) - 1)
    shuffled = np.random.default_rng(seed).permutation(len(tasks))
    valid = {tasks[i] for i in shuffled[:held_out]}
    demos: dict[str, list[Trajectory]] = {"train": [], "valid": []}
    for t in solved:
        split = "valid" if t.task in valid else "train"
        demos[split].append(dataclasses.replace(t, split=split))
    return demos
