import json
import subprocess
import sys
from pathlib import Path

import pytest

from spa_jax.envs.alfworld import prompt
from spa_jax.envs.alfworld.engine import AlfworldEngine, patch_grammar
from spa_jax.envs.alfworld.games import GameIndex, read_game
from spa_jax.envs.text import parse_action

# TextWorld as it comes, in a process of its own: nothing of ours is imported.
_STOCK = """
import json, sys
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs.pddl import PddlEnv
answers = []
env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
for path, commands in json.load(sys.stdin):
    env.load(path)
    states = [env.reset()] + [env.step(command)[0] for command in commands]
    answers.append([(s.feedback, s["admissible_commands"], s["won"]) for s in states])
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def engine() -> AlfworldEngine:
    return AlfworldEngine()


def _folder(games: Path, task_type: str) -> Path:
    index = GameIndex(games)
    task = next(t for t in index.tasks("train")[0] if t.task_type == task_type)
    return index.place("train", task.task)


def _walkthrough(folder: Path) -> list[str]:
    return read_game(folder).data["walkthrough"]


def _ours(text: str) -> str:
    """The stock engine's wording in ours."""
    text = prompt.shown(text.removeprefix("-= Welcome to TextWorld, ALFRED! =-"))
    return text.replace("You move the", "You put the").replace(" to the ", " in/on the ")


def _same(stock: list[list], folders: list[Path], commands: list[list[str]]) -> None:
    engine = AlfworldEngine()
    for folder, played, states in zip(folders, commands, stock, strict=True):
        observations = [engine.reset(folder)]
        admissible = [engine._state["admissible_commands"]]
        for command in played:
            observations.append(engine.step(command))
            admissible.append(engine._state["admissible_commands"])
        for observation, ours, (text, theirs, won) in zip(
            observations, admissible, states, strict=True
        ):
            assert observation.text == _ours(text)
            assert ours == sorted(prompt.to_command(command) for command in theirs)
            assert observation.success == won


def _stock(folders: list[Path], commands: list[list[str]]) -> list[list]:
    request = [
        (str(folder / "game.tw-pddl"), played)
        for folder, played in zip(folders, commands, strict=True)
    ]
    answer = subprocess.run(
        [sys.executable, "-c", _STOCK],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def test_memoised_is_the_stock_engine(games: Path) -> None:
    kinds = ["pick_two_obj_and_place", "look_at_obj_in_light", "pick_heat_then_place_in_recep"]
    folders = [_folder(games, kind) for kind in kinds]
    commands = [
        ["look", "help", "inventory", "go to nowhere 1"]
        + [c for command in _walkthrough(f) for c in (command, "look", "inventory")]
        for f in folders
    ]
    _same(_stock(folders, commands), folders, commands)


def test_wording(games: Path, engine: AlfworldEngine) -> None:
    folder = _folder(games, "pick_clean_then_place_in_recep")
    first = engine.reset(folder, task="t", prompt="short")
    assert first.text.startswith("You are in the middle of a room. Looking quickly around you,")
    assert "\n\nYour task is to: " in first.text and "UNKNOWN" not in first.text
    assert first.instruction == prompt.instruction("short")
    assert (first.task, first.task_type) == ("t", "pick_clean_then_place_in_recep")
    assert (first.reward, first.done, first.success, first.grounded) == (0.0, False, False, True)
    texts = []
    for command in _walkthrough(folder):
        observation = engine.step(command)
        texts.append(observation.text)
        assert observation.grounded and observation.instruction == ""
    assert not any("You arrive" in text for text in texts)
    assert texts[-1].startswith("You put the ") and " in/on the " in texts[-1]
    assert (observation.reward, observation.done, observation.success) == (1.0, True, True)


@pytest.mark.parametrize("wording", ["put {} in/on {}", "put {} in {}", "put {} on {}"])
def test_put_is_accepted_as_published(games: Path, engine: AlfworldEngine, wording: str) -> None:
    folder = _folder(games, "pick_and_place_simple")
    *before, move = _walkthrough(folder)
    engine.reset(folder)
    for command in before:
        engine.step(parse_action(f"Thought: on we go.\nAction: {command}"))
    held, target = move.removeprefix("move ").split(" to ")
    assert engine.step(wording.format(held, target)).success


def test_toggle_is_use(games: Path, engine: AlfworldEngine) -> None:
    folder = _folder(games, "look_at_obj_in_light")
    engine.reset(folder)
    *before, use = _walkthrough(folder)
    for command in before:
        engine.step(command)
    observation = engine.step(use.replace("use", "toggle"))
    assert observation.success and observation.text == "You turn on the desklamp 1."


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "xyzzy",
        "go to desk 99",
        "Action:",
        "Thought: hm",
        "{r}",
        "#look.feedback#",
        "\0",
        "ü" * 5000,
        "go to {desk} 1",
        "put",
        "take from",
        "Action: put in/on",
    ],
)
def test_what_cannot_be_done_is_not_grounded(
    games: Path, engine: AlfworldEngine, text: str
) -> None:
    engine.reset(_folder(games, "pick_and_place_simple"), expert=True)
    before = engine._expert.act(engine._state["admissible_commands"])
    observation = engine.step(text)
    assert (observation.text, observation.grounded) == ("Nothing happens.", False)
    assert (observation.reward, observation.done) == (0.0, False)
    assert observation.expert_action == before


def test_what_was_won_stays_won(games: Path, engine: AlfworldEngine) -> None:
    folder = _folder(games, "pick_and_place_simple")
    engine.reset(folder)
    for command in _walkthrough(folder):
        last = engine.step(command)
    assert last.reward == 1.0
    held, target = _walkthrough(folder)[-1].removeprefix("move ").split(" to ")
    undone = engine.step(f"take {held} from {target}")
    assert undone.grounded and not engine._state["won"]
    assert undone.success and undone.done and undone.reward == 0.0


def test_a_reset_starts_afresh(games: Path, engine: AlfworldEngine) -> None:
    folder = _folder(games, "pick_and_place_simple")
    first = engine.reset(folder)
    for command in _walkthrough(folder):
        engine.step(command)
    assert engine.reset(folder) == first


def test_the_task_sentence_is_cut_out_of_the_grammar() -> None:
    grammar = '"rhs": "Your task is to: put a mug in desk."\n"put {o}" "move {o} to {r}"'
    patched, task = patch_grammar(grammar)
    assert task == "put a mug in desk"
    assert '"put {o} in/on {r}"' in patched and "mug" not in patched
    assert patch_grammar(grammar.replace("a mug", "some cup"))[0] == patched
