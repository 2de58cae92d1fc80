from pathlib import Path

import pytest

from spa_jax.envs.virtualhome import generate
from spa_jax.envs.virtualhome.tasks import TaskIndex, read_task
from spa_jax.errors import UserError


@pytest.mark.parametrize("kind", generate.KINDS)
def test_every_kind_is_made_and_solved(kind: str) -> None:
    for index in range(4):
        made = generate.make(seed=9, index=index, kind=kind, rooms=2 + index, things=6)
        classes = [node["class_name"] for node in made.graph["nodes"]]
        assert len(set(classes)) == len(classes)  # a command's names are never ambiguous
        assert made.task.title == kind and made.task.description.endswith(".")
        assert 2 <= len(made.task.program) <= 20
        for name, node_id in made.task.objects.items():
            assert made.graph["nodes"][node_id - 1]["class_name"] == name


def test_a_home_that_a_program_fails_in_is_drawn_again() -> None:
    """Index 69 of seed 1 lies down on a couch first, which holds as much as a couch can."""
    made = generate.make(seed=1, index=69, kind="Relax", rooms=3, things=8)
    assert made == generate.make(seed=1, index=69, kind="Relax", rooms=3, things=8)


def test_seeds_and_indices_make_other_tasks(homes: Path) -> None:
    tasks = TaskIndex(homes).tasks("train")[0]
    assert len({task.layout for task in tasks}) == len(tasks) == 12
    assert {task.task_type for task in tasks} == set(generate.KINDS)
    assert {task.seed for task in tasks} == {3}
    one, same, other = (generate.make(s, 0, "Bring", 3, 8) for s in (1, 1, 2))
    assert one == same and one != other


def test_a_stopped_run_goes_on(homes: Path, tmp_path: Path) -> None:
    names = generate.generate(tmp_path, tasks=3, seed=3)
    assert generate.generate(tmp_path, tasks=4, seed=3)[:3] == names
    for name in names:
        assert read_task(tmp_path / name) == read_task(homes / "train" / name)


@pytest.mark.parametrize(
    "arguments", [["--kinds=Dance"], ["--rooms=1"], ["--things=99"], ["--tasks=0"]]
)
def test_bad_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    usual = [f"--out={tmp_path}", "--tasks=1", "--seed=1"]
    assert generate.main(usual + arguments) == 2
    assert capsys.readouterr().err.startswith("error: --")
    with pytest.raises(UserError):
        generate.generate(tmp_path, tasks=1, seed=1, kinds=[])
