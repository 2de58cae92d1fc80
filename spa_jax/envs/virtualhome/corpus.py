"""Tasks from the ActivityPrograms corpus: program + preconditions + scene -> task.

The simulator's own preparation puts what a program needs into a scene and sets the states and
relations that its preconditions demand; the program is executed, and what differs between the
first and the last graph (states, and ON, INSIDE and HOLDS edges) is the goal.

The data folder holds, at any depth, the corpus as it is distributed
(`withoutconds/<source>/<name>.txt` beside `initstate/<source>/<name>.json`), the scenes
(`TrimmedTestScene<n>_graph.json`) and VirtualHome's `resources`, which its package lacks.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import pickle
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spa_jax.envs.virtualhome.actions import TEMPLATES
from spa_jax.envs.virtualhome.making import LeftOut, Made, make_task
from spa_jax.envs.virtualhome.simulator import library
from spa_jax.errors import UserError

_RESOURCES = ("properties_data", "object_states", "object_script_placing", "class_name_equivalence")
_MAX_NODES = 500  # as VirtualHome's own preparation

# An object of a program: its class name and which one it is, counted from 1.
Key = tuple[str, int]
Ordering = Callable[[list[Key]], list[Key]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the corpus.

    Attributes:
      source: the folder that it is in; names are unique in it.
      name: its file's name without suffix.
      title: the activity.
      description: the rest of what its author said.
      lines: the steps, such as "[Walk] <home_office> (1)".
      conditions: the preconditions, as in initstate.
    """

    source: str
    name: str
    title: str
    description: str
    lines: tuple[str, ...]
    conditions: tuple[dict[str, Any], ...]

    @property
    def key(self) -> str:
        """Its name in the corpus."""
        return f"{self.source}/{self.name}"


@contextlib.contextmanager
def unpacked(data: Path) -> Iterator[Path]:
    """The data folder; a `virtualhome_data.tar.xz` in it is unpacked for the time of the block."""
    archives = [*data.glob("virtualhome_data.tar.xz"), *data.glob("*/virtualhome_data.tar.xz")]
    if not archives or next(data.glob("**/withoutconds"), None):
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="virtualhome_") as folder:
        with tarfile.open(archives[0]) as archive:
            # Python before 3.11.4 knows no filters of members; the archive is the user's own.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(folder, **safe)  # type: ignore[arg-type]
        yield Path(folder)


@functools.lru_cache(maxsize=8)
def _pickled_scene(file: Path) -> bytes:
    """A scene, read once: unpickling is the fastest copy."""
    return pickle.dumps(json.loads(file.read_text()))


