"""What --horizon sets, and what it refuses."""

import dataclasses

import pytest

from spa_jax import games
from spa_jax.config import EnvConfig
from spa_jax.data_config import DataConfig, at_horizon
from spa_jax.errors import UserError
from spa_jax.horizons import HORIZONS
from spa_jax.stage_config import Settings


def _at(horizon, **given):
    return at_horizon(DataConfig(horizon=horizon), EnvConfig(), **given)


def test_it_sets_rooms_task_types_and_the_step_limit(tmp_path):
    data, env = _at("16")
    assert (data.min_receptacles, data.max_receptacles, data.closed_rooms) == (11, 13, True)
    assert len(data.task_types.split(",")) == 4 and env.max_steps == 32
    command = games.alfworld(data, tmp_path, 5, "1")
    assert "--closed" in command
    assert command[command.index("--max_receptacles") + 1] == "13"
    assert command[command.index("--task_types") + 1] == data.task_types
    data, env = _at("8")
    assert (data.task_types, data.closed_rooms, env.max_steps) == ("", False, 16)
    assert "--closed" not in games.alfworld(data, tmp_path, 5, "1")


def test_none_sets_nothing():
    assert _at("none") == (DataConfig(), EnvConfig())
    assert set(HORIZONS) == {"8", "16", "32"}


def test_a_flag_that_says_otherwise_is_refused():
    for config in (DataConfig(horizon="8", max_receptacles=7), DataConfig(horizon="8")):
        at_horizon(config, EnvConfig())  # nobody gave it
    with pytest.raises(UserError, match="--horizon=8 sets --max_receptacles=5, and it is 7"):
        at_horizon(DataConfig(horizon="8", max_receptacles=7), EnvConfig(), {"max_receptacles"})
    with pytest.raises(UserError, match="--horizon=32 sets --max_steps=64, and it is 40"):
        _at("32", given={"max_steps"})
    at_horizon(DataConfig(horizon="8"), EnvConfig(max_steps=16), {"max_steps"})
    with pytest.raises(UserError, match="--horizon=8 with --env=webshop"):
        at_horizon(DataConfig(horizon="8"), EnvConfig(env="webshop"))


def test_settings_hold_what_their_horizon_says():
    data, env = _at("16")
    whole = Settings(data=data, env=env)
    with pytest.raises(UserError, match="--horizon=16 sets --max_steps=32, and it is 9"):
        dataclasses.replace(whole, env=EnvConfig(max_steps=9))
    with pytest.raises(UserError, match="--horizon=16"):
        Settings(data=DataConfig(horizon="16"))
