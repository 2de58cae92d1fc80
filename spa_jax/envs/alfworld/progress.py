"""How much of an ALFWorld task is done: the subgoals of its PDDL goal.  No policy is told.

The goal names a type of object, how many of them, and the type of the receptacle that they go to,
or of the lamp that they are looked at under.  The subgoals of one object:

    found       its name stood in an observation; that stays
    taken       it is held, or placed
    processed   it is clean, hot or cool, where the goal wants that
    placed      it is in a receptacle of that type, and processed where the goal wants that

A placed object counts as found and taken.  Under a lamp the subgoals are found, taken (held), and
the lamp used: switched on, and the agent at it.  All but "found" are read off the present state,
so what is done can be undone.

Of several objects the one counts that is furthest.  Two objects have to meet in one receptacle, so
those two count, and that receptacle, that are furthest together.
"""

import dataclasses
import re
from collections.abc import Mapping

from textworld.envs.pddl.logic import PddlState
from textworld.logic import Signature

_ATOM = re.compile(r"\(([^()]*)\)")
_HEAD = re.compile(r"\(\s*([^\s()?]+)")
_NAME = re.compile(r"\w+ \d+")  # of a thing, as observations show it

_PROCESSED = ("isclean", "ishot", "iscool")
_ABLE = ("cleanable", "heatable", "coolable", "toggleable")
# What may stand in a goal, as the planner writes it.
_KNOWN = {
    *(":goal", "and", "exists", "not", "=", "objecttype", "receptacletype", "inreceptacle"),
    *("istoggled", "receptacleatlocation", "atlocation", "holds", *_PROCESSED, *_ABLE),
}
_TYPES: dict[str, tuple[str, ...]] = {
    "objecttype": ("object", "otype"),
    "receptacletype": ("receptacle", "rtype"),
    "inreceptacle": ("object", "receptacle"),
    "receptacleatlocation": ("receptacle", "location"),
    "atlocation": ("agent", "location"),
    "holds": ("agent", "object"),
    **{name: ("object",) for name in ("istoggled", *_PROCESSED, *_ABLE)},
}
_SIGNATURES = {name: Signature(name, types) for name, types in _TYPES.items()}


@dataclasses.dataclass(frozen=True)
class Subgoals:
    """What a goal asks for, in the planner's words: "mugtype", "isclean".

    Attributes:
      object: the type of the object.
      count: how many of them, in one receptacle.
      able: what an object must be to count, such as "cleanable"; empty: nothing more.
      process: what has to be done to it, such as "isclean"; empty: nothing.
      receptacle: the type of where it goes; empty if it is looked at.
      lamp: the type of the lamp that it is looked at under; empty if it is placed.
    """

    object: str
    count: int = 1
    able: str = ""
    process: str = ""
    receptacle: str = ""
    lamp: str = ""

    @property
    def number(self) -> int:
        """How many subgoals there are."""
        return 3 if self.lamp else self.count * (3 + bool(self.process))


def read_subgoals(problem: str) -> Subgoals | None:
    """The subgoals of a PDDL problem's `(:goal ...)`; None if it is none of ALFWorld's kinds."""
    goal = problem[problem.find("(:goal") :].lower()
    heads = _HEAD.findall(goal)
    if not set(heads) <= _KNOWN or heads.count("not") != heads.count("="):
        return None
    atoms = [atom.split() for atom in _ATOM.findall(goal)]
    types = {atom[1]: atom[2] for atom in atoms if atom and atom[0] == "objecttype"}
    receptacles = {atom[2] for atom in atoms if atom and atom[0] == "receptacletype"}
    unary = {atom[0]: atom[1] for atom in atoms if len(atom) == 2}
    lamp = types.pop(unary.get("istoggled", ""), "")
    if len(set(types.values())) != 1 or len(types) > 2 or len(receptacles) != (not lamp):
        return None
    process = [name for name in unary if name in _PROCESSED]
    able = [name for name in unary if name in _ABLE and unary[name] in types]
    if len(process) > 1 or len(able) > 1:
        return None
    return Subgoals(
        object=next(iter(types.values())),
        count=len(types),
        able="".join(able),
        process="".join(process),
        receptacle="".join(receptacles),
        lamp=lamp,
    )


class Progress:
    """The subgoals of one game that is played: `see` what is shown, then ask for the `share`.

    Args:
      subgoals: of the game's goal.
      state: the game's state, which the engine changes in place.
      names: the planner's name of a thing -> the name that observations show.
    """

    def __init__(self, subgoals: Subgoals, state: PddlState, names: Mapping[str, str]):
        self._subgoals, self._state = subgoals, state

        def of_type(predicate: str, kind: str) -> list[str]:
            return sorted(thing for thing, its in self._pairs(predicate) if its == kind)

        able = self._things(subgoals.able)
        wanted = of_type("objecttype", subgoals.object)
        self._wanted = [thing for thing in wanted if not subgoals.able or thing in able]
        self._targets = of_type("receptacletype", subgoals.receptacle)
        self._lamps = set(of_type("objecttype", subgoals.lamp))
        self._location = dict(self._pairs("receptacleatlocation"))  # receptacles do not move
        self._shown_as = {names[thing]: thing for thing in self._wanted}
        self._found: set[str] = set()

    def _pairs(self, predicate: str) -> list[tuple[str, str]]:
        """The arguments of all facts with a predicate of two."""
        facts = self._state.facts_with_signature(_SIGNATURES[predicate])
        return [(a.name, b.name) for a, b in [fact.arguments for fact in facts]]

    def _things(self, predicate: str) -> set[str]:
        """What a predicate of one holds for; nothing without a predicate."""
        if not predicate:
            return set()
        facts = self._state.facts_with_signature(_SIGNATURES[predicate])
        return {fact.arguments[0].name for fact in facts}

    def see(self, text: str) -> None:
        """Notes which of the wanted objects an observation names."""
        self._found.update(self._shown_as[n] for n in _NAME.findall(text) if n in self._shown_as)

    def share(self) -> float:
        """Reached subgoals / all, in [0, 1]; 1 exactly when the goal holds."""
        held = {thing for _, thing in self._pairs("holds")}
        if self._subgoals.lamp:
            known = max((2 if o in held else o in self._found for o in self._wanted), default=0)
            return (known + self._lamp_used()) / self._subgoals.number
        return self._placing(held) / self._subgoals.number

    def _lamp_used(self) -> bool:
        lit = self._lamps & self._things("istoggled")
        if not lit:
            return False
        here = {location for _, location in self._pairs("atlocation")}
        places = [place for thing, place in self._pairs("inreceptacle") if thing in lit]
        return any(self._location.get(place) in here for place in places)

    def _placing(self, held: set[str]) -> int:
        """Subgoals that are reached in the receptacle where most are."""
        process, inside = self._subgoals.process, set(self._pairs("inreceptacle"))
        processed = self._things(process)

        def reached(thing: str, target: str) -> int:
            done = thing in processed
            if (thing, target) in inside and (done or not process):
                return 3 + done
            return (2 if thing in held else thing in self._found) + done

        def best(target: str) -> int:
            each = sorted((reached(thing, target) for thing in self._wanted), reverse=True)
            return sum(each[: self._subgoals.count])

        return max(map(best, self._targets), default=0)
