"""Stages that train adapters: what they write is a policy, and the next stage goes on from it."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import annotate, common, run_spa, sft, train_ppo, train_progress
from spa_jax import config as config_lib
from spa_jax import store
from spa_jax.config import LoraConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, lora, transformer
from spa_jax.models.io import peft, tensors
from spa_jax.stage_config import CreditConfig, PpoConfig, ProgressConfig, SftConfig
from tests import tiny
from tests.experiments.test_resume import _demos

ROWS = RowsConfig(row_length=128, policy_slots=64, step_slots=16, rows_per_device=1)
SFT = SftConfig(updates=3, batch_size=8, learning_rate=1e-2, eval_every=3)
PPO = PpoConfig(batch_size=8, learning_rate=1e-2)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))


def _read_demos(root: pathlib.Path):
    return [store.read(root / "demos" / name / "trajectories.jsonl") for name in ("train", "valid")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of SFT and two rounds of PPO, all with adapters."""
    root = tmp_path_factory.mktemp("run")
    policy = tiny.tiny_policy(root / "tiny")
    _demos(root / "demos")
    sft.run(root / "sft", str(policy), *_read_demos(root), SFT, ROWS, 0, LORA)
    rng = np.random.default_rng(1)
    for iteration in range(2):
        folder = root / f"iteration_{iteration}"
        episodes = [tiny.random_trajectory(rng, f"task_{i}", context=8) for i in range(8)]
        store.write(folder / "annotated.jsonl", episodes)
        train_ppo.run(
            folder / "ppo",
            str(train_ppo.policy_before(root, iteration)),
            folder / "annotated.jsonl",
            PPO,
            ROWS,
            iteration,
            LORA,
            root / "sft" / "policy",
        )
    return root


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_stage_writes_merged_weights_and_the_adapter_beside_them(finished):
    base = {"sft": "tiny", "iteration_0/ppo": "sft/policy", "iteration_1/ppo": "sft/policy"}
    for stage, below in base.items():
        policy = common.load_policy(finished / stage / "policy")
        start = common.load_policy(finished / below)
        own = policy.folder / common.ADAPTER
        # PPO's second round goes on with the adapter of its first: the reference has it off.
        assert peft.adapter_base(own) == (finished / below).resolve()
        found, adapter = peft.load_adapter(own, policy.config)
        assert found == LORA
        _same(policy.params, jax.device_get(lora.merge(LORA, start.params, adapter)))
        for name, part in policy.params["layers"].items():
            for leaf, array in part.items():
                moved = np.any(array != start.params["layers"][name][leaf])
                assert moved == (name in LORA.targets), (stage, name)
        for name in ("embed", "norm"):
            _same(policy.params[name], start.params[name])
    assert set(common.load_policy(finished / "iteration_1/ppo/policy").heads) == {"value"}


def test_the_second_round_begins_with_the_first_ones_adapter(finished, tmp_path):
    first = common.load_policy(finished / "iteration_0" / "ppo" / "policy")
    reference = finished / "sft" / "policy"
    going_on = common.trainable(first, 0, LORA, 0, reference)
    _, adapter = peft.load_adapter(first.folder / common.ADAPTER, first.config)
    _same(going_on.parts.trained["adapter"], adapter)
    _same(going_on.parts.frozen["base"], common.load_policy(reference).params)
    # Of another shape, or with another reference, a new adapter begins on what was reached.
    for other in (
        common.trainable(first, 0, dataclasses.replace(LORA, rank=4), 0, reference),
        common.trainable(first, 0, LORA, 0, finished / "tiny"),
        common.trainable(first, 0, LORA, 0),
    ):
        assert other.base == first.folder
        _same(other.parts.merge(other.parts.trained), first.params)
    # So does a copy of the policy that has lost its base.
    copy = shutil.copytree(first.folder, tmp_path / "a" / "b" / "c" / "policy")
    assert common.trainable(common.load_policy(copy), 0, LORA, 0, reference).base == copy


def test_a_moved_run_finds_its_base(finished, tmp_path):
    moved = finished.rename(tmp_path / "moved")
    try:
        own = moved / "iteration_1" / "ppo" / "policy" / common.ADAPTER
        assert peft.adapter_base(own) == (moved / "sft" / "policy").resolve()
    finally:
        moved.rename(finished)


