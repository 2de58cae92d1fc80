"""Makes new ALFWorld games in the official layout, without any download.

    python -m spa_jax.envs.alfworld.generate --out games/train --games 100 --seed 1

then `--alfworld_data=games --split=train`.  A game is a function of (seed, index): rooms of
a few receptacles, the wanted object somewhere that fits it, closed places included, and
other objects beside it.  What fits where, what can be cleaned, heated or cooled, the
goals and the task sentences are those of the alfworld package.  Each game is won by its
walkthrough in the engine before it is put in place; a game that is there already is kept.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from spa_jax.envs import cli
from spa_jax.envs.alfworld.engine import AlfworldEngine
from spa_jax.envs.alfworld.games import GAME_FILE, TASK_TYPES, TRAJECTORY_FILE, layout_hash
from spa_jax.errors import UserError
from spa_jax.runtime import interrupt

# isort: split
# The engine sets alfworld's data folder first.
from alfworld.gen import constants
from alfworld.gen.goal_library import gdict
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

_FITS = constants.VAL_RECEPTACLE_OBJECTS
_AFFORDANCES = {"cleanable": "Cleanable", "heatable": "Heatable", "coolable": "Coolable"}
# Task type -> what the object must be able to, the command, and where that is done.
_PROCESSES = {
    "pick_clean_then_place_in_recep": ("Cleanable", "clean", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "heat", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "cool", "Fridge"),
}
_LAMP = "DeskLamp"
_LAMP_PLACES = ("Desk", "SideTable", "Dresser", "CoffeeTable")


@dataclasses.dataclass(frozen=True)
class _RoomKind:
    """What a kind of room can hold: receptacle types with their largest number, object types."""

    receptacles: dict[str, int]
    objects: tuple[str, ...]


_ROOMS = {
    "Kitchen": _RoomKind(
        {
            "Cabinet": 3, "CounterTop": 2, "Drawer": 3, "DiningTable": 1, "Fridge": 1,
            "Microwave": 1, "SinkBasin": 1, "GarbageCan": 1, "Shelf": 2, "SideTable": 1,
        },
        tuple(
            "Apple Bread Egg Lettuce Potato Tomato Bowl ButterKnife Cup DishSponge Fork "
            "Glassbottle Kettle Knife Ladle Mug Pan PepperShaker Plate Pot SaltShaker "
            "SoapBottle Spatula Spoon WineBottle".split()
        ),
    ),
    "LivingRoom": _RoomKind(
        {
            "ArmChair": 2, "CoffeeTable": 1, "Sofa": 1, "SideTable": 2, "Shelf": 2, "Drawer": 3,
            "Cabinet": 2, "DiningTable": 1, "Dresser": 1, "GarbageCan": 1, "Ottoman": 1, "Safe": 1,
        },
        tuple(
            "Book CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl Statue "
            "TissueBox Vase Watch WateringCan Candle Pen Pencil".split()
        ),
    ),
    "Bedroom": _RoomKind(
        {
            "Bed": 2, "Desk": 2, "Drawer": 3, "Dresser": 1, "SideTable": 2, "Shelf": 2,
            "ArmChair": 1, "GarbageCan": 1, "Safe": 1,
        },
        tuple(
            "AlarmClock BasketBall Book Bowl CD CellPhone CreditCard KeyChain Laptop Mug Pen "
            "Pencil Pillow TennisRacket Watch".split()
        ),
    ),
    "Bathroom": _RoomKind(
        {
            "BathtubBasin": 1, "CounterTop": 2, "Cabinet": 3, "Drawer": 2, "GarbageCan": 1,
            "SinkBasin": 1, "Toilet": 1, "Shelf": 2, "SideTable": 1, "Cart": 1,
        },
        tuple(
            "Candle Cloth DishSponge SoapBar SoapBottle SprayBottle TissueBox ToiletPaper "
            "HandTowel".split()
        ),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Thing:
    """A receptacle or an object: the `number`-th of its type, shown as "mug 2"."""

    type: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.type.lower()} {self.number}"


@dataclasses.dataclass(frozen=True)
class _Scene:
    """A whole game before it is written."""

    task_type: str
    kind: str
    object: str
    parent: str  # where it goes; "" in look_at_obj_in_light
    receptacles: tuple[_Thing, ...]
    places: dict[_Thing, _Thing]  # object -> receptacle

    def of_type(self, kind: str) -> list[_Thing]:
        return [r for r in self.receptacles if r.type == kind]


def _number(types: Iterable[str]) -> tuple[_Thing, ...]:
    counts: collections.Counter[str] = collections.Counter()
    things = []
    for kind in sorted(types):
        counts[kind] += 1
        things.append(_Thing(kind, counts[kind]))
    return tuple(things)


def _choose_goal(rng: random.Random, task_type: str) -> tuple[str, str, str, list[str]]:
    """Draws (room kind, object type, parent type, receptacle types that must be there)."""
    kinds = [k for k in sorted(constants.GOALS_VALID[task_type]) if k in _ROOMS]
    affordance, _, appliance = _PROCESSES.get(task_type, ("", "", ""))
    look = task_type == "look_at_obj_in_light"
    while True:
        kind = rng.choice(kinds)
        room = _ROOMS[kind]
        wanted = rng.choice(room.objects)
        if affordance and wanted not in constants.VAL_ACTION_OBJECTS[affordance]:
            continue
        fitting = [r for r in room.receptacles if wanted in _FITS.get(r, ())]
        parents = [r for r in fitting if r != appliance]
        parent = rng.choice(parents) if parents and not look else ""
        sources = [r for r in fitting if r != parent]
        if not sources or not (parent or look):
            continue
        needed = [r for r in (parent, appliance) if r]
        if look:
            needed.append(rng.choice([r for r in _LAMP_PLACES if r in room.receptacles]))
        source = rng.choice(sources)
        return kind, wanted, parent, needed + ([source] if source not in needed else [])


def _filling(
    rng: random.Random, kind: str, wanted: str, types: Sequence[str], *, count: int, closed: bool
) -> list[str]:
    """The types of `count` receptacles beside those that the goal needs.

    As many of each as the kind of room has; or, `closed`, any number of those that must be opened
    and may hold what is wanted (if the room has such a type).
    """
    room = _ROOMS[kind].receptacles
    hiding = [r for r in room if r in constants.OPENABLE_CLASS_SET and wanted in _FITS[r]]
    if closed and hiding:
        return [rng.choice(hiding) for _ in range(count)]
    pool = [r for r, n in room.items() for _ in range(n - types.count(r))]
    return rng.sample(pool, min(count, len(pool)))


def _draw_scene(
    rng: random.Random, task_type: str, fewest: int, most: int, closed: bool = False
) -> _Scene:
    kind, wanted, parent, types = _choose_goal(rng, task_type)
    size = max(rng.randint(fewest, most), len(types))
    filling = _filling(rng, kind, wanted, types, count=size - len(types), closed=closed)
    receptacles = _number([*types, *filling])
    count = 2 if task_type == "pick_two_obj_and_place" else rng.choice((1, 1, 1, 2))
    others = rng.sample([o for o in _ROOMS[kind].objects if o != wanted], rng.randint(2, 5))
    objects = _number([wanted] * count + [o for o in others if rng.random() < 0.9])
    places = {}
    for thing in objects:
        fitting = [r for r in receptacles if thing.type in _FITS.get(r.type, ())]
        if thing.type == wanted:
            fitting = [r for r in fitting if r.type != parent]
        if fitting:
            places[thing] = rng.choice(fitting)
    if task_type == "look_at_obj_in_light":
        stands = [r for r in receptacles if r.type in _LAMP_PLACES]
        places[_Thing(_LAMP, 1)] = rng.choice(stands)
    return _Scene(
        task_type=task_type,
        kind=kind,
        object=wanted,
        parent=parent,
        receptacles=receptacles,
        places=places,
    )


class _Names:
    """PDDL names.  The engine numbers what is shown in falling order of these names."""

    def __init__(self, scene: _Scene):
        self._count = collections.Counter(t.type for t in (*scene.receptacles, *scene.places))

    def __call__(self, thing: _Thing) -> str:
        count = self._count[thing.type]
        index = f"{count + 1 - thing.number:0{len(str(count))}}"  # so that names sort as numbers
        if thing.type.endswith("Basin"):  # a sinkbasin is a part of a sink
            return f"{thing.type.removesuffix('Basin')}_bar_{index}_bar_{thing.type}"
        return f"{thing.type}_bar_{index}"


def _facts(scene: _Scene, names: _Names) -> Iterator[str]:
    where = {r: f"loc_bar_{i}" for i, r in enumerate(scene.receptacles, 1)}
    object_types = sorted({thing.type for thing in scene.places})
    yield "atLocation agent1 loc_bar_0"
    for receptacle, location in where.items():
        yield f"receptacleType {names(receptacle)} {receptacle.type}Type"
        yield f"receptacleAtLocation {names(receptacle)} {location}"
        if receptacle.type in constants.OPENABLE_CLASS_SET:
            yield f"openable {names(receptacle)}"
    for kind in sorted({r.type for r in scene.receptacles}):
        for held in object_types:
            if held in _FITS.get(kind, ()):
                yield f"canContain {kind}Type {held}Type"
    for thing, place in scene.places.items():
        yield f"objectType {names(thing)} {thing.type}Type"
        yield f"inReceptacle {names(thing)} {names(place)}"
        yield f"objectAtLocation {names(thing)} {where[place]}"
        if thing.type == _LAMP:
            yield f"toggleable {names(thing)}"
            continue
        yield f"pickupable {names(thing)}"
        if thing.type in constants.MOVABLE_RECEPTACLES_SET:
            yield f"isReceptacleObject {names(thing)}"
        for predicate, affordance in _AFFORDANCES.items():
            if thing.type in constants.VAL_ACTION_OBJECTS[affordance]:
                yield f"{predicate} {names(thing)}"


def _problem(scene: _Scene, name: str) -> str:
    names = _Names(scene)
    # The domain names these types whether the room has such a thing or not.
    object_types = {thing.type for thing in scene.places} | {"Knife", "ButterKnife"}
    receptacle_types = {r.type for r in scene.receptacles} | {"SinkBasin", "Microwave", "Fridge"}
    objects = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in sorted(object_types)),
        *(f"{kind}Type - rtype" for kind in sorted(receptacle_types)),
        *(f"{names(thing)} - object" for thing in scene.places),
        *(f"{names(receptacle)} - receptacle" for receptacle in scene.receptacles),
        *(f"loc_bar_{i} - location" for i in range(len(scene.receptacles) + 1)),
    ]
    goal = gdict[scene.task_type]["pddl"].replace("#", "-")
    goal = goal.format(obj=scene.object, recep=scene.parent, toggle=_LAMP)
    facts = "\n".join(f"    ({fact})" for fact in _facts(scene, names))
    listed = "\n".join(f"    {entry}" for entry in objects)
    return (
        f"(define (problem {name})\n(:domain alfred)\n(:objects\n{listed}\n)\n"
        f"(:init\n{facts}\n)\n{goal}"
    )


def _walkthrough(scene: _Scene) -> list[str]:
    """What somebody who knows the room would do, in the official grammar's wording."""
    commands: list[str] = []
    opened: set[_Thing] = set()
    at: list[_Thing] = []

    def go(place: _Thing, open_it: bool = True) -> None:
        if at[-1:] != [place]:  # going where one is cannot be executed
            at.append(place)
            commands.append(f"go to {place.name}")
        if open_it and place.type in constants.OPENABLE_CLASS_SET and place not in opened:
            opened.add(place)
            commands.append(f"open {place.name}")

    wanted = [thing for thing in scene.places if thing.type == scene.object]
    for thing in wanted[: 2 if scene.task_type == "pick_two_obj_and_place" else 1]:
        go(scene.places[thing])
        commands.append(f"take {thing.name} from {scene.places[thing].name}")
        if scene.task_type == "look_at_obj_in_light":
            lamp = _Thing(_LAMP, 1)
            go(scene.places[lamp], open_it=False)
            return [*commands, f"use {lamp.name}"]
        _, verb, appliance = _PROCESSES.get(scene.task_type, ("", "", ""))
        if verb:
            go(scene.of_type(appliance)[0], open_it=False)
            commands.append(f"{verb} {thing.name} with {scene.of_type(appliance)[0].name}")
        target = scene.of_type(scene.parent)[0]
        go(target)
        commands.append(f"move {thing.name} to {target.name}")
    return commands


