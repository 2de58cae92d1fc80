import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spa_jax.envs.virtualhome.corpus import Corpus, Program
from spa_jax.envs.virtualhome.engine import VirtualhomeEngine
from spa_jax.envs.virtualhome.making import LeftOut, check_solved, check_worth
from spa_jax.envs.virtualhome.prepare import prepare, split_of
from spa_jax.envs.virtualhome.tasks import TaskIndex
from spa_jax.errors import UserError


@pytest.fixture(scope="module")
def corpus(corpus_folder: Path) -> Corpus:
    return Corpus(corpus_folder)


def _program(corpus: Corpus, key: str) -> Program:
    return next(program for program in corpus.programs() if program.key == key)


def test_programs_are_read(corpus: Corpus) -> None:
    assert corpus.scenes == ["scene1", "scene2"]
    programs = corpus.programs()
    assert [program.key for program in programs] == sorted(program.key for program in programs)
    assert len(programs) == 6
    (tv,) = corpus.find("file1_1", "Watch TV", "Switch on the set and watch.")
    assert tv.lines[2] == "[SwitchOn] <television> (1)"
    # A name alone is ambiguous.
    assert [p.source for p in corpus.find("file2_1", "Rest", "Lie down.")] == ["more"]
    assert corpus.find("file2_1", "Rest", "Sit down.") == []


def test_goal_objects_and_program(corpus: Corpus) -> None:
    made = corpus.prepare(_program(corpus, "ours/file1_1"), "scene1", seed=0)
    nodes = {node["class_name"]: node for node in made.graph["nodes"]}
    # "tv" of the program is the scene's television.
    assert made.task.objects["television"] == nodes["television"]["id"]
    assert set(nodes["television"]["states"]) == {"CLEAN", "OFF", "PLUGGED_IN"}
    assert made.task.program[1:3] == ("walk to television", "switch on television")
    room, start = nodes["living_room"]["id"], nodes["character"]["id"]
    assert made.task.goal.states == (
        (nodes["television"]["id"], "television", ("CLEAN", "ON", "PLUGGED_IN")),
    )
    assert made.task.goal.present == ((start, "INSIDE", room),)
    assert len(made.task.goal.absent) == 1 and made.task.goal.absent[0][2] != room
    check_worth(made)
    assert check_solved(made) == 3  # turning to it and watching change nothing
    with pytest.raises(LeftOut, match="longer than 2 steps"):
        check_solved(made, max_steps=2)


def test_what_a_scene_lacks_is_added(corpus: Corpus) -> None:
    made = corpus.prepare(_program(corpus, "ours/file2_1"), "scene2", seed=0)
    added = {n["id"]: n["class_name"] for n in made.graph["nodes"] if n["id"] >= 1000}
    assert "cup" in added.values()
    cupboard = made.task.objects["cupboard"]
    cup = made.task.objects["cup"]
    assert (cup, "INSIDE", cupboard) in made.graph["edges"]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("more/file4_1", "does not know"),
        ("more/file5_1", "cannot be executed"),
        ("more/file3_1", "only to be in a room"),
    ],
)
def test_why_programs_are_left_out(corpus: Corpus, key: str, reason: str) -> None:
    with pytest.raises(LeftOut, match=reason):
        check_worth(corpus.prepare(_program(corpus, key), "scene1", seed=0))


def test_seeds_draw_the_first_room(corpus: Corpus) -> None:
    program = _program(corpus, "ours/file1_1")
    goals = {corpus.prepare(program, "scene1", seed=seed).task.goal for seed in range(8)}
    assert len(goals) > 1
    assert corpus.prepare(program, "scene1", 3) == corpus.prepare(program, "scene1", 3)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        Corpus(tmp_path / "nowhere")
    (tmp_path / "withoutconds").mkdir()
    with pytest.raises(UserError, match="lacks the resources: no resources/properties_data.json"):
        Corpus(tmp_path)


