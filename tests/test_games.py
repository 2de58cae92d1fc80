"""The commands that generate a run's games."""

import dataclasses
import subprocess

import pytest

from spa_jax import games
from spa_jax.data_config import DataConfig
from spa_jax.envs.webshop import tasks
from spa_jax.errors import UserError
from spa_jax.stage_config import MethodConfig

METHOD = MethodConfig()


def test_what_an_environment_cannot_generate_is_refused(tmp_path):
    data = DataConfig(generate_train=2, generate_valid=1, generate_explore=3, generate_heldout=4)
    (shop,) = games.commands("webshop", data, METHOD, tmp_path)
    assert shop[shop.index("--products") + 1] == "40"
    for bad, flag in (
        ({"task_types": "look"}, "--task_types=look"),
        ({"generate_products": 9}, "--generate_products=9"),
        ({"generate_valid": 0}, "--generate_valid=0"),
    ):
        with pytest.raises(UserError, match=flag):
            games.commands("webshop", dataclasses.replace(data, **bad), METHOD, tmp_path)
    for env, flag in (("openenv", "--env_address"), ("custom", "--custom_data")):
        with pytest.raises(UserError, match=f"--env={env} has no generator.*{flag}"):
            games.commands(env, data, METHOD, tmp_path)
    none = dataclasses.replace(data, generate_train=0, generate_valid=0)
    log = MethodConfig(demonstrations="log.json")
    assert len(games.commands("virtualhome", none, log, tmp_path)) == 2


def test_a_webshop_run_has_the_tasks_that_were_asked_for(tmp_path):
    data = DataConfig(generate_train=3, generate_valid=2, generate_explore=7, generate_heldout=5)
    (command,) = games.commands("webshop", data, METHOD, tmp_path / "shop")
    assert not subprocess.run(command, capture_output=True).returncode
    index = tasks.GoalIndex(tmp_path / "shop")
    assert [len(index.tasks(split)[0]) for split in games.SPLITS] == [3, 2, 7, 5]
