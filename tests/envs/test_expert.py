import os
import re
from pathlib import Path

import pytest
from alfworld.gen.goal_library import gdict

from spa_jax.envs.alfworld.engine import AlfworldEngine
from spa_jax.envs.alfworld.expert import Expert, Goal, read_goal
from spa_jax.envs.alfworld.games import TASK_TYPES, GameIndex
from spa_jax.errors import UserError

_PROCESS = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "heat",
    "pick_cool_then_place_in_recep": "cool",
    "look_at_obj_in_light": "use",
}
_DESK_AND_BED = (
    "You are in the middle of a room. Looking quickly around you, you see a bed 1, a desk 1, "
    "a drawer 1, a drawer 2, and a safe 1.\n\nYour task is to: "
)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_every_template_is_read(task_type: str) -> None:
    for template in gdict[task_type]["templates"]:
        sentence = template.format(obj="mug", recep="desk", toggle="desklamp", mrecep="")
        expected = Goal(
            "mug",
            "desklamp" if task_type == "look_at_obj_in_light" else "desk",
            _PROCESS.get(task_type, ""),
            2 if task_type == "pick_two_obj_and_place" else 1,
        )
        assert read_goal(f"You see.\n\nYour task is to: {sentence}.") == expected


def test_other_sentences_are_refused() -> None:
    with pytest.raises(UserError, match="tidy up"):
        read_goal("Your task is to: tidy up.")


def _play(expert: Expert, told: list[tuple[str, str]]) -> None:
    """Checks the expert's commands against a script of (command, observation)."""
    for command, observation in told:
        assert expert.act({command}) == command
        expert.observe(command, observation)


def test_it_searches_in_order_and_goes_straight_to_what_it_knows() -> None:
    _play(
        Expert(_DESK_AND_BED + "put two mug in safe."),
        [
            ("go to bed 1", "On the bed 1, you see a book 1."),
            ("go to desk 1", "On the desk 1, you see a mug 2, a pen 1, and a mug 1."),
            ("take mug 2 from desk 1", "You pick up the mug 2 from the desk 1."),
            ("go to safe 1", "The safe 1 is closed."),
            ("open safe 1", "You open the safe 1. The safe 1 is open. In it, you see nothing."),
            ("put mug 2 in/on safe 1", "You put the mug 2 in/on the safe 1."),
            ("go to desk 1", "On the desk 1, you see a pen 1, and a mug 1."),
            ("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1."),
            ("go to safe 1", "The safe 1 is open. In it, you see a mug 2."),
            ("put mug 1 in/on safe 1", "You put the mug 1 in/on the safe 1."),
        ],
    )


def test_it_opens_what_is_closed_and_searches_on() -> None:
    _play(
        Expert(_DESK_AND_BED + "examine the mug with the desklamp."),
        [
            ("go to bed 1", "On the bed 1, you see a desklamp 1."),
            ("go to desk 1", "On the desk 1, you see nothing."),
            ("go to drawer 1", "The drawer 1 is closed."),
            (
                "open drawer 1",
                "You open the drawer 1. The drawer 1 is open. In it, you see nothing.",
            ),
            ("go to drawer 2", "The drawer 2 is closed."),
            (
                "open drawer 2",
                "You open the drawer 2. The drawer 2 is open. In it, you see a mug 1.",
            ),
            ("take mug 1 from drawer 2", "You pick up the mug 1 from the drawer 2."),
            ("go to bed 1", "On the bed 1, you see a desklamp 1."),
            ("use desklamp 1", "You turn on the desklamp 1."),
        ],
    )


def test_it_examines_what_stands_where_it_is() -> None:
    expert = Expert(_DESK_AND_BED + "put a mug in safe.")
    expert.observe("go to bed 1", "On the bed 1, you see nothing.")
    assert expert.act({"look"}) == "examine desk 1"
    expert.observe("examine desk 1", "On the desk 1, you see a mug 1.")
    assert expert.act({"look"}) == "take mug 1 from desk 1"


def test_it_wins_generated_games_by_searching(games: Path) -> None:
    index, engine = GameIndex(games), AlfworldEngine()
    opened = 0
    for task in index.tasks("train")[0]:
        observation = engine.reset(index.place("train", task.task), expert=True)
        shown, looked_into, done = observation.text, [], False
        for _ in range(40):
            command = observation.expert_action
            assert command in observation.admissible and "help" not in observation.admissible
            # Every receptacle and object that it names has been shown.
            assert all(name in shown for name in re.findall(r"\w+ \d+", command)), command
            if command.startswith("open "):
                looked_into.append(command)
            observation = engine.step(command)
            assert observation.grounded, command
            shown += observation.text
            done = observation.done
            if done:
                break
        assert done and observation.expert_action == "", task.task
        unasked = engine.reset(index.place("train", task.task))
        assert observation.admissible == unasked.admissible == ()
        assert len(looked_into) == len(set(looked_into))
        opened += len(looked_into)
    assert opened


def test_searching_never_returns(games: Path) -> None:
    index, engine = GameIndex(games), AlfworldEngine()
    for task in index.tasks("train")[0]:
        observation = engine.reset(index.place("train", task.task), expert=True)
        visited: list[str] = []
        while not observation.expert_action.startswith("take "):
            if observation.expert_action.startswith("go to "):
                visited.append(observation.expert_action)
            observation = engine.step(observation.expert_action)
        assert len(visited) == len(set(visited))


@pytest.mark.slow
@pytest.mark.skipif("SPA_JAX_ALFWORLD_DATA" not in os.environ, reason="needs the official games")
def test_it_wins_real_games() -> None:
    index, engine = GameIndex(os.environ["SPA_JAX_ALFWORLD_DATA"]), AlfworldEngine()
    tasks = index.tasks("valid_seen")[0]
    won = 0
    for task in tasks:
        observation = engine.reset(index.place("valid_seen", task.task), expert=True)
        for _ in range(50):
            observation = engine.step(observation.expert_action)
            if observation.done:
                break
        won += observation.success
    assert won >= 0.95 * len(tasks)
