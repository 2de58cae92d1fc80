"""What an environment is made of: an engine that plays and an index of what can be played.

`spa_jax.envs.benchmarks` names both parts of each environment.  The server loads the index, a
worker process the engine.  `Place` is the type of what the index gives and the engine opens: a
path for the environments with a data folder, "MODULE:CLASS" for a class of one's own.
"""

from typing import Protocol, TypeVar

from spa_jax.envs.protocol import Observation, Task

Place = TypeVar("Place")
_Opened = TypeVar("_Opened", contravariant=True)


class Engine(Protocol[_Opened]):
    """Plays tasks one after the other: `reset`, then `step` until an observation is done.

    A worker process makes one, without arguments, and keeps it for all its games.  There is no
    `close`: the process ends, at any moment, so nothing may be left half written.

    Any exception but a UserError is an environment error: the process is replaced, and the episode
    is nobody's outcome.
    """

    def reset(
        self, place: _Opened, *, task: str, prompt: str, expert: bool, seed: int
    ) -> Observation:
        """Starts a task, also while another one is running.

        Args:
          place: what `Index.place` gave for the task.
          task: the task's name, which all observations carry.
          prompt: which instruction to show, one of the environment's `PROMPTS`.
          expert: whether each observation carries `expert_action`, and `admissible` if it can be
            listed, until the task is done.
          seed: all that is random comes from it and the task.  Environments without anything
            random do not look at it.

        Returns:
          The first observation: reward 0, not done, grounded, with the instruction, and with the
          progress before the first step if the environment knows it.

        Raises:
          UserError: if the task's data is missing or broken, the prompt is unknown, or an expert
            is wanted and there is none.  The process lives on.
        """

    def step(self, action: str) -> Observation:
        """Plays one action.

        Args:
          action: the action alone, without a thought and without "Action: " (see
            `spa_jax.envs.protocol`).  Any text: one that is no action changes nothing, is answered
            with `grounded` False, and never raises.

        Returns:
          What came of it.  The step that ends the episode pays R, in [0, 1]; what was won stays
          won if the client plays on.  Its `progress` is that of the state after the action, in
          [0, 1]: it may fall, an action that is not executed leaves it as it is, and a task that
          was won stays at 1.  No text, instruction or expert's action tells it.
        """


class Index(Protocol[Place]):
    """What can be played, read off the environment's data.

    The server makes one of the value of --<env>_data, in its own process, and asks it from several
    threads.  Making it raises UserError if there is no such data.

    Attributes:
      root: the data, for messages.
    """

    root: Place

    def splits(self) -> list[str]:
        """The names of the splits, always in the same order; the first is a reset's default."""

    def place(self, split: str, task: str) -> Place:
        """What `Engine.reset` opens to play the task.

        Both names come from a client: they are compared with names that are known, and never
        used as a path unseen.

        Raises:
          UserError: if there is no such split or task.
        """

    def tasks(self, split: str) -> tuple[list[Task], list[str]]:
        """The tasks of a split, always in the same order, and why others are left out.

        Raises:
          UserError: if there is no such split, or nothing in it can be played.
        """
