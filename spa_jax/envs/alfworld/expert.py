"""An expert that has to search: it knows only what it was shown.

A game's stored walkthrough goes straight to objects nobody has seen yet, and imitating
it teaches guessing.  This expert reads the same observations as the policy.  It looks
for the object, visiting each receptacle once and opening closed ones; when it needs
something that it has already seen it goes straight there.

In small rooms it visits receptacles in the order in which the first observation lists
them, which is easy to imitate.  Large rooms (up to 63 receptacles) would not fit into 50
steps like that, so there it starts where people leave things: open surfaces before
drawers and cabinets.
"""

import dataclasses
import re
from collections.abc import Collection

from spa_jax.errors import UserError

SMALL_ROOM = 8  # receptacles; the generator's default maximum

# Where to look first in a large room: by how often a receptacle of that type held a given
# object in ALFWorld's 3,553 train games, divided by the steps that a look inside takes.
_SEARCH_ORDER = (
    "bed diningtable desk coffeetable dresser sidetable countertop sofa tvstand bathtubbasin "
    "handtowelholder towelholder toilet cart ottoman armchair sinkbasin stoveburner "
    "coffeemachine fridge garbagecan microwave toiletpaperhanger shelf safe cabinet drawer"
).split()

_TEMPLATES = (
    (r"(?:put|find) two (?P<object>\w+) (?:and put them )?in (?P<target>\w+)", "", 2),
    (r"put a clean (?P<object>\w+) in (?P<target>\w+)", "clean", 1),
    (r"clean some (?P<object>\w+) and put it in (?P<target>\w+)", "clean", 1),
    (r"put a hot (?P<object>\w+) in (?P<target>\w+)", "heat", 1),
    (r"heat some (?P<object>\w+) and put it in (?P<target>\w+)", "heat", 1),
    (r"put a cool (?P<object>\w+) in (?P<target>\w+)", "cool", 1),
    (r"cool some (?P<object>\w+) and put it in (?P<target>\w+)", "cool", 1),
    (r"put a (?P<object>\w+) in (?P<target>\w+)", "", 1),
    (r"put some (?P<object>\w+) on (?P<target>\w+)", "", 1),
    (r"look at (?P<object>\w+) under the (?P<target>\w+)", "use", 1),
    (r"examine the (?P<object>\w+) with the (?P<target>\w+)", "use", 1),
)
_APPLIANCES = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}

