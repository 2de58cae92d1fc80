import collections
import json
from pathlib import Path

import pytest
from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

from spa_jax.envs.alfworld import generate as generator
from spa_jax.envs.alfworld.engine import AlfworldEngine
from spa_jax.envs.alfworld.games import TASK_TYPES, GameIndex, read_game
from spa_jax.errors import UserError


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_the_same_seed_makes_the_same_games_with_any_number_of_workers(
    games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "_GAMES_WORTH_A_WORKER", 4)
    names = generator.generate(tmp_path / "two", games=12, seed=7, workers=2)
    assert _files(tmp_path / "two") == _files(games / "train")
    assert [int(name.rpartition("_")[2]) for name in names] == list(range(12))


def test_other_seeds_make_other_rooms(games: Path) -> None:
    layouts = {task.layout for task in GameIndex(games).tasks("train")[0]}
    others = {generator.make_game(8, i, TASK_TYPES[i % 6], 4, 8)[2]["layout"] for i in range(12)}
    assert len(others) == 12 and not layouts & others


def test_every_type_is_won_by_its_walkthrough(games: Path) -> None:
    index, engine = GameIndex(games), AlfworldEngine()
    tasks = index.tasks("train")[0]
    assert collections.Counter(task.task_type for task in tasks) == dict.fromkeys(TASK_TYPES, 2)
    for task in tasks:
        folder = index.place("train", task.task)
        observation = engine.reset(folder)
        for command in read_game(folder).data["walkthrough"]:
            assert not observation.done
            observation = engine.step(command)
        assert observation.success


def test_rooms_have_the_size_that_was_asked_for_and_hide_things() -> None:
    sizes, hidden, objects = collections.Counter(), 0, []
    for index in range(60):
        task_type = TASK_TYPES[index % 6]
        _, data, _ = generator.make_game(3, index, task_type, 4, 6)
        problem = str(data["pddl_problem"])
        sizes[problem.count("(receptacleType ") - problem.count("(receptacleType ?r")] += 1
        hidden += any(command.startswith("open ") for command in data["walkthrough"])
        objects.append(problem.count("(pickupable "))
    assert set(sizes) == {4, 5, 6}
    assert 15 < hidden < 60
    assert min(objects) >= 2 and max(objects) <= 8


def test_closed_rooms_are_filled_with_places_that_must_be_opened(tmp_path: Path) -> None:
    most = {}
    for closed in (False, True):
        made = [
            generator.make_game(3, i, "pick_two_obj_and_place", 14, 14, closed=closed)[1]
            for i in range(12)
        ]
        opened = [str(data["pddl_problem"]).count("(openable ") for data in made]
        most[closed] = sum(opened) / len(opened)
    assert most[True] > most[False] + 3  # of 14 places
    names = generator.generate(
        tmp_path,
        games=2,
        seed=3,
        task_types=["pick_two_obj_and_place"],
        min_receptacles=24,
        max_receptacles=24,
        closed=True,
    )  # which wins each, though more than nine places are of one type
    assert len(names) == 2


def test_the_official_loader_reads_them(games: Path) -> None:
    config = {
        "env": {"goal_desc_human_anns_prob": 0.0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"data_path": str(games / "train"), "num_train_games": -1},
    }
    assert len(AlfredTWEnv(config, train_eval="train").game_files) == 12


def test_traj_data_says_where_a_game_comes_from(games: Path) -> None:
    for path in (games / "train").glob("*/*/traj_data.json"):
        trajectory = json.loads(path.read_text())
        assert trajectory["generator_seed"] == 7
        assert trajectory["layout"] == read_game(path.parent).layout
        assert trajectory["pddl_params"]["object_target"] in path.parts[-3]


def test_a_run_that_was_stopped_goes_on(games: Path, tmp_path: Path) -> None:
    generator.generate(tmp_path, games=3, seed=7)
    kept = next(tmp_path.glob("*/*/game.tw-pddl"))
    before = kept.stat().st_mtime_ns
    generator.generate(tmp_path, games=12, seed=7)
    assert kept.stat().st_mtime_ns == before
    assert _files(tmp_path) == _files(games / "train")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, data, trajectory = generator.make_game(7, 0, TASK_TYPES[0], 4, 8)
    broken = data | {"walkthrough": ["look"]}
    monkeypatch.setattr(generator, "make_game", lambda *_, **__: (name, broken, trajectory))
    with pytest.raises(RuntimeError, match="not won"):
        generator.generate(tmp_path, games=1, seed=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task_types": ["juggle"]}, "--task_types: juggle"),
        ({"min_receptacles": 2}, "--min_receptacles=2"),
        ({"min_receptacles": 7, "max_receptacles": 5}, "cannot exceed"),
        ({"games": 0}, "--games"),
    ],
)
def test_wrong_flags_are_refused(tmp_path: Path, flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generator.generate(**{"out": tmp_path, "games": 1, "seed": 1} | flags)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "train")
    flags = ["--out", out, "--games", "1", "--seed", "5"]
    assert generator.main([*flags, "--task_types", "look_at_obj_in_light"]) == 0
    assert "RESULT games=1 " in capsys.readouterr().out
    assert generator.main([*flags, "--task_types", "juggle"]) == 2
    assert "juggle" in capsys.readouterr().err
