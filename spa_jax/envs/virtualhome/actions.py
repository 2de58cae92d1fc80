"""The 42 actions of SPA-RL's VirtualHome, as text, and which objects a command means.  Pure text.

walk to home office  ->  ("WALK", ("home_office",))
put mug on table     ->  ("PUTBACK", ("mug", "table"))
"""

import re
from collections.abc import Sequence

from spa_jax.envs.virtualhome.simulator import World

# The simulator's name of an action -> the command.
TEMPLATES = {
    "CLOSE": "close {}", "DRINK": "drink {}", "FIND": "find {}", "WALK": "walk to {}",
    "GRAB": "grab {}", "LOOKAT": "look at {}", "OPEN": "open {}", "POINTAT": "point at {}",
    "PUTBACK": "put {} on {}", "PUTIN": "put {} in {}", "PUTOBJBACK": "put back {}",
    "RUN": "run to {}", "SIT": "sit on {}", "STANDUP": "stand up", "SWITCHOFF": "switch off {}",
    "SWITCHON": "switch on {}", "TOUCH": "touch {}", "TURNTO": "turn to {}", "WATCH": "watch {}",
    "WIPE": "wipe {}", "PUTON": "put on {}", "PUTOFF": "take off {}", "GREET": "greet {}",
    "DROP": "drop {}", "READ": "read {}", "LIE": "lie on {}", "POUR": "pour {} into {}",
    "TYPE": "type on {}", "PUSH": "push {}", "PULL": "pull {}", "MOVE": "move {}",
    "WASH": "wash {}", "RINSE": "rinse {}", "SCRUB": "scrub {}", "SQUEEZE": "squeeze {}",
    "PLUGIN": "plug in {}", "PLUGOUT": "plug out {}", "CUT": "cut {}", "EAT": "eat {}",
    "SLEEP": "sleep", "WAKEUP": "wake up", "RELEASE": "release",
}  # fmt: skip

# "release" names no object and the action needs one, so as published it never succeeds;
# "release mug" does, as any word that is an action's name, with one or two objects after it.
_ARITY = {name: template.count("{}") for name, template in TEMPLATES.items()} | {"RELEASE": 1}
_PATTERNS = {
    name: re.compile(re.escape(template).replace(r"\{\}", "(.+?)"), re.DOTALL)
    for name, template in TEMPLATES.items()
    if name != "RELEASE"
}

Command = tuple[str, tuple[str, ...]]  # the action, and the class names of its objects


def parse(text: str) -> Command | None:
    """The action and the objects' class names that a command names; None if it is none.

    As published: a command must fit exactly one template ("put back x on y" fits two), what is
    before a colon is skipped, and a command that fits none is tried as ACTION, ACTION OBJECT or
    ACTION OBJECT OBJECT.
    """
    line = text[text.find(":") + 1 :].strip().lower()
    matches = ((name, pattern.fullmatch(line)) for name, pattern in _PATTERNS.items())
    found = [(name, match) for name, match in matches if match]
    if len(found) == 1:
        name, match = found[0]
        return name, tuple(group.replace(" ", "_") for group in match.groups())
    action, *names = line.split(" ")
    if len(names) > 2:
        names = ["_".join(names)]
    if len(names) == _ARITY.get(action.upper(), -1):
        return action.upper(), tuple(names)
    return None


def command(action: str, names: Sequence[str]) -> str:
    """The command of a program's step: the inverse of `parse`, but for RELEASE, which is "drop"."""
    template = TEMPLATES["DROP" if action == "RELEASE" else action]
    return template.format(*(name.replace("_", " ") for name in names))


class Objects:
    """Which node a class name means: the task's own, the one near at hand, any.

    Args:
      table: the task's objects, class name -> node id; it is copied.
    """

    def __init__(self, table: dict[str, int]) -> None:
        self._table = dict(table)
        self._last: int | None = None  # the node that the last command was about

    def resolve(self, world: World, names: Sequence[str]) -> list[int] | None:
        """The node of each name, or None if there is none; what was meant once stays meant.

        The first of two objects is one that the character holds.
        """
        if not names:
            return []
        ids: list[int] = []
        for name in names:
            if len(names) == 2 and not ids:
                node_id = _first(world, name, _held(world))
            else:
                node_id = self._table.get(name) or self._choose(world, name)
            if node_id is None or world.node(node_id) is None:
                return None
            ids.append(node_id)
        self._table.update(zip(names, ids, strict=True))
        if len(set(ids)) < len(ids):
            return None
        self._last = ids[-1]
        return ids

    def _choose(self, world: World, name: str) -> int | None:
        """What is near the last object, then near the character, then the lowest id."""
        near: list[int] = []
        if self._last is not None:
            near += _related(world, self._last, ("CLOSE", "INSIDE"))
        near += _related(world, world.character, ("CLOSE",))
        return _first(world, name, near) or _first(
            world, name, sorted(node.id for node in world.nodes())
        )


def _held(world: World) -> list[int]:
    return [
        node_id
        for relation in ("HOLDS_RH", "HOLDS_LH")
        for node_id in world.targets(world.character, relation)
    ]


def _first(world: World, name: str, ids: Sequence[int]) -> int | None:
    """The first of `ids` that is of the class `name`."""
    return next((i for i in ids if world.node(i).class_name == name), None)


def _related(world: World, node_id: int, relations: Sequence[str]) -> list[int]:
    """The nodes that are related to a node, in either direction, sorted."""
    related = {target for r in relations for target in world.targets(node_id, r)}
    related |= {
        node.id for node in world.nodes() for r in relations if node_id in world.targets(node.id, r)
    }
    return sorted(related)
