"""A class of one's own, played in this process: no server and no socket (see `custom`).

For a notebook and a debugger.  What the class breaks, it breaks here; a run plays it behind a
server.
"""

from spa_jax.envs.custom import CustomEngine, CustomIndex
from spa_jax.envs.protocol import Observation, Task
from spa_jax.envs.text import parse_action
from spa_jax.errors import UserError


def name_of(kind: type) -> str:
    """ "MODULE:CLASS" of a class, by which it is found again.

    Raises:
      UserError: it is no class at the top level of a module.
    """
    if not isinstance(kind, type):
        raise UserError(f"give the class of the environment, not {kind!r}")
    if "." in kind.__qualname__:
        raise UserError(
            f"{kind.__qualname__} stands within another class or a function; move it out"
        )
    return f"{kind.__module__}:{kind.__qualname__}"


class InProcessClient:
    """What `EnvClient` is to a server, for a class: its tasks, and sessions that play them.

    Args:
      kind: the class.

    Raises:
      UserError: it lacks a part.
    """

    def __init__(self, kind: type):
        self._index = CustomIndex(name_of(kind))

    def splits(self) -> list[str]:
        """The names of the splits."""
        return self._index.splits()

    def tasks(self, split: str) -> list[Task]:
        """The tasks of a split."""
        return self._index.tasks(split)[0]

    def session(self) -> "InProcessSession":
        """A session with an instance of its own."""
        return InProcessSession(self._index)


class InProcessSession:
    """As `client.Session`."""

    def __init__(self, index: CustomIndex):
        self._index, self._engine = index, CustomEngine()

    def reset(
        self, task: str, split: str, seed: int = 0, expert: bool = False, prompt: str = ""
    ) -> Observation:
        """Starts a task."""
        place = self._index.place(split, task)
        return self._engine.reset(place, task=task, prompt=prompt, expert=expert, seed=seed)

    def step(self, text: str, *, parsed: bool = False) -> Observation:
        """Plays an action, or the one that is read out of what a policy wrote."""
        return self._engine.step(text if parsed else parse_action(text))

    def close(self) -> None:
        """Nothing to end."""
