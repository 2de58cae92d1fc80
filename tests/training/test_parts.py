"""Adapters in the updates: what is trained, what is not, and that dealing changes nothing."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from spa_jax import batching
from spa_jax.config import LORA_TARGETS, LoraConfig, RowsConfig
from spa_jax.models import heads, lora, tree
from spa_jax.stage_config import PpoConfig
from spa_jax.training import (
    estimator_data,
    estimator_update,
    partition,
    parts,
    ppo_data,
    ppo_update,
    scoring,
    sft_update,
)
from spa_jax.training import state as state_lib
from tests import tiny

CONFIG = tiny.tiny_config()
BASE = tiny.tiny_params(CONFIG)
ROWS = RowsConfig(row_length=48, policy_slots=24, step_slots=8, rows_per_device=1)
PPO = PpoConfig(kl_coef=0.1, value_coef=0.5)
LORA = LoraConfig(rank=2, alpha=8.0, targets=LORA_TARGETS)
RATE = 0.1
SGD = state_lib.Guarded(*optax.sgd(RATE))  # no gradient here is infinite
ADAM = state_lib.adamw(1e-2, clip_norm=1.0, weight_decay=0.01)


def _episodes():
    rng = np.random.default_rng(3)
    return [tiny.random_trajectory(rng, f"task_{i}", steps=1 + i % 3, context=8) for i in range(9)]


def _adapter():
    """One that has been trained: b is not 0."""
    rng = np.random.default_rng(4)
    fresh = jax.device_get(lora.init(LORA, BASE, jax.random.key(1)))
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), fresh)


def _value():
    head = heads.Head(width=8).init(jax.random.key(1), np.zeros((1, 32), np.float32))
    head["params"]["out"]["kernel"] += 0.3
    return jax.device_get(head["params"])


def _stage(name: str, rows: RowsConfig, devices: int):
    """(loss of whole policies, other trained parameters, batches, counts)."""
    episodes = _episodes()
    if name == "sft":
        packed = batching.pack(episodes, **rows.packing)
        cut = batching.microbatches(packed, rows.rows_per_device, devices)
        counts = {"tokens": float(packed.token_mask.sum())}
        return sft_update.make_loss(CONFIG), {}, [sft_update.SftBatch(b) for b in cut], counts
    mask = np.array([[k < len(t.steps) for k in range(3)] for t in episodes], np.float32)
    if name == "estimator":
        trunk = estimator_data.TrainedTrunk(None, episodes, rows, paper=True, prefixes=0.0)
        batches = trunk.batches(np.arange(9), 9, devices)
        loss_fn = estimator_update.make_trunk_loss(CONFIG, 0.0)
        return loss_fn, {"progress": _value()}, batches, {"trajectories": 9.0}
    table = ppo_data.make_table(episodes, mask * 0.1, PPO)
    update = ppo_data.make_update(episodes, table, np.arange(9), rows, PPO, devices=devices)
    loss_fn = ppo_update.make_loss(CONFIG, PPO, 0.7)
    return loss_fn, {"value": _value()}, update.batches, update.counts


def _updated(name: str, deal, rows_per_device: int, optimizer=SGD):
    """(metrics, trained parameters before, the state after) one update of adapters."""
    rows = dataclasses.replace(ROWS, rows_per_device=rows_per_device)
    on_mesh = isinstance(deal, tuple)
    devices = deal[0] * deal[1] if on_mesh else deal
    loss_fn, others, batches, counts = _stage(name, rows, devices)
    cut = parts.adapt(LORA, BASE, _adapter())
    kind = partition.Mesh if on_mesh else partition.Pmap
    trainer = kind(cut.on_parts(loss_fn), optimizer, deal, frozen=cut.frozen)
    before = cut.trained | others
    state = trainer.create(before)
    state, metrics = trainer.update(state, batches, counts)
    frozen = trainer.fetch(trainer.frozen["base"])
    jax.tree.map(np.testing.assert_array_equal, frozen, BASE)
    return metrics, before, trainer.fetch(state)


@pytest.mark.parametrize("name", ["sft", "estimator", "ppo"])
def test_dealing_adapters_out_changes_nothing(name):
    metrics, before, one = _updated(name, 1, 9)
    assert metrics["grad_norm"] > 1e-3
    for deal in (8, (2, 4), (2, 2, 2)):
        others, _, dealt = _updated(name, deal, 1)
        assert metrics.keys() == others.keys()
        for key, value in metrics.items():
            assert others[key] == pytest.approx(value, rel=2e-5, abs=2e-5), (deal, key)
        for old, a, b in zip(
            *map(jax.tree.leaves, (before, one.params, dealt.params)), strict=True
        ):
            assert np.abs(a - old).max() > 0, "nothing was learned"
            np.testing.assert_allclose(b - old, a - old, atol=2e-4 * np.abs(a - old).max())


def test_only_adapters_and_heads_are_in_the_state():
    _, before, state = _updated("ppo", 1, 9, ADAM)
    assert set(state.params) == {"adapter", "value"}
    assert set(state.params["adapter"]["layers"]) == set(LORA_TARGETS)
    trained = sum(leaf.size for leaf in jax.tree.leaves(before))
    # The parameters, Adam's two moments, and a handful of counters.
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert 3 * trained < held < 3 * trained + 10
    kernels = {leaf.shape for leaf in jax.tree.leaves(BASE)}
    heads_too = {leaf.shape for leaf in jax.tree.leaves(before["value"])}
    assert not {leaf.shape for leaf in jax.tree.leaves(state)} & (kernels - heads_too)


def test_the_update_is_that_of_the_merged_weights():
    """SGD's move of A and B is the derivative of the loss at W + (alpha / r) A B."""
    _, before, after = _updated("sft", 1, 9)
    loss_fn, _, (batch,), counts = _stage("sft", dataclasses.replace(ROWS, rows_per_device=9), 1)
    batch = jax.tree.map(lambda x: x[0], batch)

    def loss(adapter):
        return loss_fn({"policy": lora.merge(LORA, BASE, adapter)}, {}, batch, counts)[0]

    wanted = jax.jit(jax.grad(loss))(before["adapter"])
    for old, new, slope in zip(
        *map(jax.tree.leaves, (before["adapter"], after.params["adapter"], wanted)), strict=True
    ):
        np.testing.assert_allclose((old - new) / RATE, slope, atol=2e-4 * np.abs(slope).max())


