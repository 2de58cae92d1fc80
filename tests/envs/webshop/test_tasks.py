import json
import shutil
from pathlib import Path

import pytest

from spa_jax.envs.webshop.store import Catalogue
from spa_jax.envs.webshop.tasks import GoalIndex, goal_number
from spa_jax.errors import UserError


def test_index_files_make_the_splits(shop_data: Path, catalogue: Catalogue) -> None:
    index = GoalIndex(shop_data)
    assert index.splits() == ["test", "train", "valid", "all"]
    tasks, problems = index.tasks("test")
    numbers = json.loads((shop_data / "test_indices.json").read_text())
    assert [goal_number(task.task) for task in tasks] == numbers and not problems
    assert {task.split for task in tasks} == {"test"}
    assert tasks[0].task_type == catalogue.goal(numbers[0]).category
    assert index.place("test", tasks[0].task) == shop_data
    assert len(index.tasks("all")[0]) == catalogue.goals
    layouts = [task.layout for task in index.tasks("all")[0]]
    assert len(set(layouts)) > 0.9 * len(layouts)


def _copy(shop_data: Path, folder: Path, products: str = "items_shuffle.json") -> Path:
    for path in shop_data.glob("items_*.json"):
        shutil.copy(path, folder)
    (folder / "items_shuffle.json").rename(folder / products)
    return folder


def test_without_index_files_products_are_split(shop_data: Path, tmp_path: Path) -> None:
    index = GoalIndex(_copy(shop_data, tmp_path))
    assert index.splits() == ["test", "train", "all"]
    by_split = {split: index.tasks(split)[0] for split in ("train", "test")}
    assert sum(map(len, by_split.values())) == 150 and by_split["test"]
    asins = [
        {index._catalogue.goal(goal_number(task.task)).asin for task in tasks}
        for tasks in by_split.values()
    ]
    assert not asins[0] & asins[1]


def test_the_papers_files_do_not_apply_to_the_small_catalogue(
    shop_data: Path, tmp_path: Path
) -> None:
    folder = _copy(shop_data, tmp_path, "items_shuffle_1000.json")
    (folder / "items_ins_v2.json").rename(folder / "items_ins_v2_1000.json")
    (folder / "test_indices.json").write_text("[11896]")
    index = GoalIndex(folder)
    assert index.splits() == ["test", "train", "all"] and len(index.tasks("test")[0]) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("[150]", "names goal 150, but this catalogue has 150"), ("{}", "no list"), ("[1", "whole")],
)
def test_index_files_that_do_not_fit_are_refused(
    shop_data: Path, tmp_path: Path, text: str, message: str
) -> None:
    folder = _copy(shop_data, tmp_path)
    (folder / "test_indices.json").write_text(text)
    with pytest.raises(UserError, match=message):
        GoalIndex(folder).tasks("test")


def test_unknown_splits_and_goals_are_refused(shop_data: Path) -> None:
    index = GoalIndex(shop_data)
    with pytest.raises(UserError, match="it has: test, train, valid, all"):
        index.tasks("dev")
    with pytest.raises(UserError, match="no goal 'goal_150'"):
        index.place("test", "goal_150")