_ENTITY = re.compile(r"\ba (\w+ \d+)")
_CONTENT = re.compile(r"(?:On the (\w+ \d+)|The (\w+ \d+) is open\. In it), you see ([^.]*)\.")
_CLOSED = re.compile(r"The (\w+ \d+) is closed\.|You close the (\w+ \d+)\.")


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a task sentence asks for.

    Attributes:
      object: the type of the object, such as "mug".
      target: the type of the receptacle that it goes to, or of the lamp.
      process: "clean", "heat", "cool" before it is put down, "use" the lamp, or "".
      count: how many of them.
    """

    object: str
    target: str
    process: str
    count: int


def read_goal(text: str) -> Goal:
    """Reads the goal out of a text that holds "Your task is to: ...".

    Raises:
      UserError: if the sentence is none of ALFWorld's templates.
    """
    sentence = text.partition("Your task is to: ")[2].strip().rstrip(".")
    for pattern, process, count in _TEMPLATES:
        if match := re.fullmatch(pattern, sentence):
            return Goal(match["object"], match["target"], process, count)
    raise UserError(f"the expert cannot read the task {sentence!r}: it is none of the templates")


def _type(entity: str) -> str:
    return entity.partition(" ")[0]


class Expert:
    """Plays one game: `act` says the next command, `observe` takes what came of one.

    Args:
      first_observation: lists the receptacles and states the task.
    """

    def __init__(self, first_observation: str):
        self.goal = read_goal(first_observation)
        self.receptacles: list[str] = _ENTITY.findall(first_observation.partition("Your task")[0])
        self._order = self.receptacles
        if len(self.receptacles) > SMALL_ROOM:
            rank = {name: i for i, name in enumerate(_SEARCH_ORDER)}
            self._order = sorted(
                self.receptacles, key=lambda name: rank.get(_type(name), len(rank))
            )
        self._contents: dict[str, list[str]] = {}  # what was seen where
        self._closed: set[str] = set()
        self._at = ""
        self._holding = ""
        self._taken_from = ""
        self._done: set[str] = set()  # objects cleaned, heated or cooled; lamps used

    def observe(self, command: str, text: str) -> None:
        """Learns from an executed command and the observation that it gave."""
        words = command.split()
        if command.startswith("go to "):
            self._at = command.removeprefix("go to ")
        elif command.removeprefix("examine ") in self.receptacles:
            self._at = command.removeprefix("examine ")
        elif words[0] == "take":
            self._holding, self._taken_from = " ".join(words[1:3]), " ".join(words[4:6])
            for contents in self._contents.values():
                if self._holding in contents:
                    contents.remove(self._holding)
        elif words[0] == "put":
            self._contents.setdefault(" ".join(words[4:6]), []).append(self._holding)
            self._holding = ""
        elif words[0] in ("clean", "heat", "cool", "use"):
            self._done.add(" ".join(words[1:3]))
        for surface, container, seen in _CONTENT.findall(text):
            self._contents[surface or container] = _ENTITY.findall(seen)
            self._closed.discard(surface or container)
        for arrived, closed in _CLOSED.findall(text):
            self._closed.add(arrived or closed)

    def act(self, executable: Collection[str]) -> str:
        """The next command.

        Args:
          executable: the commands that can be executed now.  They are asked one thing:
            whether a receptacle stands where the expert is already (several can share a
            place, and the engine refuses to go where one is).
        """
        command = self._plan()
        if command.startswith("go to ") and command not in executable:
            return command.replace("go to ", "examine ", 1)
        return command

    def _plan(self) -> str:
        if self._holding and _type(self._holding) != self.goal.object:
            return self._at_place(self._taken_from, f"put {self._holding} in/on {{}}")
        if not self._holding:
            return self._fetch()
        if self.goal.process == "use":
            return self._light()
        if self.goal.process and self._holding not in self._done:
            appliance = self._first(_APPLIANCES[self.goal.process])
            command = f"{self.goal.process} {self._holding} with {{}}"
            return command.format(appliance) if self._at == appliance else f"go to {appliance}"
        return self._at_place(self._destination(), f"put {self._holding} in/on {{}}")

    def _fetch(self) -> str:
        """Takes the nearest known object that is wanted, or searches for one."""
        destination = "" if self.goal.process == "use" else self._destination()
        places = [self._at, *self._order] if self._at else self._order
        for place in places:
            if place == destination and not self.goal.process:
                continue  # what lies there is where it belongs
            for name in self._contents.get(place, []):
                if _type(name) == self.goal.object and not self._is_finished(name, place):
                    return self._at_place(place, f"take {name} from {{}}")
        return self._search()

    def _is_finished(self, name: str, place: str) -> bool:
        return name in self._done and _type(place) == self.goal.target

    def _light(self) -> str:
        """Uses the lamp, once the object is in hand."""
        for place, contents in self._contents.items():
            for name in contents:
                if _type(name) == self.goal.target:
                    return f"use {name}" if self._at == place else f"go to {place}"
        return self._search()

    def _search(self) -> str:
        """Looks into the next receptacle that has not been looked into."""
        if self._at in self._closed and self._at not in self._contents:
            return f"open {self._at}"
        for place in self._order:
            if place not in self._contents:
                return f"go to {place}"
        return "look"

    def _at_place(self, place: str, command: str) -> str:
        """`command` at `place`, or what leads there."""
        if self._at != place:
            return f"go to {place}"
        return f"open {place}" if place in self._closed else command.format(place)

    def _first(self, kind: str) -> str:
        return next((name for name in self.receptacles if _type(name) == kind), "")

    def _destination(self) -> str:
        """The target receptacle: the one that already holds most of what is wanted."""

        def wanted(place: str) -> int:
            return sum(_type(name) == self.goal.object for name in self._contents.get(place, []))

        targets = [name for name in self.receptacles if _type(name) == self.goal.target]
        return max(targets, key=wanted, default="")
