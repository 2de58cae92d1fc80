"""What a training stage takes of a file of episodes; that processes agree: tests of the pod."""

import dataclasses

import numpy as np
import pytest

from spa_jax import episodes, store
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.trajectory import Status
from tests import tiny


def test_only_completed_episodes_are_loaded_sorted_by_key(tmp_path):
    rng = np.random.default_rng(0)
    won, lost, broken, empty = (tiny.random_trajectory(rng, name) for name in "dcba")
    lost = dataclasses.replace(lost, status=Status.MAX_STEPS, final_reward=0.0)
    broken = dataclasses.replace(broken, status=Status.ENV_ERROR)
    nothing = {name: () for name in ("steps", "token_ids", "step_id", "log_probs")}
    empty = dataclasses.replace(empty, ref_log_probs=None, **nothing)
    path = tmp_path / "trajectories.jsonl"
    store.write(path, [won, lost, broken, empty])
    assert episodes.load(path) == [lost, won]
    assert episodes.completed([won, broken, lost, empty]) == [won, lost]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no.jsonl: no such file"):
        episodes.load(tmp_path / "no.jsonl")


def test_nothing_longer_than_the_model_or_a_row():
    config = dataclasses.replace(tiny.tiny_config(), max_position=20)
    rng = np.random.default_rng(0)
    short, long = (tiny.random_trajectory(rng, name, steps=n) for name, n in (("a", 1), ("b", 9)))
    assert len(short.token_ids) <= 20 < len(long.token_ids)
    episodes.check_fit(config, [short], "x.jsonl", RowsConfig())
    with pytest.raises(UserError, match=r"x.jsonl: task 'b' \(seed 0, attempt 0\): \d+ tokens"):
        episodes.check_fit(config, [short, long], "x.jsonl", RowsConfig())
    length = len(short.token_ids) - 1
    rows = RowsConfig(row_length=length, policy_slots=length)
    with pytest.raises(UserError, match="task 'a'.*--row_length"):
        episodes.check_fit(config, [short], "x.jsonl", rows)


def test_a_token_that_the_model_has_not_is_refused_by_episode():
    config = tiny.tiny_config()
    rng = np.random.default_rng(0)
    good = tiny.random_trajectory(rng, "good")
    strange = tiny.random_trajectory(rng, "strange")
    ids = (*strange.token_ids[:-1], config.vocab_size)
    strange = dataclasses.replace(strange, token_ids=ids)
    episodes.check_fit(config, [good], "x.jsonl", RowsConfig())
    with pytest.raises(UserError, match="x.jsonl: task 'strange' .* holds 384, .*size is 384"):
        episodes.check_fit(config, [good, strange], "x.jsonl", RowsConfig())


def test_episodes_without_a_token_of_the_policys_are_said_to_be():
    read = tiny.random_trajectory(np.random.default_rng(0))
    read = dataclasses.replace(read, step_id=(-1,) * len(read.token_ids))
    with pytest.raises(UserError, match="x.jsonl: no episode holds a token that the policy wrote"):
        episodes.check_fit(tiny.tiny_config(), [read], "x.jsonl", RowsConfig())