def test_an_estimator_whose_trunk_has_adapters(finished):
    """It learns through them, and annotation reads its contributions from the adapted trunk."""
    trunk, folder = finished / "sft" / "policy", finished / "iteration_0"
    data = folder / "explore" / "trajectories.jsonl"
    rng = np.random.default_rng(3)
    episodes = [tiny.random_trajectory(rng, f"task_{i}", context=8) for i in range(8)]
    store.write(data, episodes)
    progress = ProgressConfig(epochs=3, batch_size=8, learning_rate=1e-2, width=16)
    train_progress.run(folder / "progress", str(trunk), [data], progress, ROWS, 0, LORA)
    policy = common.load_policy(trunk)
    own = folder / "progress" / common.ADAPTER
    assert peft.adapter_base(own) == trunk.resolve()
    _, adapter = peft.load_adapter(own, policy.config)
    assert all(np.abs(pair["b"]).max() > 0 for pair in adapter["layers"].values())
    annotated = annotate.run(
        folder / "out.jsonl", str(trunk), data, folder / "progress", CreditConfig(), ROWS, 0
    )
    head = tensors.load_heads(folder / "progress")["progress"]
    adapted = common.load_policy(own)
    first = annotated[0]
    tokens = np.array([first.token_ids])
    ends = [max(i for i, s in enumerate(first.step_id) if s == k) for k in range(len(first.steps))]
    found = {}
    for name, params in (("adapted", adapted.params), ("base", policy.params)):
        hidden = transformer.hidden_states(
            policy.config, params, tokens, np.arange(tokens.size)[None], np.ones_like(tokens)
        )
        found[name] = np.asarray(heads.read(head, hidden[0, np.array(ends)]))
    ours = [step.contribution for step in first.steps]
    np.testing.assert_allclose(ours, found["adapted"], atol=1e-4)
    assert np.abs(found["base"] - found["adapted"]).max() > 1e-3


def test_a_checkpoint_of_adapters_is_not_one_of_weights(finished):
    (finished / "sft" / "done.json").unlink()
    demos = _read_demos(finished)
    for other in (LoraConfig(), dataclasses.replace(LORA, rank=3)):
        with pytest.raises(UserError, match="does not fit .*continue with the flags"):
            sft.run(finished / "sft", str(finished / "tiny"), *demos, SFT, ROWS, 0, other)


def test_flags_that_contradict_each_other(tmp_path):
    with pytest.raises(UserError, match="--lora_rank=2 .*--sft_train_layers=1"):
        settings = dataclasses.replace(SFT, train_layers=1)
        sft.run(tmp_path, "nowhere", [], [], settings, ROWS, 0, LORA)
    with pytest.raises(UserError, match="--lora_rank=2 .*--ppo_train_layers=1"):
        settings = dataclasses.replace(PPO, train_layers=1)
        train_ppo.run(tmp_path, "nowhere", tmp_path, settings, ROWS, 0, LORA, tmp_path)
    for wrong in (("q", "w"), (), ("q", "q")):
        with pytest.raises(UserError, match="--lora_targets=.* of q,k,v,o,gate,up,down"):
            config_lib.check(dataclasses.replace(LORA, targets=wrong))
    with pytest.raises(UserError, match="--lora_alpha=0"):
        config_lib.check(dataclasses.replace(LORA, alpha=0.0))
    with pytest.raises(UserError, match="--lora_rank=-1"):
        config_lib.check(dataclasses.replace(LORA, rank=-1))
    with pytest.raises(UserError, match="--lora_stages=explore: 'explore' is none of sft,prog"):
        config_lib.check(config_lib.RunConfig(lora_stages=("explore",)))


def test_a_run_trains_adapters_in_the_stages_named():
    others = dict.fromkeys(field.name for field in dataclasses.fields(run_spa.Run))
    run = run_spa.Run(**others | {"run": config_lib.RunConfig(lora_stages=("ppo",)), "lora": LORA})
    assert run.lora_of("ppo") == LORA and run.lora_of("sft").rank == 0
