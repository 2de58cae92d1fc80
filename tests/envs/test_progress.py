"""ALFWorld's subgoals: on generated games of all six types, and on rooms written by hand."""

import itertools
import json
import os
import random
from pathlib import Path

import pytest
from alfworld.gen.goal_library import gdict
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

from spa_jax.envs.alfworld import generate
from spa_jax.envs.alfworld.engine import AlfworldEngine
from spa_jax.envs.alfworld.games import TASK_TYPES, GameIndex, read_game
from spa_jax.envs.alfworld.progress import Subgoals, read_subgoals

_NUMBER = {
    "pick_and_place_simple": 3,  # found, taken, placed
    "look_at_obj_in_light": 3,  # found, taken, lamp used
    "pick_clean_then_place_in_recep": 4,
    "pick_heat_then_place_in_recep": 4,
    "pick_cool_then_place_in_recep": 4,
    "pick_two_obj_and_place": 6,
}
_EXPECTED = {
    "pick_and_place_simple": Subgoals("mugtype", receptacle="desktype"),
    "look_at_obj_in_light": Subgoals("mugtype", lamp="desklamptype"),
    "pick_clean_then_place_in_recep": Subgoals(
        "mugtype", able="cleanable", process="isclean", receptacle="desktype"
    ),
    "pick_heat_then_place_in_recep": Subgoals(
        "mugtype", able="heatable", process="ishot", receptacle="desktype"
    ),
    "pick_cool_then_place_in_recep": Subgoals(
        "mugtype", able="coolable", process="iscool", receptacle="desktype"
    ),
    "pick_two_obj_and_place": Subgoals("mugtype", count=2, receptacle="desktype"),
}


@pytest.fixture(scope="module")
def engine() -> AlfworldEngine:
    return AlfworldEngine()


def _problem(task_type: str) -> str:
    goal = gdict[task_type]["pddl"].replace("#", "-")
    return "(define (problem p)\n(:init\n)\n" + goal.format(
        obj="Mug", recep="Desk", toggle="DeskLamp"
    )


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_kind_of_goal_is_read(task_type: str) -> None:
    found = read_subgoals(_problem(task_type))
    assert found == _EXPECTED[task_type] and found.number == _NUMBER[task_type]


@pytest.mark.parametrize(
    "goal",
    [
        "(:goal (and (exists (?o - object) (and (isSliced ?o) (objectType ?o MugType)))))",
        "(:goal (forall (?o - object) (objectType ?o MugType)))",
        "(:goal (and (not (isClean ?o)) (objectType ?o MugType) (receptacleType ?r DeskType)))",
        "(:goal (and (objectType ?o MugType) (objectType ?p PenType) (receptacleType ?r BedType)))",
        "(:goal (and (objectType ?o MugType)))",
        "(:goal)",
        "",
    ],
)
def test_other_goals_are_not_guessed(goal: str) -> None:
    assert read_subgoals(goal) is None


def test_a_game_with_another_goal_is_played_without(games: Path, engine, tmp_path: Path) -> None:
    folder = _folder(games, "pick_and_place_simple")
    data = json.loads((folder / "game.tw-pddl").read_text())
    data["pddl_problem"] = data["pddl_problem"].replace("(inReceptacle ?o ?r)", "(checked ?r)")
    (tmp_path / "traj_data.json").write_text((folder / "traj_data.json").read_text())
    (tmp_path / "game.tw-pddl").write_text(json.dumps(data))
    assert engine.reset(tmp_path).progress is None
    assert engine.step("look").progress is None


def _folder(games: Path, task_type: str) -> Path:
    index = GameIndex(games)
    task = next(t for t in index.tasks("train")[0] if t.task_type == task_type)
    return index.place("train", task.task)


def test_the_experts_episodes_rise_by_one_subgoal_to_the_win(games: Path, engine) -> None:
    """From 0 to 1, never down; of two objects that lie together both are found at once."""
    index = GameIndex(games)
    seen = set()
    for task in index.tasks("train")[0]:
        now = engine.reset(index.place("train", task.task), expert=True)
        told = [now.progress]
        while not now.done:
            now = engine.step(now.expert_action)
            told.append(now.progress)
            assert (now.progress == 1) == now.success == engine._pddl._pddl_state.check_goal()
        rises = [round(_NUMBER[task.task_type] * (b - a)) for a, b in itertools.pairwise(told)]
        assert (told[0], told[-1]) == (0.0, 1.0) and min(rises) == 0
        assert sum(rises) == _NUMBER[task.task_type]
        assert max(rises) == 1 or task.task_type == "pick_two_obj_and_place"
        seen.add((task.task_type, max(rises)))
    assert seen >= {(kind, 1) for kind in TASK_TYPES if kind != "pick_two_obj_and_place"}


