"""The vocabulary, projected in chunks: the same numbers, and no array of all slots times it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from spa_jax import batching
from spa_jax.config import ComputeConfig, RowsConfig
from spa_jax.models import heads
from spa_jax.stage_config import PpoConfig
from spa_jax.training import forward, ppo_data, ppo_update, sft_update
from tests import tiny

ROWS = RowsConfig(row_length=64, policy_slots=30, step_slots=8, rows_per_device=3)
SLOTS = 90
PPO = PpoConfig(kl_coef=0.1, entropy_coef=0.3)


def _config(chunk: int, **shape):
    compute = ComputeConfig(compute_dtype="float32", logits_chunk=chunk)
    return dataclasses.replace(tiny.tiny_config(), compute=compute, **shape)


def _played():
    rng = np.random.default_rng(3)
    return [tiny.random_trajectory(rng, f"task_{i}", steps=1 + i % 3) for i in range(9)]


def _sft(config):
    packed = batching.pack(_played(), **ROWS.packing)
    (rows,) = batching.microbatches(packed, 3)
    return sft_update.make_loss(config), sft_update.SftBatch(rows), {}


def _ppo(config):
    played = _played()
    values = np.random.default_rng(4).normal(size=(len(played), 3)).astype(np.float32)
    table = ppo_data.make_table(played, values, PPO)
    made = ppo_data.make_update(played, table, np.arange(len(played)), ROWS, PPO, 1)
    (batch,) = (jax.tree.map(lambda x: x[0], b) for b in made.batches)
    head = heads.ValueHead(width=8).init(jax.random.key(1), np.zeros((1, 32), np.float32))
    return ppo_update.make_loss(config, PPO, 0.7), batch, {"value": head["params"]}


@pytest.mark.parametrize("chunk", [7, 30, 89])  # none divides the 90 slots but 30
@pytest.mark.parametrize(("make", "tied"), [(_sft, True), (_ppo, True), (_ppo, False)])
def test_chunks_change_no_loss_no_sum_and_no_gradient(make, tied, chunk):
    found = []
    for size in (chunk, 0):
        config = _config(size, tie_embeddings=tied)
        loss_fn, batch, head = make(config)
        params = {"policy": tiny.tiny_params(config)} | head
        counts = {"tokens": 50.0, "steps": 20.0}
        loss = functools.partial(loss_fn, frozen={}, batch=batch, counts=counts)
        found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    assert batch.rows.targets.size == SLOTS
    for ours, wanted in zip(*(jax.tree.leaves(f) for f in found), strict=True):
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * max(largest, 1e-3))


def test_the_forward_pass_in_chunks_too():
    (_, batch, _), params = _sft(_config(0)), {"policy": tiny.tiny_params(_config(0))}
    ours, wanted = (
        jax.jit(functools.partial(forward.score, _config(chunk), temperature=0.7))(
            params, batch.rows
        )["log_probs"]
        for chunk in (16, 0)
    )
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_memory_does_not_hold_all_slots_times_the_vocabulary():
    """By XLA's analysis: without chunks several such arrays, with them not even one."""
    vocabulary, temporaries = 20_000, {}
    for chunk in (10, 0):
        config = _config(chunk, vocab_size=vocabulary)
        loss_fn, batch, _ = _sft(config)
        params = {"policy": jax.eval_shape(lambda c=config: tiny.random_params(c))}
        loss = functools.partial(loss_fn, frozen={}, batch=batch, counts={"tokens": 1.0})
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()
        analysis = compiled.memory_analysis()
        temporaries[chunk] = analysis.temp_size_in_bytes
    whole = SLOTS * vocabulary * 4
    table = 32 * vocabulary * 4  # the embedding's gradient, which is there twice for a moment
    assert temporaries[0] > 2 * whole
    assert temporaries[10] < whole / 2 + 2 * table, temporaries
