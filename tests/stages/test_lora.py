"""Stages that train adapters: what they write is a policy, and the next stage goes on from it."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from spa_jax import episodes, policy, store
from spa_jax import run as run_lib
from spa_jax.config import LoraConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, lora, transformer
from spa_jax.models.io import peft, tensors
from spa_jax.policy import ADAPTER
from spa_jax.run import Run
from spa_jax.stage_config import (
    MethodConfig,
    PpoConfig,
    ProgressConfig,
    Settings,
    SftConfig,
)
from spa_jax.stages import annotate, sft, train_ppo, train_progress
from spa_jax.training import estimator_data, estimator_update, scoring, trainable
from tests import runs, tiny

SFT = SftConfig(updates=3, batch_size=8, learning_rate=1e-2, eval_every=3)
PPO = PpoConfig(batch_size=8, learning_rate=1e-2)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A run of SFT and two rounds of PPO, all with adapters."""
    root = tmp_path_factory.mktemp("run")
    run = runs.make(root, tiny.tiny_policy(root / "tiny"), sft=SFT, ppo=PPO, lora=LORA)
    runs.demonstrate(run)
    sft.run(run)
    for number in range(2):
        store.write(run.round(number).annotated, runs.episodes(8, seed=1 + number))
        train_ppo.run(run, number)
    return run


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_stage_writes_merged_weights_and_the_adapter_beside_them(finished):
    base = {
        finished.base: pathlib.Path(finished.policy),
        finished.round(0).policy: finished.base,
        finished.round(1).policy: finished.base,
    }
    for folder, below in base.items():
        trained, start = policy.load(folder), policy.load(below)
        own = trained.folder / ADAPTER
        # PPO's second round goes on with the adapter of its first: the reference has it off.
        assert peft.adapter_base(own) == below.resolve()
        found, adapter = peft.load_adapter(own, trained.config)
        assert found == LORA
        _same(trained.params, jax.device_get(lora.merge(LORA, start.params, adapter)))
        for name, part in trained.params["layers"].items():
            for leaf, array in part.items():
                moved = np.any(array != start.params["layers"][name][leaf])
                assert moved == (name in LORA.targets), (folder, name)
        for name in ("embed", "norm"):
            _same(trained.params[name], start.params[name])
    assert set(policy.load(finished.round(1).policy).heads) == {"value"}


def test_the_second_round_begins_with_the_first_ones_adapter(finished, tmp_path):
    first, reference = policy.load(finished.round(0).policy), finished.base

    def make(start=first, adapters=LORA, reference=reference):
        return trainable.make(start, lora=adapters, seed=0, reference=reference)

    going_on = make()
    _, adapter = peft.load_adapter(first.folder / ADAPTER, first.config)
    _same(going_on.parts.trained["adapter"], adapter)
    _same(going_on.parts.frozen["base"], policy.load(reference).params)
    # Of another shape, or with another reference, a new adapter begins on what was reached.
    for other in (
        make(adapters=dataclasses.replace(LORA, rank=4)),
        make(reference=pathlib.Path(finished.policy)),
        make(reference=None),
    ):
        assert other.base == first.folder
        _same(other.parts.merge(other.parts.trained), first.params)
    # So does a copy of the policy that has lost its base.
    copy = shutil.copytree(first.folder, tmp_path / "a" / "b" / "c" / "policy")
    assert make(policy.load(copy)).base == copy


def test_a_moved_run_finds_its_base(finished, tmp_path):
    moved = dataclasses.replace(finished, workdir=finished.workdir.rename(tmp_path / "moved"))
    try:
        own = moved.round(1).policy / ADAPTER
        assert peft.adapter_base(own) == moved.base.resolve()
    finally:
        moved.workdir.rename(finished.workdir)


