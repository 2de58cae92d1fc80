"""What a policy's folder must agree on, and how long its episodes may be."""

import json

import numpy as np
import pytest

from experiments import common
from spa_jax.config import EnvConfig, SamplingConfig
from spa_jax.errors import UserError
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.tiny_policy(tmp_path / "tiny")


def test_a_tokenizer_of_another_model_is_refused(folder):
    path = folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    size = 1 + max(vocabulary["model"]["vocab"].values())
    added = {"id": 384, "content": "<new>", "special": False} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    for i in range(size, 385):
        vocabulary["added_tokens"].append(added | {"id": i, "content": f"<new{i}>"})
    path.write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=r"tokenizer.json: 385 ids, .*config.json .*size 384"):
        common.load_policy(folder)


def test_nothing_longer_than_the_model_can_attend_over(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    policy = common.load_policy(folder)
    with pytest.raises(UserError, match="--context_length: 64 tokens .* 20"):
        common.make_engine(policy, SamplingConfig(context_length=64), 2, 0)
    rng = np.random.default_rng(0)
    short, long = (tiny.random_trajectory(rng, name, steps=n) for name, n in (("a", 1), ("b", 9)))
    assert len(short.token_ids) <= 20 < len(long.token_ids)
    common.check_lengths(policy, [short], "x.jsonl")
    with pytest.raises(UserError, match=r"x.jsonl: task 'b' \(seed 0, attempt 0\): \d+ tokens"):
        common.check_lengths(policy, [short, long], "x.jsonl")


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
        with common.open_env(EnvConfig(**env), 1, tmp_path / "log"):
            pass
