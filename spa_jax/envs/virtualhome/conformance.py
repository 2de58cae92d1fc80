"""Replays recorded episodes of the published environment and compares.

`cases_episodes.json` holds tasks of the corpus and what the published class answered to the
commands of their programs:

    [{"task": {"id": "s2_file195_1", "path", "task", "description", "revised_graph",
               "object_id_dict"},
      "log": [["", "The task is ..."], [command, "Observation: ..."], ...],
      "success", "steps", "reason", "reward"}, ...]

A case names the scene and the program; the initial graph is made again from them.
"""

import collections
import dataclasses
import functools
import itertools
import json
import lzma
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from spa_jax.envs.conformance import Report
from spa_jax.envs.virtualhome.corpus import Corpus, Key, Ordering, unpacked
from spa_jax.envs.virtualhome.engine import VirtualhomeEngine
from spa_jax.envs.virtualhome.making import LeftOut
from spa_jax.envs.virtualhome.simulator import Edge, Graph
from spa_jax.envs.virtualhome.tasks import Goal, HomeTask
from spa_jax.errors import UserError

CASES = "cases_episodes.json"
_FIELDS = {"task", "log", "success", "steps", "reason", "reward"}
_TASK = {"id", "path", "task", "description", "revised_graph", "object_id_dict"}
_PREFIX = "Observation: "
_SEED = 0  # of the recorded preparations
_MAX_STEPS = 20  # the fewest after which the published class ends an episode
_MAX_ORDERS = 100  # of edges that are tried
_MAX_OBJECT_ORDERS = 2000
_MAX_GRAPHS = 12
_OBSERVATION = re.compile(r"(?:(?P<things>.+?)\. )?(?:You have (?P<held>.+)\. )?", re.DOTALL)


@dataclasses.dataclass
class _Counts:
    """How many recorded values of one kind were compared, and which of them differ."""

    total: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)

    def add(self, found: Sequence[str]) -> None:
        """Adds values: empty for one that is equal."""
        self.total += len(found)
        self.differences += filter(None, found)


