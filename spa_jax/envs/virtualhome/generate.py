"""Makes VirtualHome tasks in homes of our own: no download, no corpus.

    python -m spa_jax.envs.virtualhome.generate --out=DIR/train --tasks=100 --seed=1

Each has a home drawn from the seed (`scenes`), one of six kinds of activity, and a program that
solves it, which is its expert.  Every task is solved in the real simulator before it is written.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import tqdm

from spa_jax.envs import cli
from spa_jax.envs.virtualhome.making import LeftOut, Made, check_solved, make_task
from spa_jax.envs.virtualhome.scenes import THINGS, Home, draw_home
from spa_jax.envs.virtualhome.simulator import CHARACTER
from spa_jax.envs.virtualhome.tasks import write_task
from spa_jax.errors import UserError

# A program's step before its objects have ids: the action and the class names.
_Line = tuple[str, ...]
# A kind of activity: draws what it is about; gives the sentence and the program.
_Kind = Callable[[random.Random, Home], tuple[str, list[_Line]]]


def _words(name: str) -> str:
    return name.replace("_", " ")


class _Walker:
    """Writes a program: walks to a room when it has to be entered, and to what is used."""

    def __init__(self, home: Home):
        self.home = home
        self.lines: list[_Line] = []
        self._room = home.room[CHARACTER]
        self._at = ""

    def go(self, name: str) -> None:
        """Walks to a piece of furniture."""
        room = self.home.room[name]
        if room != self._room:
            self.lines.append(("WALK", room))
        if name != self._at:
            self.lines.append(("WALK", name))
        self._room, self._at = room, name

    def fetch(self, thing: str) -> None:
        """Takes a thing from where it is; opens and closes what it is in."""
        place = self.home.place[thing]
        closed = self.home.has(place, "CAN_OPEN")
        self.go(place)
        self.lines += [("OPEN", place)] if closed else []
        self.lines += [("FIND", thing), ("GRAB", thing)]
        self.lines += [("CLOSE", place)] if closed else []

    def switch_on(self, device: str) -> None:
        """Plugs a device in, if it is not, and switches it on."""
        self.go(device)
        if self.home.has(device, "PLUGGED_OUT"):
            self.lines.append(("PLUGIN", device))
        self.lines.append(("SWITCHON", device))


def _elsewhere(home: Home, thing: str, places: Sequence[str]) -> list[str]:
    return [place for place in places if place != home.place[thing]]


def _bring(rng: random.Random, home: Home) -> tuple[str, list[_Line]]:
    thing = rng.choice(list(home.place))
    target = rng.choice(_elsewhere(home, thing, home.having("SURFACES")))
    walker = _Walker(home)
    walker.fetch(thing)
    walker.go(target)
    program = [*walker.lines, ("PUTBACK", thing, target)]
    return f"Put the {_words(thing)} on the {_words(target)}.", program


def _put_away(rng: random.Random, home: Home) -> tuple[str, list[_Line]]:
    thing = rng.choice(list(home.place))
    target = rng.choice(_elsewhere(home, thing, home.having("CAN_OPEN")))
    walker = _Walker(home)
    walker.fetch(thing)
    walker.go(target)
    program = [*walker.lines, ("OPEN", target), ("PUTIN", thing, target), ("CLOSE", target)]
    return f"Put the {_words(thing)} in the {_words(target)} and close it.", program


def _turn_on(rng: random.Random, home: Home) -> tuple[str, list[_Line]]:
    device = rng.choice(home.having("HAS_SWITCH", "HAS_PLUG"))
    walker = _Walker(home)
    walker.switch_on(device)
    return f"Turn on the {_words(device)}.", walker.lines


def _relax(rng: random.Random, home: Home) -> tuple[str, list[_Line]]:
    thing = rng.choice(list(home.place))
    seat = rng.choice(home.having("SITTABLE"))
    lying = home.has(seat, "LIEABLE") and rng.random() < 0.5
    walker = _Walker(home)
    walker.fetch(thing)
    walker.go(seat)
    how, action = ("Lie", "LIE") if lying else ("Sit", "SIT")
    program = [*walker.lines, (action, seat)]
    return f"{how} down on the {_words(seat)} with the {_words(thing)}.", program


def _run_machine(rng: random.Random, home: Home) -> tuple[str, list[_Line]]:
    machine = rng.choice(home.having("CAN_OPEN", "HAS_SWITCH"))
    thing = rng.choice([t for t in home.place if home.place[t] != machine])
    walker = _Walker(home)
    walker.fetch(thing)
    walker.go(machine)
    walker.lines += [("OPEN", machine), ("PUTIN", thing, machine), ("CLOSE", machine)]
    walker.switch_on(machine)
    return f"Put the {_words(thing)} in the {_words(machine)} and turn it on.", walker.lines


def _bring_two(rng: random.Random, home: Home) -> tuple[str, list[_Line]]:
    target = rng.choice(home.having("SURFACES"))
    first, second = rng.sample([t for t in home.place if home.place[t] != target], 2)
    walker = _Walker(home)
    for thing in (first, second):
        walker.fetch(thing)
        walker.go(target)
        walker.lines.append(("PUTBACK", thing, target))
    sentence = f"Put the {_words(first)} and the {_words(second)} on the {_words(target)}."
    return sentence, walker.lines


_KINDS: dict[str, _Kind] = {
    "Bring": _bring,
    "Put away": _put_away,
    "Turn on": _turn_on,
    "Relax": _relax,
    "Run machine": _run_machine,
    "Bring two": _bring_two,
}
KINDS = tuple(_KINDS)


def make(seed: int, index: int, kind: str, rooms: int, things: int) -> Made:
    """The task of (seed, index); its program has solved it."""
    rng = random.Random(f"{seed}/{index}/{kind}/{rooms}/{things}")
    while True:
        home = draw_home(rng, rooms, things)
        try:
            sentence, lines = _KINDS[kind](rng, home)
        except (IndexError, ValueError):
            continue  # nothing to choose from: this home has no such furniture
        try:
            return _solved(seed, kind, home, sentence, lines)
        except LeftOut:
            continue  # what lies on a couch may leave no room to lie down


def _solved(seed: int, kind: str, home: Home, sentence: str, lines: Sequence[_Line]) -> Made:
    """The task of a program that solves it; raises LeftOut if it does not."""
    steps = [(action, [(name, home.ids[name]) for name in names]) for action, *names in lines]
    used = {name: home.ids[name] for _, *names in lines for name in names}
    made = make_task(
        title=kind,
        description=sentence,
        nodes=home.nodes,
        edges=home.edges,
        steps=steps,
        objects={CHARACTER: home.ids[CHARACTER]} | used,
        scene="generated",
        seed=seed,
    )
    check_solved(made)
    return made


def generate(
    out: str | Path,
    tasks: int,
    seed: int,
    *,
    kinds: Sequence[str] = KINDS,
    rooms: int = 3,
    things: int = 8,
) -> list[str]:
    """Writes `tasks` tasks into `out` and returns their names, in order of their index.

    Kinds take turns.  A task that is there already stays.

    Raises:
      UserError: if a kind is unknown or the numbers make no home.
    """
    unknown = [name for name in kinds if name not in KINDS]
    if unknown or not kinds:
        raise UserError(f"--kinds: {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    if not 2 <= rooms <= 5 or not 4 <= things <= len(THINGS):
        raise UserError(
            f"--rooms={rooms} --things={things}: a home has 2 to 5 rooms and 4 to {len(THINGS)} "
            "things"
        )
    if tasks < 1:
        raise UserError(f"--tasks={tasks}: at least 1")
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    names = []
    for index in tqdm.trange(tasks, desc="tasks", unit="task"):
        kind = kinds[index % len(kinds)]
        names.append(f"{kind.lower().replace(' ', '_')}-S{seed}-{index:06d}")
        if not (root / names[-1]).is_dir():
            _write(root, names[-1], make(seed, index, kind, rooms, things))
    return names


def _write(root: Path, name: str, made: Made) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    try:
        write_task(scratch / name, made.task, made.graph)
        (scratch / name).rename(root / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.generator("virtualhome", "Make VirtualHome tasks in homes of our own.")
    parser.add_argument("--out", required=True, help="folder of the tasks; its name is the split")
    parser.add_argument("--tasks", type=int, required=True, help="how many tasks")
    parser.add_argument("--seed", type=int, required=True, help="other seeds, other tasks")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--rooms", type=int, default=3, help="rooms of a home")
    parser.add_argument("--things", type=int, default=8, help="things that lie about")

    def work(flags: argparse.Namespace) -> str:
        names = generate(
            flags.out,
            flags.tasks,
            flags.seed,
            kinds=flags.kinds.split(","),
            rooms=flags.rooms,
            things=flags.things,
        )
        return f"tasks={len(names)}"

    return cli.run(parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