def _heads(kind, features):
    """Two of them, where the kind has several, that have been trained: their output is not 0."""
    clock = estimator_update.make_clock(kind, features)
    fresh = estimator_update.init(
        kind, 8, 2, key=jax.random.key(1), features=features, clock=clock
    )
    rng = np.random.default_rng(6)
    return clock, jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh
    )


@pytest.mark.parametrize("kind", ["answer", "value", "paper"])
def test_an_estimator_that_reads_tokens_has_the_loss_of_one_that_reads_features(kind):
    rows = dataclasses.replace(ROWS, row_length=96, rows_per_device=9)
    _, _, (batch,), counts = _stage("estimator", rows, 1)
    batch = jax.tree.map(lambda x: x[0], batch)
    assert max(len(set(row[row >= 0])) for row in batch.rows.step_trajectory) > 1
    episodes = _episodes()
    scores = scoring.score(CONFIG, {"policy": BASE}, episodes, rows, temperature=1.0, title="")
    features = estimator_data.features_of(scores, episodes, paper=kind == "paper")
    clock, progress = _heads(kind, features)
    head = {"progress": progress}
    assert estimator_update.kind_of(head["progress"]) == kind
    loss_fn = estimator_update.make_trunk_loss(CONFIG, 0.7)
    ours, sums = jax.jit(loss_fn)({"policy": BASE, **head}, clock, batch, counts)
    theirs, parts_ = estimator_update.make_loss(0.7)(head, clock, features, counts)
    assert float(theirs) > 0.01
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert float(sums["squared_error"]) == pytest.approx(float(parts_["squared_error"]), rel=1e-5)


def test_the_whole_policy_of_all_kinds_of_parts():
    adapter = _adapter()
    kinds = {
        "everything": parts.split(CONFIG, BASE, 0),
        "top": parts.split(CONFIG, BASE, 1),
        "adapters": parts.adapt(LORA, BASE, adapter),
    }
    wanted = {name: BASE for name in kinds} | {"adapters": lora.merge(LORA, BASE, adapter)}
    for name, cut in kinds.items():
        whole = cut.merge(cut.trained | {"value": _value()})
        assert jax.tree.structure(whole) == jax.tree.structure(wanted[name])
        jax.tree.map(np.testing.assert_array_equal, whole, wanted[name])
    assert kinds["adapters"].frozen["base"] is BASE
    top = tree.depth(kinds["top"].trained["policy"])
    assert top == 1 and kinds["everything"].frozen == {}
