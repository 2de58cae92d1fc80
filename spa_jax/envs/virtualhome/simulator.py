"""VirtualHome's evolving-graph simulator, without Unity.  Only environment processes import it.

The package's top level cannot be imported (it needs Unity's parts and indexes `sys.path[5]`),
so the subpackage is loaded by itself, under a name of its own, and three faults of 2.3.0 are
mended in that copy: FIND on a far object and PUTOFF raise TypeError, and a time measurement
that nobody reads remembers every call.

A home is a graph: nodes (things, rooms, the character) with properties and states, edges
(from, relation, to) such as (mug, ON, table).  The simulator itself keeps edges in sets of
integers, which are ordered alike in every process; what depends on the hash of a string or an
enum (the order of a node's states and of edges with different relations) is sorted here.
"""

import functools
import importlib.util
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_jax.errors import UserError

INSTALL = "pip install --no-deps virtualhome==2.3.0"
CHARACTER = "character"

Edge = tuple[int, str, int]  # (from id, relation, to id)
Graph = dict[str, list[Any]]  # {"nodes": [dict, ...], "edges": [Edge, ...]}

_NAME = "_virtualhome_evolving_graph"


@functools.cache
def library() -> types.ModuleType:
    """The package `virtualhome.simulation.evolving_graph`, mended.

    Its modules `environment`, `execution`, `scripts` and `utils` are attributes.

    Raises:
      UserError: if the package virtualhome is not installed, or is another one.
    """
    top = importlib.util.find_spec("virtualhome")
    places = (top and top.submodule_search_locations) or []
    folders = [Path(place) / "simulation" / "evolving_graph" for place in places]
    folder = next((f for f in folders if (f / "__init__.py").is_file()), None)
    if folder is None:
        raise UserError(
            f"VirtualHome's simulator is not installed in {sys.prefix}; run: {INSTALL} "
            "(without --no-deps pip wants OpenCV and old versions that nothing here needs)"
        )
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = package
    state = random.getstate()
    try:
        spec.loader.exec_module(package)
    finally:
        random.setstate(state)  # it seeds the global generator when it is imported
    importlib.import_module(f"{_NAME}.scripts")
    _mend(package)
    return package


def _mend(package: types.ModuleType) -> None:
    execution, environment = package.execution, package.environment

    def execute(joined: Any, script: Any, state: Any, info: Any, *options: Any) -> Iterator[Any]:
        for executor in joined.executors:
            yield from executor.execute(script, state, info, *options)

    def check_putoff(self: Any, state: Any, node: Any, info: Any) -> bool:
        character = next(state.get_char_node(0))
        worn = state.has_edge(node, environment.Relation.ON, character)
        return worn and environment.Property.CLOTHES in node.properties

    execution.JoinedExecutor.execute = execute
    execution.PutOffExecutor.check_putoff = check_putoff
    package.common.TimeMeasurement.start = staticmethod(lambda name: None)
    package.common.TimeMeasurement.stop = staticmethod(lambda key: None)


def untangle(edges: Iterable[Edge]) -> list[Edge]:
    """Edges with fewer contradictions: where a is related to b and b is INSIDE a, both go.

    The published environment does this to every initial graph, because curtains that hang
    inside each other make its search for visible objects endless.  It removes from the list
    that it is going through, and so overlooks the edge that follows (two, if the inverse came
    before): of two things in a washing machine one stays.  That decides what is seen and what a
    program can do, so it is kept.
    """
    left = list(dict.fromkeys(edges))
    present = set(left)
    position = 0
    while position < len(left):
        start, _, end = edge = left[position]
        inverse = (end, "INSIDE", start)
        if inverse in present:
            for gone in {edge, inverse}:
                left.remove(gone)
                present.remove(gone)
        position += 1
    return left


class World:
    """A home in which one character acts.

    Args:
      graph: the initial state; it is not changed.

    Attributes:
      character: the character's node id.
    """

    def __init__(self, graph: Mapping[str, Sequence[Any]]) -> None:
        self._library = library()
        environment = self._library.environment
        edges = [{"from_id": a, "relation_type": r, "to_id": b} for a, r, b in graph["edges"]]
        environment_graph = environment.EnvironmentGraph({"nodes": graph["nodes"], "edges": edges})
        self._executor = self._library.execution.ScriptExecutor(environment_graph, {})
        self._state = environment.EnvironmentState(environment_graph, {}, instance_selection=True)
        self._relations = environment.Relation.__members__
        self.character: int = next(self._state.get_char_node(0)).id

    def execute(self, action: str, objects: Sequence[tuple[str, int]]) -> bool:
        """Does an action, such as ("PUTBACK", [("mug", 12), ("table", 7)]).

        Args:
          action: a name of the library's `scripts.Action`.
          objects: (class name, node id) of what it is done with.

        Returns:
          Whether it could be done; if not, nothing has changed.
        """
        scripts = self._library.scripts
        parameters = [scripts.ScriptObject(name, node_id) for name, node_id in objects]
        line = scripts.ScriptLine(scripts.Action[action], parameters, 0)
        done, self._state = self._executor.execute_one_step(scripts.Script([line]), self._state)
        return done

    def nodes(self) -> list[Any]:
        """All nodes, with `id`, `class_name`, `category`, `properties` and `states`."""
        return self._state.get_nodes()

    def node(self, node_id: int) -> Any:
        """One node; None if there is no such id."""
        return self._state.get_node(node_id)

    def targets(self, node_id: int, relation: str) -> list[int]:
        """The nodes to which a node is related."""
        return list(self._state.get_node_ids_from(node_id, self._relations[relation]))

    def has_edge(self, edge: Edge) -> bool:
        """Whether an edge holds."""
        return edge[2] in self.targets(edge[0], edge[1])

    def edges(self, relations: Sequence[str] = ()) -> list[Edge]:
        """The edges of these relations (of all, without any), sorted by their first two entries."""
        ids = sorted(node.id for node in self.nodes())
        return [
            (node_id, relation, target)
            for node_id in ids
            for relation in sorted(relations or self._relations)
            for target in self.targets(node_id, relation)
        ]

    def states(self) -> dict[int, tuple[str, ...]]:
        """The sorted states of each node."""
        return {node.id: states_of(node) for node in self.nodes()}


def states_of(node: Any) -> tuple[str, ...]:
    """A node's states by name, sorted: the simulator keeps them in the order of their hashes."""
    return tuple(sorted(state.name for state in node.states))
