"""Log-probabilities that are there are not computed again, nor used for another policy."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from experiments import annotate, train_ppo
from spa_jax import store
from spa_jax.config import LoraConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.models.io import huggingface, tensors
from spa_jax.stage_config import CreditConfig, PpoConfig
from spa_jax.training import scoring
from tests import tiny

ROWS = RowsConfig(row_length=128, policy_slots=64, step_slots=16, rows_per_device=1)
PPO = PpoConfig(objective="grpo", batch_size=4, learning_rate=1e-3, kl_coef=0.1)


@pytest.fixture
def run(tmp_path):
    """A folder with a base policy and annotated episodes of two tasks."""
    base = tiny.tiny_policy(tmp_path / "sft" / "policy")
    rng = np.random.default_rng(0)
    played = [
        tiny.random_trajectory(rng, f"task_{i // 2}", i % 2, context=8, final_reward=i % 2)
        for i in range(4)
    ]
    played = [dataclasses.replace(t, ref_log_probs=None) for t in played]
    folder = tmp_path / "iteration_0"
    store.write(folder / "explore" / "trajectories.jsonl", played)
    config, _ = huggingface.load_pretrained(base)
    head = heads.Head(width=8).init(jax.random.key(0), np.zeros((1, config.hidden_size)))
    (folder / "progress").mkdir()
    tensors.save_heads(folder / "progress", {"progress": head["params"]})
    _annotate(tmp_path)
    return tmp_path


def _annotate(root):
    folder = root / "iteration_0"
    return annotate.run(
        folder / "annotated.jsonl",
        str(root / "sft" / "policy"),
        folder / "explore" / "trajectories.jsonl",
        folder / "progress",
        CreditConfig(),
        ROWS,
        0,
    )


def _train(root, name="ppo"):
    train_ppo.run(
        root / name,
        str(root / "sft" / "policy"),
        root / "iteration_0" / "annotated.jsonl",
        PPO,
        ROWS,
        0,
        LoraConfig(),
        root / "sft" / "policy",
    )


def _replace(base):
    """Other weights in the policy's folder."""
    path = base / huggingface.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_recorded_log_probs_need_no_forward_of_their_own(run, monkeypatch):
    """Neither those of sampling nor the reference's: without a critic only updates run, and one
    pass over a few episodes for the mismatch of sampler and trainer, which is a metric."""
    scored = []

    def score(config, params, trajectories, *args, **kwargs):
        scored.append(len(trajectories))
        return computed(config, params, trajectories, *args, **kwargs)

    computed = scoring.score
    monkeypatch.setattr(scoring, "score", score)
    monkeypatch.setattr(train_ppo, "_MISMATCH_EPISODES", 1)
    _train(run)
    assert (run / "ppo" / "done.json").exists()
    assert scored == [1]


def test_the_references_pass_is_made_once(run, monkeypatch):
    first = store.read(run / "iteration_0" / "annotated.jsonl")
    monkeypatch.setattr(scoring, "score", None)  # the estimator's pass is there already
    again = _annotate(run)
    assert [t.ref_log_probs for t in again] == [t.ref_log_probs for t in first]
    assert {t.ref_policy for t in again} == {scoring.policy_key(run / "sft" / "policy")} != {""}


def test_those_of_another_reference_are_refused_and_made_again(run):
    before = store.read(run / "iteration_0" / "annotated.jsonl")
    _replace(run / "sft" / "policy")
    with pytest.raises(UserError, match=r"annotated.jsonl: its reference .* annotate again"):
        _train(run)
    after = _annotate(run)
    assert all(a.ref_policy != b.ref_policy for a, b in zip(after, before, strict=True))
    _train(run)


def test_a_policy_has_one_name_wherever_it_lies_and_whatever_heads_it_has(run):
    base = run / "sft" / "policy"
    name = scoring.policy_key(base)
    shutil.copytree(base, run / "moved")
    tensors.save_heads(run / "moved", tensors.load_heads(run / "iteration_0" / "progress"))
    assert scoring.policy_key(run / "moved") == name
    _replace(run / "moved")
    assert scoring.policy_key(run / "moved") != name


def test_a_kl_to_nothing_is_refused(run):
    path = run / "iteration_0" / "annotated.jsonl"
    store.write(path, [dataclasses.replace(t, ref_log_probs=None) for t in store.read(path)])
    with pytest.raises(UserError, match="no reference log-probabilities"):
        _train(run)


def test_episodes_annotated_before_their_reference_was_noted_are_taken(run):
    path = run / "iteration_0" / "annotated.jsonl"
    store.write(path, [dataclasses.replace(t, ref_policy="") for t in store.read(path)])
    _train(run)
