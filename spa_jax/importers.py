"""Other people's logs as trajectories: the ShareGPT style of the SPA authors' data.

[{"id": ..., "conversations": [
    {"from": "human", "value": "Interact with a household to solve a task. ..."},
    {"from": "gpt",   "value": "OK"},                        <- acknowledgement, dropped
    {"from": "human", "value": "You are in the middle of a room. ..."},
    {"from": "gpt",   "value": "Thought: ...\\nAction: go to desk 1"},
    {"from": "human", "value": "Observation: On the desk 1, you see ..."},
    ...]}, ...]
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from spa_jax.errors import UserError
from spa_jax.trajectory import Status, Step, Trajectory

VALID_SHARE = 0.1  # of the tasks of a log, held out
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_ACKNOWLEDGEMENT = re.compile(r"ok(ay)?\W*", re.IGNORECASE)
_ACTION = re.compile(r"^\s*Action:\s*(.*?)\s*$", re.MULTILINE)


def read_sharegpt(
    path: str | os.PathLike[str], *, env: str, split: str = "train"
) -> list[Trajectory]:
    """Reads a JSON list of ShareGPT-style conversations.

    The first human turn is the instruction if a bare "OK" answers it, and otherwise the first
    observation. Texts are kept as they are. The log does not say whether an action was executable:
    every step counts as grounded, which is no matter for imitation. A record's own `reward` (1 if
    it has none) is the final reward; its `game_file` or `id` names the task, and a task that comes
    several times gives several attempts.

    Args:
      path: the JSON file.
      env: the environment's name.
      split: the data split that the tasks came from.

    Returns:
      Trajectories without tokens (`chat.encode_trajectory` makes them), in the file's order.

    Raises:
      UserError: not such a file; names the record and the turn.
    """
    path = pathlib.Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON list of conversations")
    attempts: collections.Counter[str] = collections.Counter()
    trajectories = []
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        texts = _texts(where, record)
        task = str(record.get("game_file") or record.get("id", number))
        about = {"env": env, "split": split, "task": task}
        trajectories.append(_trajectory(where, record, texts, attempt=attempts[task], **about))
        attempts[task] += 1
    return trajectories


def _texts(where: str, record: Any) -> list[str]:
    """The turns' texts: human, gpt, human, ..."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise UserError(f'{where}: expected an object with a list of "conversations"')
    texts = []
    for i, turn in enumerate(turns):
        role = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if role not in _ROLES or not isinstance(text, str):
            raise UserError(
                f'{where}, turn {i}: expected {{"from": "human" or "gpt", "value": text}}'
            )
        if _ROLES[role] != i % 2:
            raise UserError(
                f"{where}, turn {i}: comes from {role!r}; human and gpt must take turns, "
                "human first"
            )
        texts.append(text)
    return texts


def _trajectory(
    where: str, record: Any, texts: list[str], *, env: str, split: str, task: str, attempt: int
) -> Trajectory:
    """The trajectory of a record's texts."""
    instruction = ""
    if len(texts) > 2 and _ACKNOWLEDGEMENT.fullmatch(texts[1].strip()):
        instruction, texts = texts[0], texts[2:]
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
    """The demonstrations of a log, as `read_sharegpt` reads it: its episodes whose reward is 1.

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
    solved = [t for t in read_sharegpt(path, env=env) if t.success]
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
