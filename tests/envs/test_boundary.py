"""What an environment says is checked once, and a breach is named."""

import re

import numpy as np
import pytest

from spa_jax.envs import boundary, custom
from spa_jax.envs.protocol import Observation
from spa_jax.errors import UserError
from tests.envs import loose
from tests.envs.loose import WON, said


@pytest.mark.parametrize(
    "now",
    [
        said("Won.", **WON),
        said("Won.", reward=np.float32(1), done=np.bool_(True), success=np.int64(1)),
        said(np.str_("Won."), reward=True, done=1, success=np.array(True)),
        said("Won.", reward=np.float64(1 + 1e-12), done=True, success=True),
    ],
)
def test_numpys_scalars_are_numbers_flags_and_texts(now):
    found = boundary.observation("M:C.step", now)
    assert found == said("Won.", **WON)
    kinds = [type(v) for v in (found.text, found.reward, found.done, found.success, found.grounded)]
    assert kinds == [str, float, bool, bool, bool]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        *(
            (said(reward=value, done=True), f"reward must be a number in [0, 1], not {value!r}")
            for value in (float("nan"), float("inf"), None, 10.0, -1.0, "1.0", [1.0], 1j)
        ),
        (said(reward=10**400), "reward must be a number in [0, 1], not 1000"),
        (said(reward=-0.1), "reward must be a number in [0, 1], not -0.1"),
        (said(None), "text must be a text, not None"),
        (said(b"x"), "text must be a text, not b'x'"),
        (said(done="no"), "done must be True or False, not 'no'"),
        (said(done=None), "done must be True or False, not None"),
        (said(success=2), "success must be True or False, not 2"),
        (said(grounded=1.0), "grounded must be True or False, not 1.0"),
        (said(success=True), "done=False, reward=0, success=True contradict each other"),
        (said(success=True, reward=1.0), "done=False, reward=1, success=True contradict"),
        (said(success=True, done=True, reward=0.5), "reward=0.5, success=True contradict"),
        (said(done=True, reward=1.0), "reward=1, success=False contradict"),
        (said(progress=0.5, **WON), "success=True contradicts progress=0.5"),
        (("The end.", 1.0, True, {}), "returned tuple, not an Observation"),
        ("text", "returned str, not an Observation"),
    ],
)
def test_a_breach_is_named(now, message):
    with pytest.raises(UserError, match=f"^M:C.step .*{re.escape(message)}"):
        boundary.observation("M:C.step", now)


def test_a_reset_only_begins():
    for fields in (WON, {"reward": 0.5}, {"done": True}):
        with pytest.raises(UserError, match="M:C.reset .*an end or a reward"):
            boundary.observation("M:C.reset", said(**fields), first=True)
    assert boundary.observation("M:C.reset", said("go"), first=True).text == "go"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (range(2), "a task's name must be a text, not 0"),
        ([{"id": 1}], "must be a text, not {'id': 1}"),
        (["a", "a"], "task 'a' is there twice"),
        ([], "is empty: name at least one task"),
        ((name for name in ()), "is empty"),
        ("train", "gives 'train': it must be a sequence"),
        (None, "gives None: it must be a sequence"),
        ({"a": 1}, "gives {'a': 1}: it must be a sequence"),
        (["a\ud83d"], "UTF-8 can write"),
        ([""], "1 to 1000 characters"),
        (["x" * 1001], "1 to 1000 characters"),
    ],
)
def test_names_are_texts_each_once(given, message):
    with pytest.raises(UserError, match=f"^M:C.tasks.*{re.escape(message)}"):
        boundary.names("M:C.tasks", given, "task")


def test_names_of_any_sequence_of_texts():
    assert boundary.names("x", np.array(["a", "b"]), "task") == ["a", "b"]
    assert all(type(name) is str for name in boundary.names("x", np.array(["a"]), "task"))
    assert boundary.names("x", {"b", "c", "a"}, "task") == ["a", "b", "c"]
    assert boundary.names("x", (f"t{i}" for i in range(3)), "task") == ["t0", "t1", "t2"]


# --- a class's own methods ------------------------------------------------------------------------


def _place(kind: type) -> str:
    return f"{kind.__module__}:{kind.__name__}"


@pytest.mark.parametrize("given", [None, "", "  ", 3, ["win"]])
def test_an_expert_says_an_action(monkeypatch, given):
    monkeypatch.setattr(loose.Fine, "expert", lambda self: given)
    with pytest.raises(UserError, match=r"loose:Fine\.expert returned .*must be a text"):
        custom.CustomEngine().reset(_place(loose.Fine), task="train_0", expert=True)


def test_a_classs_own_error_where_a_retry_cannot_help_is_told_whole():
    index = custom.CustomIndex(_place(loose.Leaving))
    with pytest.raises(UserError) as caught:
        index.tasks("train")
    first, *trace = str(caught.value).splitlines()
    assert first == "tests.envs.loose:Leaving.tasks('train') raised SystemExit: 3"
    assert trace and all(line.startswith("  | ") for line in trace)
    assert any("raise SystemExit(3)" in line for line in trace)


@pytest.mark.parametrize("given", [(), "train", ("a", "a"), (1,), None])
def test_splits_are_names_too(monkeypatch, given):
    monkeypatch.setattr(loose.Fine, "splits", given)
    with pytest.raises(UserError, match=r"loose:Fine\.splits"):
        custom.CustomIndex(_place(loose.Fine))


def test_a_module_that_cannot_be_imported_is_told_whole(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    modules = {"syntax_": "def", "value_": "raise ValueError('no')", "exit_": "exit()"}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(UserError, match=f"--custom_data={name}:X: importing {name} raised"):
            custom.load_class(f"{name}:X")


def test_what_a_class_says_with_numpy_arrives_plain():
    engine = custom.CustomEngine()
    engine.reset(_place(loose.Numpy), task="train_0")
    expected = Observation("Won.", 1.0, True, True, True, task="train_0", progress=1.0)
    assert engine.step("x") == expected