def test_an_estimator_whose_trunk_has_adapters(finished, tmp_path):
    """It learns through them, and annotation reads its contributions from the adapted trunk."""
    run = runs.make(
        tmp_path,
        progress=ProgressConfig(
            estimator="paper", epochs=3, batch_size=8, learning_rate=1e-2, width=16
        ),
        method=MethodConfig(base=str(finished.base), lora_stages=("progress",)),
        lora=LORA,
    )
    here = run.round(0)
    store.write(here.episodes, runs.episodes(8, seed=3))
    train_progress.run(run, 0)
    base, own = policy.load(run.base), here.progress / ADAPTER
    assert peft.adapter_base(own) == run.base.resolve()
    _, adapter = peft.load_adapter(own, base.config)
    assert all(np.abs(pair["b"]).max() > 0 for pair in adapter["layers"].values())
    annotated = annotate.run(run, 0)
    head = tensors.load_heads(here.progress)["progress"]
    adapted = policy.load(own)
    first = annotated[0]
    tokens = np.array([first.token_ids])
    ends = [max(i for i, s in enumerate(first.step_id) if s == k) for k in range(len(first.steps))]
    found = {}
    for name, params in (("adapted", adapted.params), ("base", base.params)):
        hidden = transformer.hidden_states(
            base.config, params, tokens, np.arange(tokens.size)[None], np.ones_like(tokens)
        )
        found[name] = np.asarray(heads.read(head, hidden[0, np.array(ends)]))
    ours = [step.contribution for step in first.steps]
    np.testing.assert_allclose(ours, found["adapted"], atol=1e-4)
    assert np.abs(found["base"] - found["adapted"]).max() > 1e-3


def test_an_estimator_whose_trunk_is_trained_whole(finished, tmp_path):
    """Its own copy is what annotation reads; the base stays as it was."""
    progress = ProgressConfig(epochs=3, batch_size=8, learning_rate=1e-3, trunk="trained")
    run = runs.make(
        tmp_path, progress=progress, method=MethodConfig(base=str(finished.base))
    )
    here = run.round(0)
    store.write(here.episodes, runs.episodes(8, seed=3))
    train_progress.run(run, 0)
    base, own = policy.load(run.base), policy.load(here.progress / policy.TRUNK)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), own.params, base.params)
    assert min(jax.tree.leaves(moved["layers"])) > 0
    ours = [[step.contribution for step in t.steps] for t in annotate.run(run, 0)]
    head = tensors.load_heads(here.progress)["progress"]
    found = {}
    for name, read in (("own", own), ("base", base)):
        played = episodes.load(here.episodes)
        scores = scoring.score(
            base.config,
            {"policy": read.params},
            played,
            run.settings.rows,
            temperature=1.0,
            title="",
            chat=base.chat,
        )
        features = estimator_data.features_of(scores, played, paper=False)
        c = np.asarray(estimator_update.contributions(head, features)[0])
        found[name] = [row[: len(t.steps)] for row, t in zip(c, played, strict=True)]
    for one, wanted, other in zip(ours, found["own"], found["base"], strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-4)
        assert np.abs(wanted - other).max() > 1e-4


def test_a_checkpoint_of_adapters_is_not_one_of_weights(finished):
    """Where no fingerprint says that the settings are others."""
    run_lib.done(finished.sft).unlink()
    run_lib.fingerprint(finished.sft).unlink()
    for other in (LoraConfig(), dataclasses.replace(LORA, rank=3)):
        settings = dataclasses.replace(finished.settings, lora=other)
        with pytest.raises(UserError, match="does not fit .*continue with the flags"):
            sft.run(dataclasses.replace(finished, settings=settings))


def test_flags_that_contradict_each_other():
    with pytest.raises(UserError, match="--lora_rank=2 .*--sft_train_layers=1"):
        Settings(sft=dataclasses.replace(SFT, train_layers=1), lora=LORA)
    with pytest.raises(UserError, match="--lora_rank=2 .*--ppo_train_layers=1"):
        Settings(ppo=dataclasses.replace(PPO, train_layers=1), lora=LORA)
    for wrong in (("q", "w"), (), ("q", "q")):
        with pytest.raises(UserError, match="--lora_targets=.* of q,k,v,o,gate,up,down"):
            dataclasses.replace(LORA, targets=wrong)
    with pytest.raises(UserError, match="--lora_alpha=0"):
        dataclasses.replace(LORA, alpha=0.0)
    with pytest.raises(UserError, match="--lora_rank=-1"):
        dataclasses.replace(LORA, rank=-1)
    with pytest.raises(UserError, match="--lora_stages=explore: 'explore' is none of sft,prog"):
        MethodConfig(lora_stages=("explore",))


def test_a_run_trains_adapters_in_the_stages_named(tmp_path):
    run = runs.make(tmp_path, method=MethodConfig(lora_stages=("ppo",)), lora=LORA)
    assert run.lora("ppo") == LORA and run.lora("sft").rank == 0
