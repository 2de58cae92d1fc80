"""Episodes that leave: what is written is read back, by us and by other people's libraries."""

import dataclasses
import json

import numpy as np
import pytest

from spa_jax import importers, interchange, parquet
from spa_jax.errors import UserError
from tests import tiny

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def episodes():
    rng = np.random.default_rng(0)
    made = [tiny.random_trajectory(rng, f"task_{i}", final_reward=1.0) for i in range(3)]
    return [
        dataclasses.replace(t, instruction="Play.", final_observation="You won \N{PARTY POPPER}.")
        for t in made
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_messages_are_read_back_as_the_episodes_that_they_were(episodes, tmp_path, ending):
    path = tmp_path / "new" / f"episodes.{ending}"
    interchange.write(path, episodes, "messages")
    back = importers.read_log(path, env="alfworld")
    assert [(t.task, t.final_reward, t.instruction, t.final_observation) for t in back] == [
        (t.task, t.final_reward, t.instruction, t.final_observation) for t in episodes
    ]
    for ours, theirs in zip(episodes, back, strict=True):
        assert [(s.observation, s.response) for s in ours.steps] == [
            (s.observation, s.response) for s in theirs.steps
        ]
    with pytest.raises(UserError, match="is there already"):
        interchange.write(path, episodes, "messages")


def test_a_record_says_what_each_step_brought(episodes):
    record = interchange.messages(episodes[0])
    assert [turn["role"] for turn in record["messages"][:3]] == ["system", "user", "assistant"]
    assert [step["contribution"] for step in record["steps"]] == [
        step.contribution for step in episodes[0].steps
    ]
    assert record["success"] and record["reward"] == 1.0 and record["env"] == "alfworld"


def test_atif_numbers_its_steps_and_holds_the_tokens(episodes, tmp_path):
    path = tmp_path / "episodes.jsonl"
    interchange.write(path, episodes, "atif")
    for t, line in zip(episodes, path.read_text().splitlines(), strict=True):
        document = json.loads(line)
        assert document["schema_version"] == "ATIF-v1.4" and document["agent"]["name"] == "spa_jax"
        steps = document["steps"]
        assert [step["step_id"] for step in steps] == list(range(1, len(steps) + 1))
        assert [step["source"] for step in steps] == ["system", "user"] + ["agent"] * len(t.steps)
        assert steps[-1]["observation"]["results"] == [{"content": t.final_observation}]
        ids = [i for step in steps[2:] for i in step["metrics"]["completion_token_ids"]]
        written = zip(t.token_ids, t.step_id, strict=True)
        assert ids == [i for i, owner in written if owner >= 0]


def test_a_table_of_another_tool_is_read(tmp_path):
    turns = [
        {"role": "user", "content": "A door."},
        {"role": "assistant", "content": "Action: open door"},
    ]
    rows = [{"messages": turns, "reward": None}, {"messages": turns, "reward": 0.5}]
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = importers.read_log(path, env="mine")
    assert (first.final_reward, second.final_reward) == (1.0, 0.5)
    assert first.steps[0].action == "open door"


def test_what_is_no_table_and_what_is_no_ending_are_refused(episodes, tmp_path, monkeypatch):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="broken.parquet: cannot be read as Parquet"):
        importers.read_log(broken, env="mine")
    with pytest.raises(UserError, match="ends neither in .jsonl nor in .parquet"):
        interchange.write(tmp_path / "episodes.csv", episodes, "messages")
    monkeypatch.setattr(parquet.importlib, "import_module", _no_module)
    with pytest.raises(UserError, match="Parquet needs pyarrow: pip install pyarrow"):
        interchange.write(tmp_path / "episodes.parquet", episodes, "messages")
    assert not (tmp_path / "episodes.parquet").exists()


def _no_module(name: str):
    raise ImportError(name)
