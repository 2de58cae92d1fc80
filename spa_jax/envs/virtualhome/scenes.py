"""Small homes of our own, drawn from a seed: rooms, furniture, and things on or in it.

Every class comes once a home, so a command's names are never ambiguous.  Properties and the
shape of the graph are those that the evolving-graph simulator works with; no scene of
VirtualHome's is used.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from spa_jax.envs.virtualhome.simulator import CHARACTER, Edge

_OPEN = ("CAN_OPEN", "CONTAINERS")
_DEVICE = ("HAS_SWITCH", "HAS_PLUG")

# Room -> its furniture -> the furniture's properties.
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "kitchen": {
        "kitchen_table": ("SURFACES",), "kitchen_counter": ("SURFACES",), "fridge": _OPEN,
        "cupboard": _OPEN, "microwave": (*_OPEN, *_DEVICE), "dishwasher": (*_OPEN, *_DEVICE),
        "coffee_maker": _DEVICE, "bench": ("SITTABLE", "MOVABLE"),
    },
    "living_room": {
        "coffee_table": ("SURFACES",), "bookshelf": ("SURFACES",), "cabinet": _OPEN,
        "couch": ("SITTABLE", "LIEABLE", "SURFACES"), "television": (*_DEVICE, "LOOKABLE"),
        "stereo": _DEVICE, "floor_lamp": _DEVICE,
    },
    "bedroom": {
        "nightstand": ("SURFACES",), "dresser": _OPEN, "closet": _OPEN,
        "bed": ("SITTABLE", "LIEABLE", "SURFACES"), "table_lamp": _DEVICE, "radio": _DEVICE,
    },
    "bathroom": {
        "bathroom_counter": ("SURFACES",), "shelf": ("SURFACES",), "bathroom_cabinet": _OPEN,
        "washing_machine": (*_OPEN, *_DEVICE), "hair_dryer": _DEVICE,
        "toilet": ("SITTABLE",),
    },
    "home_office": {
        "desk": ("SURFACES",), "filing_cabinet": _OPEN, "chair": ("SITTABLE", "MOVABLE"),
        "computer": (*_DEVICE, "LOOKABLE"), "printer": _DEVICE,
    },
}  # fmt: skip

THINGS: dict[str, tuple[str, ...]] = {
    name: ("GRABBABLE", "MOVABLE", *more)
    for name, more in {
        "mug": ("RECIPIENT",), "plate": ("SURFACES",), "apple": ("EATABLE", "CUTTABLE"),
        "bread": ("EATABLE", "CUTTABLE"), "milk": ("DRINKABLE", "POURABLE"), "spoon": (),
        "newspaper": ("READABLE",), "novel": ("READABLE",), "magazine": ("READABLE",),
        "remote_control": (), "cell_phone": ("HAS_SWITCH",), "pillow": (), "blanket": (),
        "soap": (), "towel": (), "toothbrush": (), "shirt": ("CLOTHES",), "jacket": ("CLOTHES",),
        "keys": (), "candle": (), "notebook": ("READABLE",), "scissors": (),
    }.items()
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Home:
    """A home in its initial state.

    Attributes:
      nodes: the graph's nodes.
      edges: its edges, (from, relation, to).
      ids: class name -> node id.
      room: furniture and things -> the room that they are in; the character too.
      place: things -> the furniture that they are on or in.
    """

    nodes: tuple[dict[str, Any], ...]
    edges: tuple[Edge, ...]
    ids: dict[str, int]
    room: dict[str, str]
    place: dict[str, str]

    def having(self, *properties: str) -> list[str]:
        """The classes of furniture that have all these properties, in order of their ids."""
        return [
            node["class_name"]
            for node in self.nodes
            if node["category"] == "Furniture" and set(properties) <= set(node["properties"])
        ]

    def has(self, name: str, quality: str) -> bool:
        """Whether a class has a property or is in a state."""
        node = next(node for node in self.nodes if node["class_name"] == name)
        return quality in node["properties"] or quality in node["states"]


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.edges: list[Edge] = []
        self.ids: dict[str, int] = {}
        self.room: dict[str, str] = {}
        self.place: dict[str, str] = {}

    def add(
        self, name: str, category: str, properties: Sequence[str], states: Sequence[str]
    ) -> None:
        node_id = len(self.nodes) + 1
        self.ids[name] = node_id
        self.nodes.append(
            {
                "id": node_id,
                "class_name": name,
                "category": category,
                "properties": list(properties),
                "states": list(states),
            }
        )

    def put(self, name: str, room: str) -> None:
        self.room[name] = room
        self.edges.append((self.ids[name], "INSIDE", self.ids[room]))

    def put_at(self, thing: str, furniture: str) -> None:
        """Puts a thing in what can be opened, else on it."""
        start, end = self.ids[thing], self.ids[furniture]
        self.place[thing] = furniture
        if "CAN_OPEN" in self.nodes[end - 1]["properties"]:
            # Not in the room as well: whether it is seen depends on this place alone.
            self.room[thing] = self.room[furniture]
            self.edges.append((start, "INSIDE", end))
        else:
            self.put(thing, self.room[furniture])
            self.edges += [(start, "ON", end), (start, "CLOSE", end), (end, "CLOSE", start)]


def _states(rng: random.Random, properties: Sequence[str]) -> list[str]:
    states = ["CLEAN"]
    if "CAN_OPEN" in properties:
        states.append("CLOSED")
    if "HAS_SWITCH" in properties:
        states.append("OFF")
    if "HAS_PLUG" in properties:
        states.append(rng.choice(("PLUGGED_IN", "PLUGGED_IN", "PLUGGED_OUT")))
    return states


def draw_home(rng: random.Random, rooms: int, things: int) -> Home:
    """Draws a home.

    Args:
      rng: where it is drawn from.
      rooms: how many rooms, at most five.
      things: how many things lie about.
    """
    home = _Builder()
    for room in rng.sample(list(ROOMS), rooms):
        home.add(room, "Rooms", (), ("CLEAN",))
        for furniture, properties in ROOMS[room].items():
            home.add(furniture, "Furniture", properties, _states(rng, properties))
            home.put(furniture, room)
    places = [
        node["class_name"]
        for node in home.nodes
        if {"SURFACES", "CAN_OPEN"} & set(node["properties"]) and node["category"] == "Furniture"
    ]
    for thing in rng.sample(list(THINGS), things):
        states = ["CLEAN", *(["OFF"] if "HAS_SWITCH" in THINGS[thing] else [])]
        home.add(thing, "Props", THINGS[thing], states)
        home.put_at(thing, rng.choice(places))
    home.add(CHARACTER, "Characters", (), ())
    home.put(CHARACTER, rng.choice([room for room in ROOMS if room in home.ids]))
    return Home(tuple(home.nodes), tuple(home.edges), home.ids, home.room, home.place)
