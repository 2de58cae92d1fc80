"""The expert of a task: its own program, as commands of the interface."""

from collections.abc import Sequence

from spa_jax.envs.virtualhome.actions import parse


class Expert:
    """Goes through a program, command by command.

    It does not look at the home: played alone it solves its task (that is checked when a task
    is made); beside another player it waits until its next command has been given.

    Args:
      program: the commands.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self._left = list(program)

    def observe(self, command: str) -> None:
        """Learns that a command was given, whatever came of it."""
        if self._left and parse(command) == parse(self._left[0]):
            del self._left[0]

    def act(self) -> str:
        """The next command; empty at the program's end."""
        return self._left[0] if self._left else ""
