"""Serves an environment of your own: one class of three methods (docs/environments.md).

The class is named, like a console script's entry point, by --custom_data=MODULE:CLASS:

    class Mine:
        instruction = "How to play, shown once before the first observation."
        splits = ("train", "heldout")
        def tasks(self, split: str) -> Sequence[str]: ...      names of tasks
        def reset(self, task: str, seed: int) -> str: ...      the first observation
        def step(self, action: str) -> Observation: ...

A fourth method is optional: `expert(self) -> str`, the action that an expert would take now.  A
class that knows how much of a task is done says it in `Observation.progress`, and its `reset` then
returns an Observation too.
"""

import dataclasses
import importlib
import inspect
from typing import Any

from spa_jax.envs import boundary
from spa_jax.envs.contract import Engine, Index
from spa_jax.envs.protocol import Observation, Task
from spa_jax.errors import UserError

# A class has one instruction, whatever --prompt says.
PROMPTS = ("paper", "short")
_NEEDS = ("tasks", "reset", "step", "instruction", "splits")


def load_class(name: str) -> type:
    """The class that "module:Class" names.

    Raises:
      UserError: if there is none, or it lacks a part.
    """
    module, _, kind = name.partition(":")
    how = "give MODULE:CLASS of an installed module or one on PYTHONPATH"
    if not module or not kind:
        raise UserError(f"--custom_data={name} is no class; {how}")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--custom_data={name} is no class ({error}); {how}") from error
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise UserError(
            f"--custom_data={name}: importing {module} raised {boundary.one_line(error)}\n"
            f"{boundary.indented(boundary.full_traceback(error))}"
        ) from error
    if missing := [part for part in _NEEDS if not hasattr(found, part)]:
        raise UserError(f"{name} lacks {', '.join(missing)}; see docs/environments.md")
    return found


class CustomIndex(Index[str]):
    """What the class says can be played.  It is asked in the server's own process, once.

    Args:
      name: "module:Class".

    Attributes:
      root: the name.

    Raises:
      UserError: if there is no such class, or it breaks its contract.
    """

    def __init__(self, name: str):
        self.root = name
        self._env = boundary.asked(name, load_class(name))
        given = boundary.asked(f"{name}.splits", lambda: self._env.splits)
        self._splits = boundary.names(f"{name}.splits", given, "split")
        self._known: dict[str, list[str]] = {}

    def splits(self) -> list[str]:
        """The names of the splits."""
        return self._splits

    def _names(self, split: str) -> list[str]:
        if split not in self._splits:
            has = ", ".join(self._splits)
            raise UserError(f"{self.root} has no split {split!r}; it has: {has}")
        if split not in self._known:
            where = f"{self.root}.tasks({split!r})"
            # What a generator raises, it raises when it is read.
            self._known[split] = boundary.asked(
                where, lambda: boundary.names(where, self._env.tasks(split), "task")
            )
        return self._known[split]

    def place(self, split: str, task: str) -> str:
        """What `CustomEngine.reset` opens: the class's name.

        Raises:
          UserError: if there is no such split or task.
        """
        if task not in self._names(split):
            raise UserError(f"no task {task!r} in split {split!r} of {self.root}")
        return self.root

    def tasks(self, split: str) -> tuple[list[Task], list[str]]:
        """The tasks of a split, and why others are left out: none is.

        Raises:
          UserError: if there is no such split, or it is empty.
        """
        # A name is all that we know of a task: it tells whether two splits share one.
        return [Task(name, split, "", layout=name) for name in self._names(split)], []


class CustomEngine(Engine[str]):
    """Plays the class's tasks one after the other; `reset`, then `step` until done."""

    def __init__(self) -> None:
        self._name = ""
        self._env: Any = None

    def reset(
        self, place: str, *, task: str, prompt: str = "", expert: bool = False, seed: int = 0
    ) -> Observation:
        """Starts a task.

        Args:
          place: "module:Class".
          task: the task's name.
          prompt: which instruction; there is one.
          expert: whether observations carry the expert's next action.
          seed: the client's seed.

        Raises:
          UserError: if the class has no expert and one is wanted, or breaks its contract.
        """
        if self._name != place:
            self._env, self._name = load_class(place)(), place
        if expert and not hasattr(self._env, "expert"):
            raise UserError(f"{place} has no expert: give it a method expert()")
        self._task, self._expert = task, expert
        first = boundary.plain(self._env.reset(task, seed))
        if isinstance(first, str):
            first = Observation(first, 0.0, False, False, True)
        now = boundary.observation(f"{place}.reset", first, first=True)
        return dataclasses.replace(self._completed(now), instruction=self._instruction())

    def step(self, action: str) -> Observation:
        """Plays the action.

        Raises:
          UserError: if the class breaks its contract.
        """
        now = boundary.observation(f"{self._name}.step", self._env.step(action))
        return dataclasses.replace(self._completed(now), instruction="")

    def _instruction(self) -> str:
        try:
            return inspect.cleandoc(boundary.text("instruction", self._env.instruction))
        except ValueError as error:
            raise UserError(f"{self._name}: {error}") from error

    def _completed(self, now: Observation) -> Observation:
        """What a method returned, with the task, and the expert's action if one is wanted."""
        action = now.expert_action
        if self._expert and not now.done:
            given = self._env.expert()
            action = boundary.plain(given)
            if not isinstance(action, str) or not action.strip():
                raise UserError(
                    f"{self._name}.expert returned {given!r:.100}: it must be a text, the action "
                    "that an expert would take now"
                )
            action = str.__str__(action)
        return dataclasses.replace(now, task=self._task, expert_action=action)
