"""VirtualHome's tasks on disk: which there are, and what is in them.  No simulator here.

Two layouts are read.  Ours, which `experiments.prepare_virtualhome` and the generator write:

    DIR/<split>/<task>/task.json       title, description, goal, objects, program, scene, ...
                       graph.json.gz   the initial graph: nodes and edges [from, relation, to]

and the authors' own, a file a split and a folder of initial graphs beside it:

    DIR/<split>.json (or .jsonl)       [{"path", "task", "description", "revised_graph",
                                         "object_id_dict"}, ...]
    DIR/init_and_final_graphs/...      {"init_graph": ...}: the end of "path", as .json

The authors' tasks come without programs, so there is no expert for them.
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from spa_jax.envs.contract import Index
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError

TASK_FILE, GRAPH_FILE = "task.json", "graph.json.gz"
GRAPHS = "init_and_final_graphs"

Edge = tuple[int, str, int]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What must hold at the same time, checked after every step.

    Attributes:
      states: (node id, class name, its states); the states are exactly these.
      absent: edges that must not hold.
      present: edges that must hold.
    """

    states: tuple[tuple[int, str, tuple[str, ...]], ...]
    absent: tuple[Edge, ...]
    present: tuple[Edge, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Goal":
        """Reads the authors' form, `revised_graph` (whose "revised_nodes" are edges)."""

        def edges(name: str) -> tuple[Edge, ...]:
            return tuple(sorted((e["from_id"], e["relation_type"], e["to_id"]) for e in data[name]))

        states = ((n["id"], n["class_name"], tuple(sorted(n["states"]))) for n in data["nodes"])
        return cls(tuple(sorted(states)), edges("revised_nodes"), edges("revised_add_edges"))

    def to_json(self) -> dict[str, Any]:
        """The authors' form."""

        def edges(those: tuple[Edge, ...]) -> list[dict[str, Any]]:
            return [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in those]

        nodes = [{"id": i, "class_name": name, "states": list(s)} for i, name, s in self.states]
        return {
            "nodes": nodes,
            "revised_nodes": edges(self.absent),
            "revised_add_edges": edges(self.present),
        }


@dataclasses.dataclass(frozen=True)
class HomeTask:
    """One task.

    Attributes:
      title: the activity, such as "Watch TV".
      description: what its author wrote.
      goal: see `Goal`.
      objects: class name -> id of the node that the task means by it.
      program: commands that solve it; empty if none is known.
      scene: the home's name.
      layout: a hash of the initial graph and the goal.
      seed: the seed that it was made with; None for the authors' tasks.
    """

    title: str
    description: str
    goal: Goal
    objects: dict[str, int]
    program: tuple[str, ...] = ()
    scene: str = ""
    layout: str = ""
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What task.json holds."""
        data = dataclasses.asdict(self)
        return data | {"goal": self.goal.to_json(), "program": list(self.program)}


def layout_hash(graph: Mapping[str, Any], goal: Goal) -> str:
    """A hash that is equal for tasks in the same room in the same state with the same goal."""
    nodes = sorted((n["id"], n["class_name"], sorted(n["states"])) for n in graph["nodes"])
    edges = sorted(tuple(edge) for edge in graph["edges"])
    text = json.dumps([nodes, edges, goal.to_json()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_task(folder: Path, task: HomeTask, graph: Mapping[str, Any]) -> None:
    """Writes a task's two files, the same bytes for the same task."""
    folder.mkdir(parents=True)
    (folder / TASK_FILE).write_text(json.dumps(task.to_json(), indent=1) + "\n")
    packed = gzip.compress(json.dumps(graph, separators=(",", ":")).encode(), mtime=0)
    (folder / GRAPH_FILE).write_bytes(packed)


def _read(path: Path) -> Any:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in data.splitlines() if line.strip()]
        return json.loads(data)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); fetch or make the tasks again"
        ) from error


