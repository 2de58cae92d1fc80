"""What a stage is made from stands in its fingerprint; a policy of its own needs no base."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from spa_jax import provenance, store
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.models.io import tensors
from spa_jax.stage_config import PpoConfig, ProgressConfig, SftConfig
from spa_jax.stages import annotate, sft, train_ppo, train_progress
from tests import runs, tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def _inputs(stage) -> dict[str, str]:
    return json.loads(run_lib.fingerprint(stage).read_text())["inputs"]


def test_sft_depends_on_its_policy_and_its_demonstrations(policy, tmp_path):
    run = runs.make(tmp_path, policy, sft=SftConfig(updates=1, batch_size=8))
    runs.demonstrate(run)
    sft.run(run)
    assert _inputs(run.sft) == {
        "policy": provenance.policy_digest(policy),
        "train demonstrations": provenance.file_digest(run.demonstrations("train")),
        "valid demonstrations": provenance.file_digest(run.demonstrations("valid")),
    }
    runs.demonstrate(run, {"train": 9})
    with pytest.raises(UserError, match="the train demonstrations are others.*--redo=sft"):
        sft.run(run)


def test_a_round_on_a_policy_of_its_own_needs_no_base(policy, tmp_path):
    run = runs.make(
        tmp_path,
        "nowhere",
        progress=ProgressConfig(epochs=1, width=8),
        ppo=PpoConfig(objective="grpo", batch_size=8, train_layers=1),
        explore=dataclasses.replace(runs.make(tmp_path).settings.explore, rollouts=2),
    )
    here, given = run.round(0), provenance.policy_digest(policy)
    played = [
        tiny.random_trajectory(np.random.default_rng(i), f"task_{i // 2}", i % 2, context=8)
        for i in range(8)
    ]
    store.write(here.episodes, played)
    train_progress.run(run, 0, trunk=str(policy))
    assert _inputs(here.progress) == {
        "base policy": given,
        "episodes of iteration_0": provenance.file_digest(here.episodes),
    }
    annotate.run(run, 0, base=str(policy))
    assert _inputs(here.annotated) == {
        "base policy": given,
        "episodes": provenance.file_digest(here.episodes),
        "estimator": provenance.estimator_digest(here.progress),
    }
    train_ppo.run(run, 0, policy=str(policy))
    assert _inputs(here.ppo) == {
        "policy": given,
        "annotated episodes": provenance.file_digest(here.annotated),
    }
    assert not run.base.exists()
    other = tiny.tiny_policy(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made with .*: the policy's weights are others.*=ppo:0"):
        train_ppo.run(run, 0, policy=str(other))


def test_a_head_beside_the_policy_is_an_estimator(policy, tmp_path):
    run = runs.make(tmp_path)
    here = run.round(0)
    base = tiny.tiny_policy(tmp_path / "tiny")
    store.write(here.episodes, runs.episodes(4))
    with pytest.raises(UserError, match="progress: holds no progress head, nor does .*train_prog"):
        annotate.run(run, 0, base=str(base))

    def put(seed: int) -> None:
        head = heads.Head(8).init(jax.random.key(seed), np.zeros((1, 32), np.float32))["params"]
        tensors.save_heads(base, {"progress": jax.device_get(head)})

    put(0)
    annotate.run(run, 0, base=str(base))
    put(1)
    with pytest.raises(UserError, match="the estimator's weights are others.*--redo=annotate:0"):
        annotate.run(run, 0, base=str(base))
