"""Every environment behind the server: its expert, through `evaluate`, on data of our own."""

import json
import re

import pytest

from spa_jax import store
from spa_jax.envs.local import LocalServer
from spa_jax.server_config import ServerConfig
from spa_jax.trajectory import Status
from tests import programs


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    from spa_jax.envs.webshop.generate import generate

    return generate(tmp_path_factory.mktemp("shop"), products=120, goals=60, seed=5)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    from spa_jax.envs.virtualhome.generate import generate

    root = tmp_path_factory.mktemp("homes")
    generate(root / "test", 6, 1)
    return root


@pytest.mark.parametrize("env", ["webshop", "virtualhome"])
def test_the_expert_wins_through_the_server(env, shop, homes, tmp_path):
    data = {"webshop": shop, "virtualhome": homes}[env]
    said = programs.succeed(
        "evaluate",
        f"--env={env}",
        f"--{env}_data={data}",
        "--split=test",
        "--games=2",
        "--rollouts=2",
        "--policy=expert",
        f"--workdir={tmp_path}",
    )
    assert re.search(r"RESULT success=1.0000 grounding=1.0000 games=4 ", said)
    assert "2 attempts a game" in said and "  pass@2: 100.0% (100.0 - 100.0%)" in said
    summary = json.loads((tmp_path / "eval" / "policy" / "summary.json").read_text())
    assert (summary["attempts"]["games"], summary["attempts"]["attempts"]) == (2, 2)
    played = store.read(tmp_path / "eval" / "policy" / "trajectories.jsonl")
    assert {(t.env, t.status, t.final_reward) for t in played} == {(env, Status.SUCCESS, 1.0)}


def test_a_purchase_that_is_nearly_right_is_paid_in_part(shop):
    with LocalServer(ServerConfig(str(shop), env="webshop", prompt="short")) as server:
        client = server.client()
        rewards = set()
        for task in client.tasks("test")[:4]:
            with client.session() as session:
                now = session.reset(task.task, "test", expert=True)
                while not now.done:
                    # The expert's way, but without the options that it would choose.
                    action = now.expert_action
                    last = "click[buy now]" if "Buy Now" in now.text else action
                    now = session.step(last)
                rewards.add(now.reward)
                assert now.success == (now.reward == 1.0)
        assert any(0 < reward < 1 for reward in rewards)


def test_an_environment_without_data_names_its_flag(tmp_path):
    done = programs.run("explore", "--env=webshop", "--policy=expert", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "--webshop_data is not set" in done.stderr
