"""Tasks and a small corpus of our own that VirtualHome's tests share."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from spa_jax.envs.virtualhome.generate import generate
from spa_jax.envs.virtualhome.scenes import ROOMS, THINGS, draw_home

# source/name -> title, description, steps, preconditions
PROGRAMS: dict[str, tuple[str, str, list[str], list[dict[str, Any]]]] = {
    "ours/file1_1": (
        "Watch TV",
        "Switch on the set and watch.",
        [
            "[Walk] <living_room> (1)",
            "[Walk] <tv> (1)",
            "[SwitchOn] <television> (1)",
            "[TurnTo] <television> (1)",
            "[Watch] <television> (1)",
        ],
        [
            {"plugged": ["tv", "1"]},
            {"is_off": ["television", "1"]},
            {"location": [["television", "1"], ["living_room", "1"]]},
        ],
    ),
    # Two of a class, in a closed box together with others.
    "ours/file2_1": (
        "Clear the dishes",
        "Take the plates and the cup out of the cupboard.",
        [
            "[Walk] <kitchen> (1)",
            "[Walk] <cupboard> (1)",
            "[Open] <cupboard> (1)",
            "[Find] <plate> (1)",
            "[Grab] <plate> (1)",
            "[Find] <cup> (1)",
            "[Grab] <cup> (1)",
            "[Close] <cupboard> (1)",
            "[Walk] <kitchen_table> (1)",
            "[PutBack] <plate> (1) <kitchen_table> (1)",
            "[Find] <plate> (2)",
        ],
        [{"closed": ["cupboard", "1"]}]
        + [
            {"inside": [[name, number], ["cupboard", "1"]]}
            for name, number in (("plate", "1"), ("plate", "2"), ("cup", "1"))
        ]
        + [
            {"atreach": [[name, number], ["cupboard", "1"]]}
            for name, number in (("plate", "2"), ("cup", "1"))
        ]
        + [{"location": [[name, "1"], ["kitchen", "1"]]} for name in ("cup", "cupboard")]
        + [{"location": [["plate", number], ["kitchen", "1"]]} for number in ("1", "2")],
    ),
    "more/file2_1": (
        "Rest",
        "Lie down.",
        ["[Walk] <bedroom> (1)", "[Walk] <bed> (1)", "[Lie] <bed> (1)"],
        [{"free": ["bed", "1"]}, {"location": [["bed", "1"], ["bedroom", "1"]]}],
    ),
    "more/file3_1": ("Visit", "Go there.", ["[Walk] <bathroom> (1)"], []),
    "more/file4_1": ("Dance", "Dance.", ["[Walk] <bathroom> (1)", "[Dance]"], []),
    "more/file5_1": (
        "Read",
        "Read without a book in hand.",
        ["[Walk] <bedroom> (1)", "[Read] <novel> (1)"],
        [],
    ),
}


def write_corpus(root: Path) -> Path:
    """Writes programs, two scenes and resources as VirtualHome distributes them."""
    for key, (title, description, steps, conditions) in PROGRAMS.items():
        program = root / "programs" / "withoutconds" / f"{key}.txt"
        initial = root / "programs" / "initstate" / f"{key}.json"
        program.parent.mkdir(parents=True, exist_ok=True)
        initial.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("\n".join([title, description, "", "", *steps]))
        initial.write_text(json.dumps(conditions))
    for number in (1, 2):
        home = draw_home(random.Random(number), rooms=5, things=10)
        edges = [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in home.edges]
        scene = root / "scenes" / f"TrimmedTestScene{number}_graph.json"
        scene.parent.mkdir(exist_ok=True)
        scene.write_text(json.dumps({"nodes": home.nodes, "edges": edges}))
    properties = {name: list(p) for those in ROOMS.values() for name, p in those.items()}
    properties |= {name: list(p) for name, p in THINGS.items()} | {"cup": ["GRABBABLE"]}
    resources = {
        "properties_data": properties,
        "object_states": {},
        "object_script_placing": {},
        "class_name_equivalence": {"television": ["tv"]},
    }
    (root / "resources").mkdir()
    for name, data in resources.items():
        (root / "resources" / f"{name}.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of six programs and two scenes."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a split "train" of 12 tasks, two of each kind."""
    root = tmp_path_factory.mktemp("virtualhome")
    generate(root / "train", tasks=12, seed=3)
    return root