class Corpus:
    """The corpus, the scenes and the resources of a data folder.

    Args:
      data: see the module.

    Attributes:
      scenes: the scenes' names, such as "scene2", sorted.

    Raises:
      UserError: if a part is missing, naming it, or the simulator is not installed.
    """

    def __init__(self, data: Path) -> None:
        if not data.is_dir():
            raise UserError(f"the VirtualHome data {data} is no folder")
        self._programs = self._part(data, "**/withoutconds", "the programs (ActivityPrograms)")
        resources = self._part(data, f"**/resources/{_RESOURCES[0]}.json", "the resources").parent
        scene = self._part(data, "**/TrimmedTestScene*_graph.json", "the scenes").parent
        self._scenes = {
            f"scene{path.name.removeprefix('TrimmedTestScene').removesuffix('_graph.json')}": path
            for path in sorted(scene.glob("TrimmedTestScene*_graph.json"))
        }
        self.scenes = list(self._scenes)
        self._load_resources(resources)

    @staticmethod
    def _part(data: Path, pattern: str, what: str) -> Path:
        found = min(data.glob(pattern), default=None)
        if found is None:
            raise UserError(
                f"{data} lacks {what}: no {pattern.removeprefix('**/')} in it. The programs are "
                "VirtualHome's programs_processed_precond_nograb_morepreconds.zip, scenes and "
                "resources are in its repository (example_graphs, virtualhome/resources)"
            )
        return found

    def _load_resources(self, folder: Path) -> None:
        try:
            data = {name: json.loads((folder / f"{name}.json").read_text()) for name in _RESOURCES}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}: VirtualHome's resources are incomplete ({error})"
            ) from error
        properties = library().environment.Property
        self._properties = {
            name: [properties[p] for p in those] for name, those in data[_RESOURCES[0]].items()
        }
        states = data["object_states"]
        self._states = states | {name.replace("_", ""): states[name] for name in states}
        self._placing = pickle.dumps(data["object_script_placing"])
        self._equivalence = data["class_name_equivalence"]
        self._helper = self._make_helper()

    def programs(self) -> list[Program]:
        """All programs, sorted by source and name."""
        files = sorted(self._programs.glob("*/*.txt"))
        return [self._program(file) for file in files]

    def find(self, name: str, title: str, description: str) -> list[Program]:
        """The programs with this name, title and description; several sources may have one."""
        programs = map(self._program, sorted(self._programs.glob(f"*/{name}.txt")))
        return [p for p in programs if (p.title, p.description) == (title, description)]

    def _program(self, file: Path) -> Program:
        conditions = self._programs.parent / "initstate" / file.parent.name / f"{file.stem}.json"
        try:
            title, description, *lines = file.read_text().split("\n")
            preconditions = tuple(json.loads(conditions.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} with {conditions} is not complete: {error}") from error
        steps = tuple(line.strip() for line in lines if line.startswith("["))
        return Program(
            source=file.parent.name,
            name=file.stem,
            title=title.strip(),
            description=description.strip(),
            lines=steps,
            conditions=preconditions,
        )

    def prepare(self, program: Program, scene: str, seed: int, order: Ordering = list) -> Made:
        """Makes the task of a program in a scene.

        Args:
          program: the program.
          scene: one of `scenes`.
          seed: draws the room where the character starts and where things are moved to.
          order: puts the program's objects (in the order of their first mention) in the order
            in which they are looked for in the scene or added to it, numbered from 1000.

        Raises:
          LeftOut: if the program cannot be executed there, or changes nothing.
        """
        script = self._script(program)
        graph, ids = self._try_to_furnish(script, program, scene, seed, order=order, full=True)
        steps = [
            (line.action.name, [(p.name, p.instance) for p in line.parameters]) for line in script
        ]
        return make_task(
            title=program.title,
            description=program.description,
            nodes=graph["nodes"],
            edges=[(e["from_id"], e["relation_type"], e["to_id"]) for e in graph["edges"]],
            steps=steps,
            objects={name: node_id for (name, _), node_id in ids.items()},
            scene=scene,
            seed=seed,
        )

    def ids(self, program: Program, scene: str, seed: int, order: Ordering) -> dict[Key, int]:
        """The nodes of the program's objects as `prepare` would choose them; much faster.

        Raises:
          LeftOut: if the program's objects cannot be put into the scene.
        """
        script = self._script(program)
        return self._try_to_furnish(script, program, scene, seed, order=order, full=False)[1]

    def _try_to_furnish(
        self,
        script: Any,
        program: Program,
        scene: str,
        seed: int,
        *,
        order: Ordering,
        full: bool,
    ) -> tuple[dict[str, Any], dict[Key, int]]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return self._furnish(script, program, scene, seed, order=order, full=full)
        except Exception as error:  # whatever fails in the library: asserts, missing keys, ...
            raise LeftOut(f"the scene cannot be prepared ({type(error).__name__})") from error

    def _script(self, program: Program) -> Any:
        scripts = library().scripts
        try:
            script = scripts.read_script_from_list_string(program.lines)
        except scripts.ScriptParseException as error:
            raise LeftOut("an action or object that the simulator does not know") from error
        if not len(script):
            raise LeftOut("no steps")
        if any(line.action.name not in TEMPLATES for line in script):
            raise LeftOut("an action that is none of the 42")
        return script

    def _make_helper(self) -> Any:
        """VirtualHome's own preparation, with our resources; half a second."""
        utils = library().utils
        utils.load_name_equivalence = lambda: self._equivalence
        return utils.graph_dict_helper(self._properties, {}, self._states, _MAX_NODES)

    @staticmethod
    def _rename(helper: Any, script: Any, conditions: Sequence[dict[str, Any]]) -> None:
        """Gives objects the names that they have in scenes; as check_programs, in place."""
        names = helper.unity_object2script_object
        for line in script:
            for parameter in line.parameters:
                parameter.name = names.get(parameter.name, parameter.name)
        for condition in conditions:
            for value in condition.values():
                for entry in value if isinstance(value[0], list) else [value]:
                    name = entry[0].lower().replace(" ", "_")
                    entry[0] = names.get(name, name)

    def _furnish(
        self,
        script: Any,
        program: Program,
        scene: str,
        seed: int,
        *,
        order: Ordering,
        full: bool,
    ) -> tuple[dict[str, Any], dict[Key, int]]:
        """The program's initial graph in a scene, and its objects' ids.

        The steps of the library's `check_programs.check_one_program`, without objects that the
        program does not need, and with an order of the program's objects that is not a set's.

        Args:
          full: False stops when the objects are there, before states and relations are set.
        """
        helper, graph = self._helper, pickle.loads(_pickled_scene(self._scenes[scene]))
        helper.object_placing = pickle.loads(self._placing)  # it may write into it
        library().utils.random = random.Random(seed)
        helper.initialize(graph)
        conditions = copy.deepcopy(list(program.conditions))
        self._rename(helper, script, conditions)
        script.obtain_objects = lambda: order(_objects(script))
        everything: Callable[[int], bool] = lambda _: True  # noqa: E731
        helper.set_to_default_state(graph, None, id_checker=everything)
        ids, first_room, _ = helper.add_missing_object_from_script(script, conditions, graph, {})
        if full:
            own = set(ids.values())
            helper.set_to_default_state(graph, first_room, id_checker=own.__contains__)
            helper.check_binary(graph, id_checker=everything, verbose=False)
            helper.prepare_from_precondition(conditions, ids, graph)
            helper.open_all_doors(graph)
            helper.ensure_light_on(graph, id_checker=lambda node_id: node_id not in own)
            helper.check_binary(graph, id_checker=everything, verbose=False)
        return graph, ids


def _objects(script: Any) -> list[Key]:
    """A script's objects in the order of their first mention."""
    return list(dict.fromkeys((p.name, p.instance) for line in script for p in line.parameters))
