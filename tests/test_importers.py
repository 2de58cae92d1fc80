"""ShareGPT-style logs become trajectories, or are refused by record and turn."""

import json

import pytest

from spa_jax import chat, importers, store, tokenizer
from spa_jax.errors import UserError
from spa_jax.trajectory import Status
from tests import tiny


def talk(*texts, **fields):
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text, "loss": None} for i, text in enumerate(texts)]
    return {"conversations": turns} | fields


STEPS = ("A room.", "Thought: a mug\nAction: go to desk 1", "Observation: A desk.",
         "Thought: Action: is next\nAction: take mug 1 \n")


def write(folder, records):
    path = folder / "sft.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


def test_an_acknowledged_instruction_is_not_a_step(tmp_path):
    path = write(tmp_path, [talk("Find a mug.", "OK.", *STEPS, "Observation: You won.", id=7)])
    (one,) = importers.read_sharegpt(path, env="alfworld")
    assert one.instruction == "Find a mug."
    assert [(s.observation, s.response) for s in one.steps] == [STEPS[:2], STEPS[2:]]
    assert [s.action for s in one.steps] == ["go to desk 1", "take mug 1"]
    assert one.final_observation == "Observation: You won."
    assert (one.status, one.final_reward, one.task) == (Status.SUCCESS, 1.0, "7")
    assert one.sampling is None and one.token_ids == ()


def test_without_one_the_first_turn_is_an_observation(tmp_path):
    path = write(tmp_path, [talk(*STEPS), talk("Q", "OK, look"), talk("Q", "no action")])
    first, second, third = importers.read_sharegpt(path, env="alfworld", split="valid")
    assert (first.instruction, len(first.steps), first.final_observation) == ("", 2, "")
    assert (second.instruction, second.steps[0].response) == ("", "OK, look")
    assert third.steps[0].action == ""
    assert {t.split for t in (first, second, third)} == {"valid"}


def test_a_task_that_comes_twice_gives_two_keys_that_the_store_takes(tmp_path):
    records = [talk(*STEPS, game_file="g"), talk(*STEPS, game_file="g", reward=0.5),
               talk(*STEPS, id=0)]
    imported = importers.read_sharegpt(write(tmp_path, records), env="alfworld")
    assert [t.key for t in imported] == [("g", 0, 0), ("g", 0, 1), ("0", 0, 0)]
    assert (imported[1].status, imported[1].final_reward) == (Status.FAILURE, 0.5)
    fmt = chat.ChatFormat.from_tokenizer(tokenizer.load(tiny.tiny_tokenizer(tmp_path / "t")))
    encoded = [chat.encode_trajectory(fmt, t) for t in imported]
    store.write(tmp_path / "demos.jsonl", encoded)
    assert store.read(tmp_path / "demos.jsonl") == [encoded[2], encoded[0], encoded[1]]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("{", "sft.json: cannot be read as JSON"),
        ({"a": 1}, "sft.json: expected a JSON list"),
        ([talk(*STEPS), 3], 'sft.json: record 1: expected an object with a list of "conv'),
        ([{"conversations": [{"from": "system", "value": "x"}]}], "record 0, turn 0: expected"),
        ([{"conversations": [{"from": "human"}]}], "record 0, turn 0: expected"),
        ([{"conversations": ["x"]}], "record 0, turn 0: expected"),
        ([{"conversations": talk("a")["conversations"] * 2}], "record 0, turn 1: comes from 'hu"),
        ([talk("only one")], "record 0: holds no step"),
        ([talk("Find it.", "OK", "A room.")], "record 0: holds no step"),
        ([talk(*STEPS, reward="good")], "record 0: reward 'good'"),
    ],
)
def test_bad_logs_are_named(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        importers.read_sharegpt(write(tmp_path, records), env="alfworld")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.json: cannot be read"):
        importers.read_sharegpt(tmp_path / "none.json", env="alfworld")