def test_it_is_one_exactly_when_the_goal_holds_whatever_is_played(games: Path, engine) -> None:
    """Random commands between the expert's: asked of the state, also after the win."""
    index, draw = GameIndex(games), random.Random(3)
    fell = held = 0
    for task in index.tasks("train")[0]:
        now = engine.reset(index.place("train", task.task), expert=True)
        for _ in range(60):
            before = engine._progress.share()
            wild = draw.random() < 0.5 or now.done
            commands = [c for c in engine._state["admissible_commands"] if "look" not in c]
            now = engine.step(draw.choice(commands) if wild else now.expert_action)
            share = engine._progress.share()
            assert (share == 1) == engine._pddl._pddl_state.check_goal()
            assert now.progress == (1.0 if now.success else share)
            fell += share < before
            held += share == 1
    assert fell > 5 and held > 5


def _room(folder: Path, task_type: str, **places: str) -> Path:
    """A game with a mug that is wanted (at a desk), in a room with two desks.

    Args:
      folder: where it is written.
      task_type: what to do with the mug.
      places: a thing -> where it lies, such as mug_1="sidetable 1".
    """
    kinds = ("Desk", "Desk", "Fridge", "Microwave", "SideTable", "SinkBasin")
    receptacles = generate._number(kinds)
    by_name = {receptacle.name: receptacle for receptacle in receptacles}
    types = {"mug": "Mug", "desklamp": "DeskLamp", "pen": "Pen"}
    things = {
        generate._Thing(types[name.split("_")[0]], int(name[-1])): by_name[place]
        for name, place in places.items()
    }
    scene = generate._Scene(task_type, "Bedroom", "Mug", "Desk", receptacles, things)
    data = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text(),
        "pddl_problem": generate._problem(scene, "by_hand"),
        "solvable": True,
        "walkthrough": ["look"],
    }
    (folder / "game.tw-pddl").write_text(json.dumps(data))
    (folder / "traj_data.json").write_text(json.dumps({"task_type": task_type}))
    return folder


def _reached(engine: AlfworldEngine, folder: Path, script: str, number: int) -> None:
    """Plays lines "command: subgoals that are reached after it"; each must be executed."""
    assert engine.reset(folder).progress == 0
    for line in filter(None, map(str.strip, script.splitlines())):
        command, _, reached = line.partition(": ")
        now = engine.step(command)
        assert now.grounded, command
        assert now.progress == int(reached) / number, line


def test_what_is_put_elsewhere_counts_no_more(engine, tmp_path: Path) -> None:
    folder = _room(tmp_path, "pick_and_place_simple", mug_1="sidetable 1", pen_1="sidetable 1")
    script = """
        go to desk 1: 0
        go to sidetable 1: 1
        take pen 1 from sidetable 1: 1
        go to desk 1: 1
        put pen 1 in/on desk 1: 1
        go to sidetable 1: 1
        take mug 1 from sidetable 1: 2
        go to sinkbasin 1: 2
        put mug 1 in/on sinkbasin 1: 1
        take mug 1 from sinkbasin 1: 2
        go to desk 2: 2
        put mug 1 in/on desk 2: 3
        take mug 1 from desk 2: 3
        """  # the last: what was won stays won
    _reached(engine, folder, script, 3)


@pytest.mark.parametrize(
    ("kind", "process", "undo"),
    [
        ("clean", "clean mug 1 with sinkbasin 1", None),
        ("heat", "heat mug 1 with microwave 1", "cool mug 1 with fridge 1"),
        ("cool", "cool mug 1 with fridge 1", "heat mug 1 with microwave 1"),
    ],
)
def test_what_is_not_processed_is_not_placed(engine, tmp_path, kind, process, undo) -> None:
    folder = _room(tmp_path, f"pick_{kind}_then_place_in_recep", mug_1="desk 1")
    script = f"""
        go to desk 1: 1
        take mug 1 from desk 1: 2
        put mug 1 in/on desk 1: 1
        take mug 1 from desk 1: 2
        go to {process.split(" with ")[1]}: 2
        {process}: 3
        """
    if undo:
        there, back = (command.split(" with ")[1] for command in (undo, process))
        script += f"""
        go to {there}: 3
        {undo}: 2
        go to {back}: 2
        {process}: 3
        """
    script += """
        go to sidetable 1: 3
        put mug 1 in/on sidetable 1: 2
        take mug 1 from sidetable 1: 3
        go to desk 2: 3
        put mug 1 in/on desk 2: 4
        """
    _reached(engine, folder, script, 4)