def test_prepared_tasks_are_solved_by_their_programs(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "tasks"
    prepared = prepare(corpus, out, seed=0, valid=0.2, heldout=0.2, scenes=2)
    assert prepared.programs == 6
    assert sum(prepared.tasks.values()) + sum(prepared.left_out.values()) == 12
    index, engine = TaskIndex(out), VirtualhomeEngine()
    found = 0
    for split in index.splits():
        for task in index.tasks(split)[0]:
            observation = engine.reset(index.place(split, task.task), expert=True)
            while not observation.done:
                observation = engine.step(observation.expert_action)
            assert observation.success
            found += 1
    assert found == sum(prepared.tasks.values()) >= 4
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="exists already"):
        prepare(corpus, out, seed=0, valid=0.1, heldout=0.1, scenes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid": 0.6, "heldout": 0.4}, "--valid"),
        ({"scenes": 3}, "--scenes=3: there are 2"),
        ({"programs": 0}, "--programs=0"),
    ],
)
def test_numbers_that_make_no_sense(
    corpus: Corpus, tmp_path: Path, arguments: dict[str, float], message: str
) -> None:
    usual = {"seed": 0, "valid": 0.1, "heldout": 0.1, "scenes": 1}
    with pytest.raises(UserError, match=message):
        prepare(corpus, tmp_path / "tasks", **(usual | arguments))  # type: ignore[arg-type]


def test_equal_programs_share_a_split() -> None:
    def program(number: int, *lines: str) -> Program:
        return Program("source", f"file{number}_1", "t", "d", lines, ())

    splits = {split_of(program(n, "[Walk] <bed> (1)"), 0, 0.3, 0.3) for n in range(20)}
    assert len(splits) == 1
    many = [split_of(program(n, f"[Walk] <bed> ({n})"), 0, 0.3, 0.2) for n in range(500)]
    assert abs(many.count("valid") / 500 - 0.3) < 0.07
    assert abs(many.count("heldout") / 500 - 0.2) < 0.07


# Makes tasks both ways, plays them with commands that are executable and others, and prints a
# hash of everything.
_REPOSITORY = Path(__file__).parents[3]

_PLAY = """
import hashlib, pathlib, random, sys
from spa_jax.envs.virtualhome.corpus import Corpus
from spa_jax.envs.virtualhome.engine import VirtualhomeEngine
from spa_jax.envs.virtualhome.generate import generate
from spa_jax.envs.virtualhome.prepare import prepare
from spa_jax.envs.virtualhome.tasks import TaskIndex, read_task
data, out = map(pathlib.Path, sys.argv[1:])
prepare(Corpus(data), out, seed=1, valid=0.2, heldout=0.2, scenes=2)
generate(out / "own", tasks=6, seed=1)
digest = hashlib.sha256()
for file in sorted(out.glob("*/*/*")):
    digest.update(str(file.relative_to(out)).encode() + file.read_bytes())
engine, index = VirtualhomeEngine(), TaskIndex(out)
for split in index.splits():
    for task in index.tasks(split)[0]:
        place = index.place(split, task.task)
        home, graph = read_task(place)
        names = sorted({n["class_name"].replace("_", " ") for n in graph["nodes"]})
        rng = random.Random(task.task)
        commands = [c for step in home.program for c in (
            step, f"walk to {rng.choice(names)}", f"grab {rng.choice(names)}",
            f"open {rng.choice(names)}", f"find {rng.choice(names)}")]
        for played in (home.program, commands):
            for observation in [engine.reset(place, expert=True), *map(engine.step, played)]:
                digest.update(repr(observation).encode())
print(digest.hexdigest())
"""


def test_everything_is_the_same_under_any_hash_seed(corpus_folder: Path, tmp_path: Path) -> None:
    digests = set()
    for seed in ("0", "1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", _PLAY, str(corpus_folder), str(tmp_path / f"hash_{seed}")],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(answer.stdout)
    assert len(digests) == 1
    assert digests != {hashlib.sha256().hexdigest() + "\n"}


def test_the_program_prepares_and_says_what_it_left_out(
    corpus_folder: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments.prepare_virtualhome",
        f"--data={corpus_folder}",
        f"--out={tmp_path / 'tasks'}",
        "--seed=2",
        "--scenes=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_REPOSITORY)
    assert done.returncode == 0, done.stderr
    *lines, result = done.stdout.splitlines()
    assert "left out 2: the goal is only to be in a room" in done.stdout
    assert result.startswith("RESULT tasks=") and " left_out=" in result
    tasks = sorted((tmp_path / "tasks").glob("*/*/task.json"))
    assert f"RESULT tasks={len(tasks)} " in result and len(lines) >= 3
    assert json.loads(tasks[0].read_text())["program"]
    again = subprocess.run(command, capture_output=True, text=True, cwd=_REPOSITORY)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert "exists already" in again.stderr
