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
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_jax.envs.conformance import Report
from spa_jax.envs.virtualhome.corpus import Corpus, Key, LeftOut, Ordering, unpacked
from spa_jax.envs.virtualhome.engine import VirtualhomeEngine
from spa_jax.envs.virtualhome.simulator import Graph
from spa_jax.envs.virtualhome.tasks import Goal, HomeTask
from spa_jax.errors import UserError

CASES = "cases_episodes.json"
_PREFIX = "Observation: "
_SEED = 0  # of the recorded preparations
_MAX_STEPS = 20  # the fewest after which the published class ends an episode
_MAX_ORDERS = 500
_OBSERVATION = re.compile(r"(?:(?P<things>.+?)\. )?(?:You have (?P<held>.+)\. )?", re.DOTALL)


@dataclasses.dataclass
class _Counts:
    """Of the recorded values of one kind, how many agree; and the first that do not."""

    agree: int = 0
    total: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)

    def add(self, equal: bool, difference: str) -> None:
        self.total += 1
        self.agree += equal
        if not equal:
            self.differences.append(difference)


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
    places = [folder / part / f"{CASES}{end}" for part in ("", "virtualhome") for end in ("", ".xz")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"--cases={folder}: no {CASES} or {CASES}.xz in it or in its virtualhome/")
    try:
        text = lzma.open(file, "rt").read() if file.suffix == ".xz" else file.read_text()
        cases = json.loads(text)
        if not cases or not all(case["log"] and case["task"]["id"] for case in cases):
            raise ValueError("no cases in it")
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise UserError(f"{file} holds no cases of VirtualHome ({error})") from error
    return cases


def check(data: Path, cases: Path) -> Report:
    """Replays the cases in a folder on the data of another.

    Args:
      data: see `corpus`; the packed `virtualhome_data.tar.xz` will do as well.
      cases: holds the cases.

    Returns:
      The report; ok if every recorded value is reproduced.

    Raises:
      UserError: if data or cases are missing or broken.
    """
    recorded = read_cases(cases)
    counts: dict[str, _Counts] = collections.defaultdict(_Counts)
    with unpacked(data) as folder:
        corpus = Corpus(folder)
        for case in recorded:
            _check_case(corpus, case, counts)
    lines = [f"virtualhome: {len(recorded)} episodes of the published environment"]
    for kind, count in counts.items():
        lines.append(f"  {kind}: {count.agree} of {count.total} equal")
        lines += [f"    {difference}" for difference in count.differences[:10]]
    total = sum(count.total for count in counts.values())
    agree = sum(count.agree for count in counts.values())
    return Report(tuple(lines), agree / total, agree == total)


def _check_case(corpus: Corpus, case: Mapping[str, Any], counts: dict[str, _Counts]) -> None:
    name = case["task"]["id"]
    try:
        task, graph = rebuild(corpus, case["task"])
    except LeftOut as error:
        counts["tasks"].add(False, f"{name}: {error}")
        return
    counts["tasks"].add(True, "")
    (_, introduction), *steps = case["log"]
    engine = VirtualhomeEngine()
    observation = engine.begin(task, graph)
    counts["observations"].add(observation.text == introduction, f"{name}: {introduction!r}")
    for number, (command, text) in enumerate(steps, start=1):
        observation = engine.step(command)
        ours, theirs = observation.text, text.removeprefix(_PREFIX)
        counts["observations"].add(
            text.startswith(_PREFIX) and normal(ours) == normal(theirs),
            f"{name}, step {number}, {command!r}: {ours!r} here, {theirs!r} recorded",
        )
        last = number == len(steps)
        if observation.done and not last:
            counts["ends"].add(False, f"{name}: solved at step {number} of {len(steps)}")
            break
    success = observation.success
    counts["success"].add(case["success"] is success, f"{name}: {success} here")
    reasons = {"success"} if success else {None}
    if not success and len(steps) >= _MAX_STEPS:
        reasons |= {"max_steps"}
    recorded = (case["steps"], case["reason"], case["reward"])
    equal = case["steps"] == len(steps) and case["reason"] in reasons and case["reward"] is None
    counts["ends"].add(equal, f"{name}: (steps, reason, reward) {recorded}, {len(steps)} played")


def rebuild(corpus: Corpus, recorded: Mapping[str, Any]) -> tuple[HomeTask, Graph]:
    """Makes a recorded task again from its scene and program.

    The recorder went through a set of the program's objects.  The order in which it did is that
    of `object_id_dict`, but for several objects of one class, of which that names one: their
    orders are tried.

    Raises:
      LeftOut: if objects or goal come out different.
    """
    scene, _, stem = recorded["id"].partition("_")
    scene = f"scene{scene.removeprefix('s')}"
    program = corpus.find(stem, recorded["task"].strip(), recorded["description"].strip())
    if program is None or scene not in corpus.scenes or recorded["path"] != f"{recorded['id']}.txt":
        raise LeftOut("the data has no such program and scene")
    goal = Goal.from_json(recorded["revised_graph"])
    why = LeftOut("the program does not have these objects")
    for order in _orderings(list(recorded["object_id_dict"])):
        try:
            prepared = corpus.prepare(program, scene, _SEED, order)
        except LeftOut as error:
            why = error
            continue
        if _same_objects(prepared.ids, recorded["object_id_dict"]) and prepared.task.goal == goal:
            objects = dict(recorded["object_id_dict"])
            return dataclasses.replace(prepared.task, objects=objects), prepared.graph
        why = LeftOut("objects or goal come out different")
    raise why


def _same_objects(ids: Mapping[Key, int], recorded: Mapping[str, int]) -> bool:
    """Whether the recorded objects are the program's; of several of a class any may be named."""
    return {name for name, _ in ids} == recorded.keys() and all(
        any(name == key[0] and node_id == recorded[name] for key, node_id in ids.items())
        for name in recorded
    )


def _orderings(names: Sequence[str]) -> Iterator[Ordering]:
    """Orderings of a program's objects in which their names first come up in this order."""
    seen: list[Key] = []

    def first(keys: list[Key]) -> list[Key]:
        seen.extend(keys)
        return next(_orders(keys, names), keys)

    yield first
    for keys in itertools.islice(_orders(seen, names), 1, _MAX_ORDERS):
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