def normal(observation: str) -> object:
    """An observation without the order of what is kept in sets: states, things and relations.

    Two that are equal up to that order have the same normal form.
    """
    match = _OBSERVATION.fullmatch(observation)
    if match is None or not observation:
        return observation
    things = (match["things"] or "").split(", ")
    if len(set(things)) < len(things):
        return observation  # the published class never says a thing twice
    forms = set()
    for thing in things:
        name, verb, states = thing.partition(" is ")
        forms.add((name, verb, tuple(sorted(states.split(" and ")))))
    return frozenset(forms), match["held"]


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """The cases in a folder or its `virtualhome` folder, plain or as .xz.

    Raises:
      UserError: if there are none, or they cannot be read.
    """
    places = [
        folder / part / f"{CASES}{end}" for part in ("", "virtualhome") for end in ("", ".xz")
    ]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"--cases={folder}: no {CASES} or {CASES}.xz in it or in its virtualhome/")
    try:
        text = lzma.open(file, "rt").read() if file.suffix == ".xz" else file.read_text()
        cases = json.loads(text)
        complete = (
            case["log"] and _FIELDS <= case.keys() and _TASK <= case["task"].keys()
            for case in cases
        )
        if not cases or not all(complete):
            raise ValueError(f"each has {sorted(_FIELDS)} and its task {sorted(_TASK)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, lzma.LZMAError) as error:
        raise UserError(f"{file} holds no cases of VirtualHome ({error})") from error
    return cases


def check(data: str | os.PathLike[str], cases: str | os.PathLike[str]) -> Report:
    """Replays the cases in a folder on the data of another.

    Args:
      data: see `corpus`; the packed `virtualhome_data.tar.xz` will do as well.
      cases: holds the cases.

    Returns:
      The report; ok if every recorded value is reproduced.

    Raises:
      UserError: if data or cases are missing or broken.
    """
    recorded = read_cases(Path(cases))
    counts = {kind: _Counts() for kind in ("tasks", "observations", "success", "ends")}
    other_orders = 0
    with unpacked(Path(data)) as folder:
        corpus = Corpus(folder)
        for case in tqdm.tqdm(recorded, desc="virtualhome", unit="episode"):
            try:
                other, found = _best_replay(case, rebuild(corpus, case["task"]))
            except LeftOut as error:
                other, found = False, {"tasks": [f"{case['task']['id']}: {error}"]}
            other_orders += other
            for kind, differences in found.items():
                counts[kind].add(differences)
    lines = [f"virtualhome: {len(recorded)} episodes of the published environment"]
    if other_orders:
        lines.append(f"  {other_orders} of them with another order of hashes than ours")
    for kind, count in counts.items():
        lines.append(f"  {kind}: {count.total - len(count.differences)} of {count.total} equal")
        lines += [f"    {difference}" for difference in count.differences[:10]]
    total = sum(count.total for count in counts.values())
    differ = sum(len(count.differences) for count in counts.values())
    return Report(tuple(lines), 1 - differ / total, differ == 0)


def _best_replay(
    case: Mapping[str, Any], rebuilt: Iterator[tuple[HomeTask, Graph]]
) -> tuple[bool, dict[str, list[str]]]:
    """Replays a case, and again with other orders of hashes if it comes out different.

    Which of several things in a closed box the published environment sees depends on the order
    in which it went through the edges (see `simulator.untangle`), and it wrote them down in
    the order of a set.  An episode agrees if there is such an order under which all of it does.

    Returns:
      Whether it agrees only with another order than ours, and what `_replay` says of it.
    """
    graphs, results = [], []
    for task, graph in itertools.islice(rebuilt, _MAX_GRAPHS):
        graphs.append((task, graph))
        results.append(_replay(case, task, graph))
        if _agrees(results[-1]):
            return len(results) > 1, results[-1]
    for seed in range(_MAX_ORDERS):
        task, graph = graphs[seed % len(graphs)]
        other = graph | {"edges": _reordered(graph["edges"], seed)}
        found = _replay(case, task, other, stop=True)
        if _agrees(found):
            return True, found
    return False, results[0]


def _agrees(found: Mapping[str, list[str]]) -> bool:
    return not any(any(differences) for differences in found.values())


def _reordered(edges: Sequence[Edge], seed: int) -> list[Edge]:
    """The edges in another order that a set of (node, relation) could have."""
    groups = collections.defaultdict(list)
    for edge in edges:
        groups[edge[:2]].append(edge)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    return [edge for key in keys for edge in groups[key]]


def _replay(
    case: Mapping[str, Any], task: HomeTask, graph: Graph, stop: bool = False
) -> dict[str, list[str]]:
    """Replays a case; for each kind of recorded value what differs, empty for what is equal.

    Args:
      stop: whether to go no further than the first observation that differs.
    """
    name = case["task"]["id"]
    (_, introduction), *steps = case["log"]
    engine = VirtualhomeEngine()
    observation = engine.begin(task, graph)
    seen = ["" if observation.text == introduction else f"{name}: {introduction!r} recorded"]
    for number, (command, text) in enumerate(steps, start=1):
        if observation.done:
            seen.append(f"{name}: solved at step {number - 1} of {len(steps)}")
            break
        observation = engine.step(command)
        equal = text.startswith(_PREFIX) and (
            normal(observation.text) == normal(text.removeprefix(_PREFIX))
        )
        where = f"{name}, step {number}, {command!r}"
        seen.append("" if equal else f"{where}: {observation.text!r} here, {text!r} recorded")
        if stop and not equal:
            break
    success = observation.success
    reasons: set[str | None] = {"success"} if success else {None}
    if not success and len(steps) >= _MAX_STEPS:
        reasons.add("max_steps")
    equal = case["steps"] == len(steps) and case["reason"] in reasons and case["reward"] is None
    ends = {key: case[key] for key in ("steps", "reason", "reward")}
    return {
        "tasks": [""],
        "observations": seen,
        "success": ["" if case["success"] is success else f"{name}: {success} here"],
        "ends": ["" if equal else f"{name}: {ends} recorded"],
    }


def rebuild(corpus: Corpus, recorded: Mapping[str, Any]) -> Iterator[tuple[HomeTask, Graph]]:
    """Makes a recorded task again from its scene and program.

    The recorder went through a set of the program's objects.  The order in which it did is that
    of `object_id_dict`, but for several objects of one class, of which that names the last:
    for them all orders are tried, and each initial graph is given that has the recorded goal.

    Raises:
      LeftOut: if no order gives the recorded objects and goal.
    """
    scene, _, stem = recorded["id"].partition("_")
    scene = f"scene{scene.removeprefix('s')}"
    programs = corpus.find(stem, recorded["task"].strip(), recorded["description"].strip())
    if not programs or scene not in corpus.scenes or recorded["path"] != f"{recorded['id']}.txt":
        raise LeftOut("the data has no such program and scene")
    objects = dict(recorded["object_id_dict"])
    try:
        goal = Goal.from_json(recorded["revised_graph"])
    except (KeyError, TypeError) as error:
        raise LeftOut(f"the recorded goal cannot be read ({error!r})") from error
    given: list[Graph] = []
    why = LeftOut("the program does not have these objects")
    for program, order in ((p, order) for p in programs for order in _orderings(list(objects))):
        try:
            if _by_name(corpus.ids(program, scene, _SEED, order)) != objects:
                continue
            made = corpus.prepare(program, scene, _SEED, order)
        except LeftOut as error:
            why = error
            continue
        if made.task.goal != goal:
            why = LeftOut("the goal comes out different")
        elif made.graph not in given:
            given.append(made.graph)
            yield made.task, made.graph
    if not given:
        raise why


def _by_name(ids: Mapping[Key, int]) -> dict[str, int]:
    return {name: node_id for (name, _), node_id in ids.items()}


def _orderings(names: Sequence[str]) -> Iterator[Ordering]:
    """Orderings of a program's objects in which their names first come up in this order."""
    seen: list[Key] = []

    def first(keys: list[Key]) -> list[Key]:
        seen.extend(keys)
        return next(_orders(keys, names), keys)

    yield first
    for keys in itertools.islice(_orders(seen, names), 1, _MAX_OBJECT_ORDERS):
        yield functools.partial(_given, keys)


def _given(keys: list[Key], _: list[Key]) -> list[Key]:
    return keys


def _orders(keys: Sequence[Key], names: Sequence[str]) -> Iterator[list[Key]]:
    """What `_orderings` gives, for these objects."""

    def extend(done: list[Key], left: list[Key]) -> Iterator[list[Key]]:
        if not left:
            yield done
        begun = {name for name, _ in done}
        fresh = next((name for name in names if name in {n for n, _ in left} - begun), None)
        for key in left:
            if key[0] in begun or key[0] == fresh:
                yield from extend([*done, key], [other for other in left if other != key])

    return extend([], list(keys))
