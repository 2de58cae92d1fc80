"""Engines and environments that are refused before anything is played."""

import json

import pytest

from spa_jax import play, policy
from spa_jax.config import EnvConfig, SamplingConfig
from spa_jax.errors import UserError
from tests import tiny


def test_nothing_longer_than_the_model_can_attend_over(tmp_path):
    folder = tiny.tiny_policy(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    short = policy.load(folder)
    with pytest.raises(UserError, match="--context_length: 64 tokens .* 20"):
        play.make_engine(short, SamplingConfig(context_length=64), 2, 0)


@pytest.mark.parametrize(
    ("episodes", "slots"), [(1, 1), (2, 2), (8, 8), (9, 16), (15, 16), (24, 24), (100, 24)]
)
def test_slots_are_those_of_each_device(episodes, slots, tmp_path):
    """Eight devices of three slots; no more of either than there are episodes for."""
    player = policy.load(tiny.tiny_policy(tmp_path / "tiny"))
    sampling = SamplingConfig(slots=3, context_length=64)
    engine = play.make_engine(player, sampling, episodes, 0)
    assert engine.slots == slots
    assert play.most_slots(sampling) == 24


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"env": "openenv"}, "--env=openenv needs --env_address"),
        ({"env": "custom"}, "--custom_data is not set: give MODULE:CLASS"),
        ({"env": "webshop"}, "--webshop_data is not set.*webshop.generate"),
        ({"env_address": "http://127.0.0.1:1", "env_token_file": "/no"}, "--env_token_file=/no"),
        ({"env_address": "here"}, "http://host:port"),
    ],
)
def test_an_environment_that_is_not_said_whole(env, message, tmp_path):
    with pytest.raises(UserError, match=message):
        with play.open_env(EnvConfig(**env), 1, tmp_path / "log"):
            pass
