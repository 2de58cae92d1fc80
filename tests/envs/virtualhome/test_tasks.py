import json
from pathlib import Path
from typing import Any

import pytest

from spa_jax.envs.protocol import Task
from spa_jax.envs.virtualhome.engine import VirtualhomeEngine
from spa_jax.envs.virtualhome.tasks import (
    Goal,
    HomeTask,
    TaskIndex,
    layout_hash,
    read_task,
    write_task,
)
from spa_jax.errors import UserError

_GOAL = Goal(((3, "lamp", ("CLEAN", "ON")),), ((1, "INSIDE", 2),), ((1, "ON", 3), (4, "ON", 3)))
_GRAPH: dict[str, list[Any]] = {
    "nodes": [
        {"id": 2, "class_name": "kitchen", "category": "Rooms", "properties": [], "states": []},
        {
            "id": 1,
            "class_name": "character",
            "category": "Characters",
            "properties": [],
            "states": [],
        },
        {
            "id": 3,
            "class_name": "lamp",
            "category": "Props",
            "properties": ["HAS_SWITCH", "SURFACES"],
            "states": ["OFF", "CLEAN"],
        },
    ],
    "edges": [(1, "INSIDE", 2), (3, "INSIDE", 2)],
}


def _write_authors(root: Path, suffix: str) -> Path:
    """The authors' layout: a file of a split, and its initial graphs."""
    stem = "TrimmedTestScene2_graph/results_x/file1_1"
    entries = [
        {
            "path": f"/somebody/elses/folder/executable_programs/{stem}.txt",
            "task": "Light",
            "description": "Light the room.",
            "object_id_dict": {"lamp": 3, "character": 1},
            "revised_graph": {
                "nodes": [{"id": 3, "class_name": "lamp", "states": ["ON", "CLEAN"]}],
                "revised_nodes": [],
                "revised_add_edges": [],
            },
        }
    ]
    entries.append(entries[0] | {"path": "elsewhere/file9_9.txt"})
    file = root / f"test.{suffix}"
    lines = "\n".join(json.dumps(entry) for entry in entries)
    file.write_text(lines if suffix == "jsonl" else json.dumps(entries))
    graph = root / "init_and_final_graphs" / f"{stem}.json"
    graph.parent.mkdir(parents=True)
    edges = [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in _GRAPH["edges"]]
    graph.write_text(json.dumps({"init_graph": {"nodes": _GRAPH["nodes"], "edges": edges}}))
    return file


def test_a_task_comes_back_as_it_was_written(tmp_path: Path) -> None:
    task = HomeTask(
        title="Light",
        description="Light it.",
        goal=_GOAL,
        objects={"lamp": 3},
        program=("switch on lamp",),
        scene="s",
        layout="h",
        seed=5,
    )
    write_task(tmp_path / "train" / "one", task, _GRAPH)
    assert read_task(tmp_path / "train" / "one") == (task, _GRAPH)
    index = TaskIndex(tmp_path)
    assert index.splits() == ["train"]
    assert index.tasks("train") == ([Task("one", "train", "Light", "h", 5)], [])
    again = tmp_path / "again"
    write_task(again, task, _GRAPH)
    for file in ("task.json", "graph.json.gz"):
        assert (again / file).read_bytes() == (tmp_path / "train" / "one" / file).read_bytes()


def test_the_goal_is_written_as_the_authors_write_it() -> None:
    assert _GOAL.to_json() == {
        "nodes": [{"id": 3, "class_name": "lamp", "states": ["CLEAN", "ON"]}],
        "revised_nodes": [{"from_id": 1, "relation_type": "INSIDE", "to_id": 2}],
        "revised_add_edges": [
            {"from_id": 1, "relation_type": "ON", "to_id": 3},
            {"from_id": 4, "relation_type": "ON", "to_id": 3},
        ],
    }
    assert Goal.from_json(_GOAL.to_json()) == _GOAL


def test_layouts_tell_graphs_and_goals_apart() -> None:
    layout = layout_hash(_GRAPH, _GOAL)
    assert layout == layout_hash(_GRAPH | {"edges": _GRAPH["edges"][::-1]}, _GOAL)
    assert layout != layout_hash(_GRAPH | {"edges": _GRAPH["edges"][:1]}, _GOAL)
    assert layout != layout_hash(_GRAPH, Goal((), (), ()))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_authors_files_are_played(tmp_path: Path, suffix: str) -> None:
    _write_authors(tmp_path, suffix)
    index = TaskIndex(tmp_path)
    assert index.splits() == ["test"]
    tasks, problems = index.tasks("test")
    assert [(t.task, t.task_type) for t in tasks] == [
        ("TrimmedTestScene2_graph-results_x-file1_1", "Light")
    ]
    assert len(problems) == 1 and "elsewhere-file9_9" in problems[0]
    engine = VirtualhomeEngine()
    place = index.place("test", tasks[0].task)
    assert engine.reset(place, task="t").text == "The task is Light(Light the room.)."
    assert not engine.step("switch on lamp").grounded
    assert engine.step("walk to lamp").text == "lamp is CLEAN and OFF. "
    assert engine.step("switch on lamp").success
    with pytest.raises(UserError, match="no program"):
        engine.reset(place, expert=True)
    with pytest.raises(UserError, match="no initial graph"):
        engine.reset(index.place("test", "elsewhere-file9_9"))


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        TaskIndex(tmp_path / "nowhere")
    index = TaskIndex(tmp_path)
    with pytest.raises(UserError, match="no split 'train'.*has: none"):
        index.tasks("train")
    task = HomeTask("Light", "Light it.", _GOAL, {"lamp": 3})
    write_task(tmp_path / "train" / "one", task, _GRAPH)
    with pytest.raises(UserError, match=r"no task '\.\./one'"):
        index.place("train", "../one")
    graph = tmp_path / "train" / "one" / "graph.json.gz"
    graph.write_bytes(graph.read_bytes()[:40])
    with pytest.raises(UserError, match=r"graph\.json\.gz cannot be read"):
        read_task(tmp_path / "train" / "one")
    (tmp_path / "train" / "one" / "task.json").write_text('{"title": "x"}')
    with pytest.raises(UserError, match=r"task\.json is no VirtualHome task"):
        index.tasks("train")
    (tmp_path / "test.json").write_text('{"path": 1}')
    with pytest.raises(UserError, match="is no list of the authors' tasks"):
        index.tasks("test")
