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


STEPS = (
    "A room.",
    "Thought: a mug\nAction: go to desk 1",
    "Observation: A desk.",
    "Thought: Action: is next\nAction: take mug 1 \n",
)


def write(folder, records):
    path = folder / "sft.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


def test_an_acknowledged_instruction_is_not_a_step(tmp_path):
    path = write(tmp_path, [talk("Find a mug.", "OK.", *STEPS, "Observation: You won.", id=7)])
    (one,) = importers.read_log(path, env="alfworld")
    assert one.instruction == "Find a mug."
    assert [(s.observation, s.response) for s in one.steps] == [STEPS[:2], STEPS[2:]]
    assert [s.action for s in one.steps] == ["go to desk 1", "take mug 1"]
    assert one.final_observation == "Observation: You won."
    assert (one.status, one.final_reward, one.task) == (Status.SUCCESS, 1.0, "7")
    assert one.sampling is None and one.token_ids == ()


def _messages(*texts, system="", loss=()):
    roles = ("user", "assistant")
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    for i in loss:
        turns[i]["loss"] = False
    return {"messages": turns}


def _same_steps(imported):
    assert [(s.observation, s.response) for s in imported.steps] == [STEPS[:2], STEPS[2:]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_record_a_line(encoding, tmp_path):
    path = tmp_path / "log.jsonl"
    records = [talk("Find a mug.", "OK", *STEPS), _messages("Find a mug.", "OK", *STEPS)]
    path.write_text("".join(json.dumps(r) + "\n\n" for r in records), encoding=encoding)
    imported = importers.read_log(path, env="alfworld")
    assert [t.task for t in imported] == ["0", "1"]
    for t in imported:
        assert t.instruction == "Find a mug."
        _same_steps(t)
    path.write_text(json.dumps(records[0]), encoding=encoding)
    _same_steps(importers.read_log(path, env="alfworld")[0])


def test_a_system_turn_belongs_to_the_instruction(tmp_path):
    alone = _messages(*STEPS, system="You are an agent.")
    both = _messages("Find a mug.", "OK", *STEPS, system="You are an agent.")
    parts = _messages(*STEPS)
    parts["messages"][0]["content"] = [{"type": "text", "text": "A "}, {"text": "room."}]
    first, second, third = importers.read_log(write(tmp_path, [alone, both, parts]), env="x")
    assert first.instruction == "You are an agent."
    assert second.instruction == "You are an agent.\n\nFind a mug."
    for t in (first, second, third):
        _same_steps(t)


def test_an_answer_that_is_not_trained_on_is_an_acknowledgement(tmp_path):
    said = "OK. I will follow your instructions."
    (one,) = importers.read_log(
        write(tmp_path, [_messages("Find a mug.", said, *STEPS, loss=(0, 1, 2))]), env="x"
    )
    assert one.instruction == "Find a mug."
    _same_steps(one)
    path = write(tmp_path, [_messages("Find a mug.", said, *STEPS, loss=(1, 3))])
    with pytest.raises(UserError, match='record 0, turn 3: says "loss": false'):
        importers.read_log(path, env="x")


def test_half_an_emoji_is_replaced_and_counted(tmp_path, capsys):
    texts = (STEPS[0], "Action: take \ud83d", "A \ud83d\ude00", "Action: look")
    path = write(tmp_path, [talk(*texts)])
    (one,) = importers.read_log(path, env="x")
    assert (one.steps[0].action, one.steps[1].observation) == ("take \ufffd", "A \U0001f600")
    assert "1 lone surrogates were replaced" in capsys.readouterr().out
    fmt = chat.ChatFormat.from_tokenizer(tokenizer.load(tiny.tiny_tokenizer(tmp_path / "t")))
    assert fmt.next_turn("A \ud83d mug") == fmt.next_turn("A \ufffd mug")  # an environment's


def test_without_one_the_first_turn_is_an_observation(tmp_path):
    path = write(tmp_path, [talk(*STEPS), talk("Q", "OK, look"), talk("Q", "no action")])
    first, second, third = importers.read_log(path, env="alfworld", split="valid")
    assert (first.instruction, len(first.steps), first.final_observation) == ("", 2, "")
    assert (second.instruction, second.steps[0].response) == ("", "OK, look")
    assert third.steps[0].action == ""
    assert {t.split for t in (first, second, third)} == {"valid"}


def test_a_task_that_comes_twice_gives_two_keys_that_the_store_takes(tmp_path):
    twice = [talk(*STEPS, game_file="g"), talk(*STEPS, game_file="g", reward=0.5)]
    records = [*twice, talk(*STEPS, id=0)]
    imported = importers.read_log(write(tmp_path, records), env="alfworld")
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
        ([{"conversations": [{"from": "system", "value": "x"}]}], "record 0: holds no step"),
        ([talk(*STEPS), {"messages": [{"role": "tool", "content": "x"}]}], "record 1, turn 0: exp"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "turn 0: expected"),
        (json.dumps(talk(*STEPS)) + '\n{"conv', "sft.json:2: cannot be read as JSON"),
        ("\ufeff{", "sft.json: cannot be read as JSON"),
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
        importers.read_log(write(tmp_path, records), env="alfworld")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.json: cannot be read"):
        importers.read_log(tmp_path / "none.json", env="alfworld")


def test_a_log_of_one_task_cannot_stop_sft(tmp_path):
    turns = [{"from": "human", "value": "A room."}, {"from": "gpt", "value": "Action: look"}]
    (tmp_path / "log.json").write_text(json.dumps([{"id": "a", "conversations": turns}] * 2))
    with pytest.raises(UserError, match="log.json: holds 1 tasks"):
        importers.demonstrations(tmp_path / "log.json", env="alfworld", seed=0)
