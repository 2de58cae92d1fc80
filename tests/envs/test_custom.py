"""An environment of one's own: the example of docs/environments.md, as it is printed there."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from spa_jax import store
from spa_jax.envs import custom
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import USER_ERROR, EnvError, Observation
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig
from spa_jax.trajectory import Status
from tests import programs

_PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()


@pytest.fixture
def guess(tmp_path, monkeypatch) -> str:
    """Writes the example where it can be imported, here and in processes that are started."""
    example = re.search(r"```python\n(.*?)```", _PAGE, re.DOTALL)
    assert example and "class Guess" in example[1]
    (tmp_path / "guess.py").write_text(example[1])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{programs.ROOT}")
    monkeypatch.syspath_prepend(tmp_path)
    return "guess:Guess"


def test_the_example_is_a_class_of_three_methods(guess):
    env = custom.load_class(guess)()
    assert env.reset("number_7", 0) == "I think of a number."
    assert env.step("fly") == Observation("Nothing happens.", 0.0, False, False, False)
    assert [env.step("guess 1").text, env.step("guess 100").text] == ["More.", "Less."]
    splits = [set(env.tasks(split)) for split in env.splits]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 400


def test_the_commands_of_the_page(guess, tmp_path, monkeypatch):
    """The expert's demonstrations, made through the server as the page says."""
    command = re.search(r"python -m experiments\.(explore --env=custom .*?)\n```", _PAGE, re.DOTALL)
    assert command
    words = command[1].replace("\\\n", " ").replace("=W", f"={tmp_path}").split()
    monkeypatch.setattr(programs, "environment", lambda devices: dict(os.environ))
    said = programs.succeed(*words)
    assert "success=1.0000" in said and "episodes=20" in said
    played = store.read(tmp_path / "demos" / "train" / "trajectories.jsonl")
    assert {(t.env, t.status, t.final_reward) for t in played} == {("custom", Status.SUCCESS, 1.0)}
    assert all(t.instruction.startswith("Find a number") for t in played)
    assert max(len(t.steps) for t in played) <= 7


def test_its_tasks_are_served(guess):
    with LocalServer(ServerConfig(guess, env="custom"), start_deadline_s=120) as server:
        client = server.client()
        assert len(client.tasks("heldout")) == 100
        with pytest.raises(UserError, match="no split 'test'.*heldout"):
            client.tasks("test")
        with client.session() as session:
            for task, message in (("number_999", "no task"), ("guess:Guess", "no task")):
                with pytest.raises(EnvError, match=message) as caught:
                    session.reset(task, "train")
                assert caught.value.code == USER_ERROR
            assert session.reset("number_3", "train", expert=True).expert_action == "guess 50"


def test_a_class_that_breaks_its_contract_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "class Half:\n    instruction, splits = '', ('train',)\n"
        "    def tasks(self, split): return ['a'] if split == 'train' else []\n"
        "    def reset(self, task, seed): return 3\n"
        "    def step(self, action): return 'text'\n"
        "class Other(Half):\n    def reset(self, task, seed): return 'begin'\n"
        "class Empty:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("broken", "MODULE:CLASS"),
        ("broken:None_", "no class"),
        ("nowhere:X", "PYTHONPATH"),
        (":X", "no class"),
        ("broken:Empty", "lacks tasks, reset, step, instruction, splits"),
    ):
        with pytest.raises(UserError, match=message):
            custom.load_class(name)
    engine = custom.CustomEngine()
    with pytest.raises(UserError, match="reset returned int, not a text or an Observation"):
        engine.reset("broken:Half", task="a")
    with pytest.raises(UserError, match="no expert"):
        engine.reset("broken:Other", task="a", expert=True)
    engine.reset("broken:Other", task="a")
    with pytest.raises(UserError, match="step returned str, not an Observation"):
        engine.step("x")


class Told:
    """Says the progress that it is given: in reset, or in a step."""

    instruction, splits = "Say.", ("train",)
    first: object = "begin"
    told: object = None

    def tasks(self, split: str) -> list[str]:
        return ["a"]

    def reset(self, task: str, seed: int) -> object:
        return self.first

    def step(self, action: str) -> Observation:
        return Observation("go on", 0.0, False, False, True, progress=self.told)


def _engine(monkeypatch, **values: object) -> custom.CustomEngine:
    for name, value in values.items():
        monkeypatch.setattr(Told, name, value)
    return custom.CustomEngine()


def _first(**fields: object) -> Observation:
    fields = {"reward": 0.0, "done": False, "success": False, "grounded": True} | fields
    return Observation("begin", **fields)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0, 0.0),
        (0.25, 0.25),
        (1, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (0.7 + 0.2 + 0.1 + 2e-16, 1.0),  # a sum of shares
    ],
)
def test_a_class_may_say_its_progress(monkeypatch, value, expected):
    engine = _engine(monkeypatch, first=_first(progress=value), told=value)
    for now in (engine.reset(f"{__name__}:Told", task="a"), engine.step("x")):
        assert now.progress == expected and type(now.progress) in (float, type(None))
        assert now.task == "a"
    assert engine.reset(f"{__name__}:Told", task="a").instruction == "Say."


def test_a_text_from_reset_says_nothing_of_progress(monkeypatch):
    engine = _engine(monkeypatch, told=0.5)
    assert engine.reset(f"{__name__}:Told", task="a").progress is None
    assert engine.step("x").progress == 0.5


@pytest.mark.parametrize("value", [-0.1, 1.5, 57, float("nan"), float("inf"), True, "0.5", [0.5]])
def test_a_progress_that_is_none_is_told_so(monkeypatch, value):
    place = f"{__name__}:Told"
    message = re.escape(f"[0, 1] or None, not {value!r}")
    engine = _engine(monkeypatch, first=_first(progress=value), told=value)
    with pytest.raises(UserError, match=rf"^{place}\.reset returned .*progress.*{message}"):
        engine.reset(place, task="a")
    engine = _engine(monkeypatch, first="begin")
    engine.reset(place, task="a")
    with pytest.raises(UserError, match=rf"^{place}\.step returned .*progress.*{message}"):
        engine.step("x")


@pytest.mark.parametrize("ended", [{"done": True}, {"reward": 1.0}])
def test_a_reset_neither_ends_nor_pays(monkeypatch, ended):
    engine = _engine(monkeypatch, first=_first(**ended))
    with pytest.raises(UserError, match="reset returned an end or a reward"):
        engine.reset(f"{__name__}:Told", task="a")
