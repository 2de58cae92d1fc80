"""Log-probabilities that are there are not computed again, nor used for another policy."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from spa_jax import provenance, redo, store
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.models.io import huggingface, tensors, weights
from spa_jax.run import Run
from spa_jax.stage_config import PpoConfig
from spa_jax.stages import annotate, train_ppo
from spa_jax.training import behaviour, scoring
from tests import runs, tiny

PPO = PpoConfig(objective="grpo", batch_size=4, learning_rate=1e-3, kl_coef=0.1)


@pytest.fixture
def run(tmp_path) -> Run:
    """A base policy and annotated episodes of two tasks."""
    run = runs.make(tmp_path, ppo=PPO)
    first = run.round(0)
    tiny.tiny_policy(run.base)
    rng = np.random.default_rng(0)
    played = [
        tiny.random_trajectory(rng, f"task_{i // 2}", i % 2, context=8, final_reward=i % 2)
        for i in range(4)
    ]
    store.write(first.episodes, [dataclasses.replace(t, ref_log_probs=None) for t in played])
    config, _ = huggingface.load_pretrained(run.base)
    head = heads.Head(width=8).init(jax.random.key(0), np.zeros((1, config.hidden_size)))
    first.progress.mkdir()
    tensors.save_heads(first.progress, {"progress": head["params"]})
    annotate.run(run, 0)
    return run


def _replace(base):
    """Other weights in the policy's folder."""
    path = base / weights.WEIGHTS
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
    monkeypatch.setattr(behaviour, "_MISMATCH_EPISODES", 1)
    train_ppo.run(run, 0)
    assert run_lib.done(run.round(0).ppo).exists()
    assert scored == [1]


def test_the_references_pass_is_made_once(run, monkeypatch):
    first = store.read(run.round(0).annotated)
    monkeypatch.setattr(scoring, "score", None)  # the estimator's pass is there already
    again = annotate.run(run, 0)
    assert [t.ref_log_probs for t in again] == [t.ref_log_probs for t in first]
    assert {t.ref_policy for t in again} == {provenance.policy_digest(run.base)} != {""}


def test_those_of_another_reference_are_refused_and_made_again(run):
    before = store.read(run.round(0).annotated)
    _replace(run.base)
    with pytest.raises(UserError, match=r"annotated.jsonl: its reference .* annotate again"):
        train_ppo.run(run, 0)
    with pytest.raises(UserError, match="base policy's weights are others.*--redo=annotate:0"):
        annotate.run(run, 0)
    redo.remove(run, "annotate:0")
    after = annotate.run(run, 0)
    assert all(a.ref_policy != b.ref_policy for a, b in zip(after, before, strict=True))
    train_ppo.run(run, 0)


def test_a_policy_has_one_name_wherever_it_lies_and_whatever_heads_it_has(run):
    base, moved = run.base, run.workdir / "moved"
    name = provenance.policy_digest(base)
    shutil.copytree(base, moved)
    tensors.save_heads(moved, tensors.load_heads(run.round(0).progress))
    assert provenance.policy_digest(moved) == name
    _replace(moved)
    assert provenance.policy_digest(moved) != name


def test_a_kl_to_nothing_is_refused(run):
    path = run.round(0).annotated
    store.write(path, [dataclasses.replace(t, ref_log_probs=None) for t in store.read(path)])
    with pytest.raises(UserError, match="no reference log-probabilities"):
        train_ppo.run(run, 0)


def test_episodes_annotated_before_their_reference_was_noted_are_taken(run):
    path = run.round(0).annotated
    store.write(path, [dataclasses.replace(t, ref_policy="") for t in store.read(path)])
    train_ppo.run(run, 0)