def _task(data: Mapping[str, Any], source: object) -> HomeTask:
    """A task from our JSON, or from an entry of the authors'."""
    try:
        if "revised_graph" not in data:
            goal = Goal.from_json(data["goal"])
            return HomeTask(**(dict(data) | {"goal": goal, "program": tuple(data["program"])}))
        return HomeTask(
            title=data["task"],
            description=data["description"],
            goal=Goal.from_json(data["revised_graph"]),
            objects=dict(data["object_id_dict"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source} is no VirtualHome task ({type(error).__name__}: {error}); see the layouts "
            "in spa_jax/envs/virtualhome/tasks.py"
        ) from error


def read_task(place: Path) -> tuple[HomeTask, dict[str, Any]]:
    """A task and its initial graph, {"nodes": [...], "edges": [(from, relation, to), ...]}.

    Args:
      place: what `TaskIndex.place` gave: a task's folder, or DIR/<split>.json/<task>.

    Raises:
      UserError: naming the file, if one is missing or is no task.
    """
    if place.parent.is_file():
        return _read_authors(place)
    task = _task(_read(place / TASK_FILE), place / TASK_FILE)
    graph = _read(place / GRAPH_FILE)
    return task, {"nodes": graph["nodes"], "edges": [tuple(edge) for edge in graph["edges"]]}


def _read_authors(place: Path) -> tuple[HomeTask, dict[str, Any]]:
    root = place.parent.parent
    entry = _entries(place.parent)[place.name]
    task = _task(entry, f"{place.parent}, task {place.name}")
    file = _graph_file(root, entry["path"])
    if file is None:
        raise UserError(
            f"{root / GRAPHS} has no initial graph of {entry['path']!r} ({place.parent}); it "
            "comes with the authors' task files"
        )
    data = _read(file)["init_graph"]
    edges = [(e["from_id"], e["relation_type"], e["to_id"]) for e in data["edges"]]
    graph = {"nodes": data["nodes"], "edges": edges}
    return dataclasses.replace(task, layout=layout_hash(graph, task.goal)), graph


def _graph_file(root: Path, path: str) -> Path | None:
    """The initial graph that the longest end of a task's `path` names."""
    parts = PurePosixPath(path).with_suffix(".json").parts
    ends = (root.joinpath(GRAPHS, *parts[i:]) for i in range(len(parts)) if parts[i] != "/")
    return next((file for file in ends if file.is_file()), None)


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    """The authors' tasks of a split by name."""
    return _entries_of(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _entries_of(file: Path, _: int) -> dict[str, dict[str, Any]]:
    entries = _read(file)
    if not isinstance(entries, list) or not all("path" in entry for entry in entries):
        raise UserError(f'{file} is no list of the authors\' tasks, which have a "path"')
    named: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = "-".join(PurePosixPath(entry["path"]).with_suffix("").parts[-3:]).lstrip("/-")
        if name in named:
            raise UserError(f"{file} has two tasks with the path {entry['path']!r}")
        named[name] = entry
    return named


class TaskIndex(Index[Path]):
    """The tasks of a data folder, by split and name.

    Args:
      data_dir: a folder in one of the two layouts.

    Raises:
      UserError: if there is no such folder.
    """

    def __init__(self, data_dir: str | os.PathLike[str]) -> None:
        self.root = Path(data_dir)
        if not self.root.is_dir():
            raise UserError(f"the VirtualHome data {self.root} is no folder; make or fetch it")

    def splits(self) -> list[str]:
        """The names of the splits."""
        folders = {path.parent.parent.name for path in self.root.glob(f"*/*/{TASK_FILE}")}
        files = {
            path.stem for suffix in ("json", "jsonl") for path in self.root.glob(f"*.{suffix}")
        }
        return sorted(folders | files)

    def _split(self, split: str) -> tuple[Path, Collection[str]]:
        """Where a split is, and the names of its tasks."""
        if split in self.splits():
            for file in (self.root / f"{split}.json", self.root / f"{split}.jsonl"):
                if file.is_file():
                    return file, sorted(_entries(file))
            names = sorted(path.parent.name for path in self.root.glob(f"{split}/*/{TASK_FILE}"))
            return self.root / split, names
        raise UserError(
            f"{self.root} has no split {split!r}; it has: {', '.join(self.splits()) or 'none'}"
        )

    def place(self, split: str, task: str) -> Path:
        """The place of a task, for `read_task`: a folder, or a name below the authors' file.

        Raises:
          UserError: if there is no such split or task.
        """
        place, names = self._split(split)
        if task not in names:
            raise UserError(f"no task {task!r} in split {split!r} of {self.root}")
        return place / task

    def tasks(self, split: str) -> tuple[list[Task], list[str]]:
        """The tasks of a split sorted by name, and why others are left out.

        Raises:
          UserError: if the split does not exist or is empty, or a task's file is broken.
        """
        place, names = self._split(split)
        tasks, problems = [], []
        for name in names:
            if place.is_dir():
                task = _task(_read(place / name / TASK_FILE), place / name / TASK_FILE)
            elif _graph_file(self.root, _entries(place)[name]["path"]):
                task = read_task(place / name)[0]
            else:
                problems.append(f"{place}: task {name} has no initial graph in {GRAPHS}")
                continue
            tasks.append(Task(name, split, task.title, task.layout, task.seed))
        if not tasks:
            raise UserError(f"{place} holds no task that can be played; {''.join(problems[:1])}")
        return tasks, problems
