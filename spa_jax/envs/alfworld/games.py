"""ALFWorld's games on disk: which there are, and whether they can be played.  No TextWorld here.

    DIR[/json_2.1.1]/<split>/<game>/<trial>/{game.tw-pddl, traj_data.json}

is the official layout; the generator writes it too.  A task's name is "<game>/<trial>".
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spa_jax.envs.contract import Index
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError

GAME_FILE = "game.tw-pddl"
TRAJECTORY_FILE = "traj_data.json"

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

_GAME_KEYS = ("pddl_domain", "grammar", "pddl_problem", "walkthrough")
# The facts that make a room: what stands in it, and what lies where.
_ROOM_FACT = re.compile(r"\((?:receptacleType|inReceptacle) [^()]*\)")


class LeftOut(UserError):
    """A game that the official loader leaves out as well: without a game file, or unsolvable."""


@dataclasses.dataclass(frozen=True)
class Game:
    """One playable game: the engine's JSON, and what traj_data.json says about it."""

    data: dict[str, Any]
    task_type: str
    layout: str
    seed: int | None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        kind = LeftOut if path.name == GAME_FILE else UserError
        raise kind(
            f"{path} is missing; the game was not written whole: fetch or generate it again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no whole JSON file ({error}); fetch or generate the game again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch or generate the game again")
    return value


def layout_hash(problem: str) -> str:
    """A hash of the receptacles, the objects' placement and the goal of a PDDL problem."""
    facts = sorted(set(_ROOM_FACT.findall(problem)))
    goal = " ".join(problem[problem.find("(:goal") :].split())
    return hashlib.sha256("\n".join([*facts, goal]).encode()).hexdigest()[:16]


def read_game(folder: Path) -> Game:
    """Reads and checks the game in `folder`.

    Raises:
      UserError: naming the file, if one is missing, cut short or lacks a field, or if the
        game is marked as one that cannot be solved.
    """
    trajectory = _read_json(folder / TRAJECTORY_FILE)
    data = _read_json(folder / GAME_FILE)
    missing = [key for key in _GAME_KEYS if not data.get(key)]
    if missing:
        raise UserError(f"{folder / GAME_FILE} lacks {', '.join(missing)}; fetch it again")
    if not data.get("solvable", False):
        raise LeftOut(f"{folder / GAME_FILE} is marked as unsolvable; choose another game")
    if trajectory.get("task_type") not in TASK_TYPES:
        raise UserError(
            f"{folder / TRAJECTORY_FILE}: task_type {trajectory.get('task_type')!r} is none of "
            + ", ".join(TASK_TYPES)
        )
    return Game(
        data=data,
        task_type=trajectory["task_type"],
        layout=layout_hash(data["pddl_problem"]),
        seed=trajectory.get("generator_seed"),
    )


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


class GameIndex(Index[Path]):
    """The games of a data folder, by split and name.

    Args:
      data_dir: json_2.1.1 itself, its parent, or any folder that holds splits.

    Raises:
      UserError: if `data_dir` is no folder.
    """

    def __init__(self, data_dir: str | Path):
        root = Path(data_dir)
        if not root.is_dir():
            raise UserError(
                f"--alfworld_data: {root} is no folder; give the one that holds json_2.1.1, or "
                "make games with python -m spa_jax.envs.alfworld.generate"
            )
        official = root / "json_2.1.1"
        self.root = official if official.is_dir() else root

    def splits(self) -> list[str]:
        """The names of the splits, sorted."""
        return _subfolders(self.root)

    def _games(self, split: str) -> list[str]:
        if split not in self.splits():
            raise UserError(
                f"{self.root} has no split {split!r}; it has: {', '.join(self.splits()) or 'none'}"
            )
        games = _subfolders(self.root / split)
        # As the official loader: these need actions that the text engine does not have.
        return [game for game in games if "movable" not in game and "Sliced" not in game]

    def _names(self, split: str) -> Iterator[str]:
        for game in self._games(split):
            for trial in _subfolders(self.root / split / game):
                yield f"{game}/{trial}"

    def place(self, split: str, task: str) -> Path:
        """The folder of a game.  Names are compared with what is on disk, never joined unseen.

        Raises:
          UserError: if there is no such split or game.
        """
        # A reset asks: of thousands of games, only the folder of this one is looked into.
        game, _, trial = task.partition("/")
        known = game in self._games(split)
        if not known or trial not in _subfolders(self.root / split / game):
            raise UserError(f"no game {task!r} in split {split!r} of {self.root}")
        return self.root / split / task

    def tasks(self, split: str) -> tuple[list[Task], list[str]]:
        """The playable games of a split sorted by name, and why others are left out.

        Raises:
          UserError: if the split does not exist or has no playable game, or a game's file is
            cut short: playing the rest would be another split.
        """
        tasks, problems = [], []
        for name in self._names(split):
            try:
                game = read_game(self.root / split / name)
            except LeftOut as error:
                problems.append(str(error))
                continue
            tasks.append(Task(name, split, game.task_type, game.layout, game.seed))
        if not tasks:
            raise UserError(
                f"{self.root / split} holds no playable game"
                + (f"; the first problem: {problems[0]}" if problems else "")
            )
        return tasks, problems
