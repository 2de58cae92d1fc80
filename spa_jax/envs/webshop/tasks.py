"""Which goals make a split.

A split is an index file beside the catalogue, `<split>_indices.json`: a list of goals'
indices.  The official data come with train_indices.json and test_indices.json (of the
paper; they point into the full catalogue's human goals), the generator writes its own.  A
catalogue without such files, and the benchmark's 1,000-product catalogue, whose goals the
official files do not point into, is split by product: every fifth is a test product.
"""

import hashlib
import json
import re
import zlib
from pathlib import Path

from spa_jax.envs.contract import Index
from spa_jax.envs.protocol import Task
from spa_jax.envs.webshop.goals import Goal
from spa_jax.envs.webshop.store import Catalogue, open_catalogue, store_folder
from spa_jax.errors import UserError

ALL = "all"
_SUFFIX = "_indices.json"
_NAME = re.compile(r"goal_(\d+)")
_TEST_SHARE = 5


def goal_name(number: int) -> str:
    """The task name of a goal."""
    return f"goal_{number}"


def goal_number(task: str) -> int:
    """The goal of a task name.

    Raises:
      UserError: if it is none.
    """
    match = _NAME.fullmatch(task)
    if match is None:
        raise UserError(f"{task!r} is no WebShop task; they are called goal_0, goal_1, ...")
    return int(match[1])


class GoalIndex(Index[Path]):
    """The goals of a data folder, by split.

    Args:
      data_dir: a prepared store, a folder that holds one, or one with a small catalogue.

    Attributes:
      root: the folder.

    Raises:
      UserError: if there is no catalogue.
    """

    def __init__(self, data_dir: str | Path):
        self.root = Path(data_dir)
        self._catalogue: Catalogue = open_catalogue(self.root)
        self._files: dict[str, Path] = {}
        if not self._catalogue.official_small:
            store = store_folder(self.root)
            for folder in (self.root, self.root / "webshop", *((store.parent,) if store else ())):
                for path in sorted(folder.glob(f"*{_SUFFIX}")):
                    self._files[path.name.removesuffix(_SUFFIX)] = path

    def splits(self) -> list[str]:
        """The names of the splits: those of the index files, or train and test; and all."""
        return sorted(self._files or ("test", "train")) + [ALL]

    def place(self, split: str, task: str) -> Path:
        """What `WebshopEngine.reset` opens to play this task.

        Raises:
          UserError: if there is no such split or goal.
        """
        self._check_split(split)
        if goal_number(task) >= self._catalogue.goals:
            raise UserError(f"{self.root} has no goal {task!r}")
        return self.root

    def tasks(self, split: str) -> tuple[list[Task], list[str]]:
        """The tasks of a split in its order, and why others are left out: none is.

        Raises:
          UserError: if the split does not exist, or its file does not fit the catalogue.
        """
        self._check_split(split)
        goals = range(self._catalogue.goals)
        if split in self._files:
            numbers = self._read(self._files[split])
            return [_task(split, n, self._catalogue.goal(n)) for n in numbers], []
        tasks = [
            _task(split, n, goal) for n in goals if _in(goal := self._catalogue.goal(n), split)
        ]
        return tasks, []

    def _check_split(self, split: str) -> None:
        if split not in self.splits():
            raise UserError(
                f"{self.root} has no split {split!r}; it has: {', '.join(self.splits())}"
            )

    def _read(self, path: Path) -> list[int]:
        try:
            numbers = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no whole JSON file ({error})") from error
        if not isinstance(numbers, list) or not all(isinstance(n, int) for n in numbers):
            raise UserError(f"{path} is no list of goals' indices")
        if beyond := [n for n in numbers if not 0 <= n < self._catalogue.goals]:
            raise UserError(
                f"{path} names goal {beyond[0]}, but this catalogue has {self._catalogue.goals} "
                f"({self._catalogue.kind}): the paper's files need the full products and "
                "items_human_ins.json"
            )
        return numbers


def _in(goal: Goal, split: str) -> bool:
    test = zlib.crc32(goal.asin.encode()) % _TEST_SHARE == 0
    return split == ALL or test == (split == "test")


def _task(split: str, number: int, goal: Goal) -> Task:
    asked = json.dumps([goal.asin, goal.attributes, goal.options, goal.price_upper])
    layout = hashlib.sha256(asked.encode()).hexdigest()[:16]
    return Task(goal_name(number), split, goal.category, layout)