def make_game(
    seed: int,
    index: int,
    task_type: str,
    min_receptacles: int,
    max_receptacles: int,
    *,
    closed: bool = False,
) -> tuple[str, dict[str, object], dict[str, object]]:
    """The game of (seed, index): its name "<game>/<trial>", game.tw-pddl and traj_data.json."""
    drawn = f"{seed}/{index}/{task_type}/{min_receptacles}/{max_receptacles}"
    rng = random.Random(drawn + "/closed" * closed)
    scene = _draw_scene(rng, task_type, min_receptacles, max_receptacles, closed)
    toggle = _LAMP if task_type == "look_at_obj_in_light" else ""
    sentence = rng.choice(gdict[task_type]["templates"]).format(
        obj=scene.object.lower(), recep=scene.parent.lower(), toggle=toggle.lower(), mrecep=""
    )
    trial = f"trial_S{seed}_{index:06d}"
    problem = _problem(scene, f"plan_{trial}")
    data = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": _walkthrough(scene),
    }
    trajectory = {
        "task_id": trial,
        "task_type": task_type,
        "pddl_params": {
            "object_target": scene.object,
            "parent_target": scene.parent,
            "toggle_target": toggle,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"Generated{scene.kind}", "scene_num": index},
        "generator_seed": seed,
        "generator_index": index,
        "layout": layout_hash(problem),
    }
    game = f"{task_type}-{scene.object}-None-{scene.parent or toggle}-{index}"
    return f"{game}/{trial}", data, trajectory


