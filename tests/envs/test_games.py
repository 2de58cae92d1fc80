import json
import os
import shutil
from pathlib import Path

import pytest

from spa_jax.envs.alfworld.games import GameIndex, layout_hash, read_game
from spa_jax.errors import UserError


@pytest.fixture
def copy(games: Path, tmp_path: Path) -> Path:
    shutil.copytree(games, tmp_path / "data")
    return tmp_path / "data"


def _trial(root: Path) -> Path:
    return sorted((root / "train").glob("*/*"))[0]


def test_tasks_are_sorted_and_complete(games: Path) -> None:
    tasks, problems = GameIndex(games).tasks("train")
    assert not problems
    assert len(tasks) == 12 == len({task.task for task in tasks})
    assert [task.task for task in tasks] == sorted(task.task for task in tasks)
    assert len({task.layout for task in tasks}) == 12
    assert {task.seed for task in tasks} == {7}
    assert GameIndex(games).place("train", tasks[3].task) == games / "train" / tasks[3].task


def test_the_parent_of_json_2_1_1_will_do(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "official").mkdir()
    copy.rename(tmp_path / "official" / "json_2.1.1")
    for root in (tmp_path / "official", tmp_path / "official" / "json_2.1.1"):
        assert GameIndex(root).splits() == ["train"]
        assert len(GameIndex(root).tasks("train")[0]) == 12


def test_games_without_a_game_file_are_left_out_and_named(copy: Path) -> None:
    first = _trial(copy)
    (first / "game.tw-pddl").unlink()
    (copy / "train" / "half-made").mkdir()
    (copy / "train" / ".writing-1" / "trial").mkdir(parents=True)
    tasks, (problem,) = GameIndex(copy).tasks("train")
    assert len(tasks) == 11
    assert str(first / "game.tw-pddl") in problem and "missing" in problem
    with pytest.raises(UserError, match="missing"):
        read_game(first)


@pytest.mark.parametrize(
    "file,keep,word",
    [
        ("game.tw-pddl", 0.5, "no whole JSON"),
        ("game.tw-pddl", 0, "no whole JSON"),
        ("game.tw-pddl", None, "lacks"),
        ("traj_data.json", 0.5, "no whole JSON"),
    ],
)
def test_half_written_games_stop_the_split(copy: Path, file: str, keep: float, word: str) -> None:
    path = _trial(copy) / file
    whole = path.read_text()
    if keep is None:
        path.write_text(json.dumps({"pddl_domain": "x", "solvable": True}))
    else:
        path.write_text(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match=word) as error:
        GameIndex(copy).tasks("train")
    assert str(path) in str(error.value)


def test_unsolvable_and_sliced_games_are_not_played(copy: Path) -> None:
    trial = _trial(copy)
    data = json.loads((trial / "game.tw-pddl").read_text())
    (trial / "game.tw-pddl").write_text(json.dumps(data | {"solvable": False}))
    sliced = sorted((copy / "train").iterdir())[1]
    sliced.rename(sliced.parent / "pick_and_place_simple-AppleSliced-None-Fridge-1")
    tasks, problems = GameIndex(copy).tasks("train")
    assert len(tasks) == 10
    assert len(problems) == 1 and "unsolvable" in problems[0]


def test_names_from_the_wire_reach_nothing_else(games: Path) -> None:
    index = GameIndex(games)
    trial = _trial(games).relative_to(games / "train")
    for name in ("../train/" + str(trial), "/etc/passwd", "", ".", str(trial) + "/", "a\0b"):
        with pytest.raises(UserError, match="no game"):
            index.place("train", name)
    for split in ("..", "train/" + trial.parts[0], "", "valid"):
        with pytest.raises(UserError, match="no split"):
            index.place(split, str(trial))


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--alfworld_data: .*nowhere is no folder"):
        GameIndex(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no playable game"):
        GameIndex(tmp_path).tasks("empty")


def test_the_layout_is_the_room_and_the_goal() -> None:
    problem = (
        "(:init (atLocation a l1) (receptacleType d DeskType) (inReceptacle m d))\n"
        "(:goal (and (inReceptacle m s)))"
    )
    reordered = (
        "(:init (inReceptacle m d) (receptacleType d DeskType) (atLocation a l9))\n"
        "(:goal   (and (inReceptacle m s)))"
    )
    assert layout_hash(problem) == layout_hash(reordered)
    assert layout_hash(problem) != layout_hash(problem.replace("m d)", "m t)"))
    assert layout_hash(problem) != layout_hash(problem.replace("m s)", "m t)"))


def test_a_reset_looks_into_one_game_however_many_there_are(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / "train" / f"game-{number}" / "trial").mkdir(parents=True)
    index, looked = GameIndex(tmp_path), []
    scandir = os.scandir

    def counted(folder):
        looked.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    assert index.place("train", "game-7/trial") == tmp_path / "train" / "game-7" / "trial"
    assert len(looked) == 3  # the splits, the games of one, the trials of one of these