def test_two_objects_meet_in_one_receptacle(engine, tmp_path: Path) -> None:
    places = {"mug_1": "sidetable 1", "mug_2": "sinkbasin 1", "mug_3": "sidetable 1"}
    folder = _room(tmp_path, "pick_two_obj_and_place", **places)
    script = """
        go to sinkbasin 1: 1
        go to sidetable 1: 2
        take mug 3 from sidetable 1: 3
        go to desk 1: 3
        put mug 3 in/on desk 1: 4
        go to sinkbasin 1: 4
        take mug 2 from sinkbasin 1: 5
        go to desk 2: 5
        put mug 2 in/on desk 2: 4
        take mug 2 from desk 2: 5
        go to sidetable 1: 5
        put mug 2 in/on sidetable 1: 4
        take mug 1 from sidetable 1: 5
        go to desk 1: 5
        put mug 1 in/on desk 1: 6
        """
    _reached(engine, folder, script, 6)


def test_one_of_two_lies_there_already(engine, tmp_path: Path) -> None:
    """Placed, and so found and taken, before anybody has looked."""
    places = {"mug_1": "desk 1", "mug_2": "sidetable 1"}
    assert engine.reset(_room(tmp_path, "pick_two_obj_and_place", **places)).progress == 3 / 6
    assert engine.step("go to desk 1").progress == 3 / 6
    assert engine.step("take mug 1 from desk 1").progress == 2 / 6
    assert engine.step("put mug 1 in/on desk 1").progress == 3 / 6


def test_a_lamp_is_used_where_the_agent_is(engine, tmp_path: Path) -> None:
    places = {"mug_1": "sidetable 1", "desklamp_1": "desk 1"}
    folder = _room(tmp_path, "look_at_obj_in_light", **places)
    script = """
        go to desk 1: 0
        use desklamp 1: 1
        go to sidetable 1: 1
        take mug 1 from sidetable 1: 2
        put mug 1 in/on sidetable 1: 1
        take mug 1 from sidetable 1: 2
        go to desk 1: 3
        go to sidetable 1: 3
        """  # the lamp is lit, but it is elsewhere, until the mug is brought; then it is won
    _reached(engine, folder, script, 3)


@pytest.mark.parametrize("text", ["", "xyzzy", "go to bed 1", "take mug 1 from desk 2", "mug 1"])
def test_what_cannot_be_executed_changes_nothing(engine, tmp_path: Path, text: str) -> None:
    """Also where the policy names an object that it was not shown."""
    engine.reset(_room(tmp_path, "pick_and_place_simple", mug_1="sidetable 1"))
    for command, told in (("look", 0.0), ("go to sidetable 1", 1 / 3)):
        assert engine.step(command).progress == told
        now = engine.step(text)
        assert (now.grounded, now.progress) == (False, told)


def test_no_text_tells_it(games: Path, engine) -> None:
    """A policy reads the same texts with and without it."""
    folder = _folder(games, "pick_two_obj_and_place")
    played = read_game(folder).data["walkthrough"]

    def texts() -> list[str]:
        now = [engine.reset(folder), *map(engine.step, played)]
        return [text for one in now for text in (one.text, one.instruction, one.expert_action)]

    told = texts()
    watch, engine._watch = engine._watch, lambda problem: None
    try:
        assert texts() == told and engine.step("look").progress is None
    finally:
        engine._watch = watch
    assert not any("progress" in text or "0.16" in text for text in told)


@pytest.mark.slow
@pytest.mark.skipif("SPA_JAX_ALFWORLD_DATA" not in os.environ, reason="needs the official games")
def test_official_games() -> None:
    index, engine = GameIndex(os.environ["SPA_JAX_ALFWORLD_DATA"]), AlfworldEngine()
    for task in index.tasks("valid_seen")[0][::3]:
        now = engine.reset(index.place("valid_seen", task.task), expert=True)
        for _ in range(50):
            now = engine.step(now.expert_action)
            assert (now.progress == 1) == now.success, task.task
            if now.done:
                break