# A process takes as long to start as it takes to write about so many.
_GAMES_WORTH_A_WORKER = 32
_engine: AlfworldEngine | None = None  # one a process, as the engine demands


def _check_won(folder: Path, walkthrough: Sequence[str]) -> None:
    global _engine
    _engine = _engine or AlfworldEngine()
    observation = _engine.reset(folder)
    for command in walkthrough:
        observation = _engine.step(command)
        if not observation.grounded:
            raise RuntimeError(f"{folder}: {command!r} of the walkthrough is not executable")
    if not observation.success:
        raise RuntimeError(f"{folder} is not won by its walkthrough")


def _write_game(job: tuple[Path, int, int, str, int, int, bool]) -> str:
    """Makes, checks and writes one game; returns its name."""
    out, seed, index, task_type, fewest, most, closed = job
    name, data, trajectory = make_game(seed, index, task_type, fewest, most, closed=closed)
    final = out / name
    if final.is_dir():
        return name
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=out))
    try:
        (scratch / GAME_FILE).write_text(json.dumps(data))
        (scratch / TRAJECTORY_FILE).write_text(json.dumps(trajectory))
        _check_won(scratch, data["walkthrough"])  # type: ignore[arg-type]
        final.parent.mkdir(exist_ok=True)
        scratch.chmod(0o755)
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return name


