"""What an OpenEnv server answers: rewards mapped, success by name only, a breach named."""

import dataclasses

import pytest

from spa_jax.envs import protocol
from spa_jax.envs.openenv import OpenEnvMapping, TextWire, complete_mapping
from spa_jax.envs.protocol import EnvError


def schema_of(action: dict[str, str], observation: dict[str, str], required=()) -> dict:
    def properties(fields: dict[str, str]) -> dict:
        return {"properties": {name: {"type": kind} for name, kind in fields.items()}}

    return {
        "action": properties(action) | {"required": list(required)},
        "observation": properties(observation),
    }


def _ended(mapping: OpenEnvMapping, noted=lambda what: None, **data) -> protocol.Observation:
    """What the step says that ends an episode."""
    wire = TextWire(dataclasses.replace(mapping, text="text", action="text"), noted)
    wire.reset("a", "train", seed=0, expert=False, prompt="")
    wire.read({"observation": {"text": ""}, "reward": None, "done": False})
    wire.step("go", parsed=True)
    return wire.read({"observation": {"text": ""}, "reward": 0.0, "done": True} | data)


@pytest.mark.parametrize(
    ("ends", "rewards"),
    [((-1, 1), {-1: 0.0, 0: 0.5, 1: 1.0}), ((0, 10), {0: 0.0, 10: 1.0}), ([-2, 0], {-1: 0.5})],
)
def test_a_range_of_rewards_is_mapped(ends, rewards):
    for paid, expected in rewards.items():
        now = _ended(OpenEnvMapping(reward_range=ends), reward=paid)
        assert (now.reward, now.success) == (expected, expected == 1)
    with pytest.raises(EnvError, match="not in .0, 1.: --openenv_reward_range=LOW,HIGH"):
        _ended(OpenEnvMapping(reward_range=ends), reward=11)


def test_a_scale_counts_what_is_below_nothing_as_nothing_and_says_so():
    said = []
    assert _ended(OpenEnvMapping(reward_scale=0.5), said.append, reward=-1).reward == 0
    assert len(said) == 1 and "below 0" in said[0]
    with pytest.raises(EnvError, match="R = -1.*--openenv_reward_range=LOW,HIGH.*a loss pays -1"):
        _ended(OpenEnvMapping(), reward=-1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"reward": "much"}, "reward must be a number, not 'much'"),
        ({"reward": float("nan")}, "reward must be a number, not nan"),
        ({"reward": [1]}, "reward must be a number"),
        ({"done": "yes"}, "done must be True or False, not 'yes'"),
        ({"observation": {"text": "", "solved": "yes"}}, "field 'solved' must be True or False"),
        ({"observation": {"text": "", "solved": True}}, "field 'solved'.*contradict each other"),
        ({"reward": 1, "observation": {"text": "", "solved": False}}, "contradict each other"),
        ({"observation": {"text": "", "solved": True}, "done": False}, "contradict each other"),
    ],
)
def test_what_a_server_says_is_checked(data, message):
    with pytest.raises(EnvError, match=message) as caught:
        _ended(OpenEnvMapping(success="solved"), **data)
    assert caught.value.code == protocol.USER_ERROR


def test_success_is_the_tasks_only_where_somebody_says_so():
    """Environments of shells say by it that a command ran."""
    schema = schema_of({"command": "string"}, {"output": "string", "success": "boolean"})
    assert complete_mapping(schema, {}).success == ""
    assert complete_mapping(schema, {"success": "success"}).success == "success"
    shown = {"text": "", "success": True}
    going = _ended(OpenEnvMapping(), observation=shown, reward=None, done=False)
    assert not going.success and not _ended(OpenEnvMapping(), observation=shown).success
    assert _ended(OpenEnvMapping(), observation=shown, reward=1).success


def test_an_episode_that_ends_at_its_reset_is_an_error():
    wire = TextWire(OpenEnvMapping(text="text", action="text"))
    wire.reset("train-3", "train", seed=0, expert=False, prompt="")
    with pytest.raises(EnvError, match="'train-3' at its reset") as caught:
        wire.read({"observation": {"text": ""}, "reward": 1.0, "done": True})
    assert caught.value.code == protocol.USER_ERROR


def test_optional_fields_are_found_and_null_is_empty():
    null = {"type": "null"}
    action = {"properties": {"say": {"anyOf": [{"type": "string"}, null]}, "n": {"type": "null"}}}
    shown = {
        "$defs": {"Text": {"type": "string"}, "Loop": {"$ref": "#/$defs/Loop"}},
        "properties": {
            "reward": {"anyOf": [{"type": "number"}, null]},
            "loop": {"$ref": "#/$defs/Loop"},
            "message": {"anyOf": [{"$ref": "#/$defs/Text"}, null]},
            "progress": {"type": ["string", "null"]},
        },
    }
    found = complete_mapping({"action": action, "observation": shown}, {})
    assert (found.action, found.text, found.progress) == ("say", "message", "")
    assert TextWire(found).read({"observation": {"message": None}, "done": None}).text == ""
    shown["properties"]["message"] = {"enum": ["open", "shut"]}
    assert complete_mapping({"action": action, "observation": shown}, {}).text == "message"