def generate(
    out: str | Path,
    games: int,
    seed: int,
    *,
    task_types: Sequence[str] = TASK_TYPES,
    min_receptacles: int = 4,
    max_receptacles: int = 8,
    closed: bool = False,
    workers: int = 1,
) -> list[str]:
    """Writes `games` games into `out` and returns their names, in order of their index.

    Task types take turns.  The games do not depend on `workers`, the most processes that write
    them.

    Raises:
      UserError: if a task type is unknown or the numbers make no room.
    """
    unknown = [name for name in task_types if name not in TASK_TYPES]
    if unknown or not task_types:
        raise UserError(
            f"--task_types: {', '.join(unknown) or 'none given'}; choose from "
            + ", ".join(TASK_TYPES)
        )
    if not 4 <= min_receptacles <= max_receptacles:
        raise UserError(
            f"--min_receptacles={min_receptacles} --max_receptacles={max_receptacles}: a room "
            "needs at least 4, and the minimum cannot exceed the maximum"
        )
    if games < 1 or workers < 1:
        raise UserError("--games and --workers must be at least 1")
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    jobs = [
        (root, seed, i, task_types[i % len(task_types)], min_receptacles, max_receptacles, closed)
        for i in range(games)
    ]
    names = (make_game(*job[1:-1], closed=closed)[0] for job in jobs)
    missing = sum(not (root / name).is_dir() for name in names)
    workers = min(workers, 1 + missing // _GAMES_WORTH_A_WORKER)
    bar = {"total": games, "desc": "games", "unit": "game"}
    if workers == 1:
        return list(tqdm(map(_write_game, jobs), **bar))
    with interrupt.unseen():
        pool = multiprocessing.get_context("spawn").Pool(workers)
    with pool:
        return list(tqdm(pool.imap(_write_game, jobs, chunksize=4), **bar))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.generator("alfworld", "Make new ALFWorld games in the official layout.")
    parser.add_argument("--out", required=True, help="folder of the games; its name is the split")
    parser.add_argument("--games", type=int, required=True, help="how many games")
    parser.add_argument("--seed", type=int, required=True, help="other seeds, other games")
    parser.add_argument("--task_types", default=",".join(TASK_TYPES), help="comma-separated")
    parser.add_argument("--min_receptacles", type=int, default=4, help="fewest a room")
    parser.add_argument("--max_receptacles", type=int, default=8, help="most a room")
    parser.add_argument(
        "--closed",
        action="store_true",
        help="fill rooms with places that must be opened and may hide the object: longer searches",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, at the most")

    def work(flags: argparse.Namespace) -> str:
        names = generate(
            flags.out,
            flags.games,
            flags.seed,
            task_types=flags.task_types.split(","),
            min_receptacles=flags.min_receptacles,
            max_receptacles=flags.max_receptacles,
            closed=flags.closed,
            workers=flags.workers,
        )
        return f"games={len(names)}"

    return cli.run(parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
