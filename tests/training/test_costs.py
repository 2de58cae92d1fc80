"""What an update costs: products counted by XLA, peaks by the name of a device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax import chips
from spa_jax.models import transformer
from spa_jax.training import costs
from tests import tiny

LENGTH = 64


def _trajectory(written: int):
    step_id = [-1] * (LENGTH - written) + [0] * written
    one = tiny.random_trajectory(np.random.default_rng(0))
    return dataclasses.replace(one, token_ids=tuple(range(LENGTH)), step_id=tuple(step_id))


def test_products_of_the_layers_are_those_that_xla_counts():
    config = dataclasses.replace(tiny.CONFIG, num_layers=1)
    deeper = dataclasses.replace(tiny.CONFIG, num_layers=2)

    def counted(config) -> float:
        return costs.update_flops(config, [_trajectory(8)]) / 3

    matrices = sum(
        2 * leaf.size * LENGTH
        for leaf in jax.tree.leaves(
            jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))["layers"]
        )
        if leaf.ndim == 3
    )
    query = jnp.zeros((config.num_heads, LENGTH, config.head_dim))
    pairs = jax.jit(lambda q: jnp.einsum("htd,hsd->hts", q, q)).lower(query).compile()
    scores = pairs.cost_analysis()["flops"]  # of all pairs; two such products, half of them causal
    assert counted(deeper) - counted(config) == pytest.approx(matrices + scores)
    head = 2 * config.vocab_size * config.hidden_size * 8
    assert counted(config) == pytest.approx(matrices + scores + head)


def test_what_is_not_trained_costs_no_gradient_of_weights():
    whole = costs.update_flops(tiny.CONFIG, [_trajectory(8)])
    assert costs.update_flops(tiny.CONFIG, [_trajectory(8)], adapters=True) == whole * 2 / 3
    top = costs.update_flops(tiny.CONFIG, [_trajectory(8)], layers=1)
    head = 3 * 2 * tiny.CONFIG.vocab_size * tiny.CONFIG.hidden_size * 8
    assert top - head == pytest.approx((whole - head) / tiny.CONFIG.num_layers)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
    ],
)
def test_a_device_is_known_by_the_beginning_of_its_kind(kind, flops):
    found = chips.peak(kind)
    assert found is not None and found.flops == flops and found.bandwidth > 0


def test_a_kind_that_only_begins_like_another_is_not_taken_for_it():
    assert chips.peak("NVIDIA L40S") is None and chips.peak("NVIDIA L4") is not None


def test_a_cpu_has_no_peak_and_tells_the_memory_of_its_process():
    assert chips.peak(jax.devices()[0].device_kind) is None
    shares = costs.shares(1e12, 1.0, jax.devices())
    assert shares.keys() == {"memory_gib"}
    held = jnp.ones(2**26, jnp.float32)  # a quarter of a GiB
    assert costs.memory_gib() >= shares["memory_gib"] > 0.1
    del held


def test_mfu_is_the_share_of_all_devices_peak(monkeypatch):
    peak = chips.Peak(flops=1e12, bandwidth=1e9)
    monkeypatch.setitem(chips._KINDS, jax.devices()[0].device_kind, peak)
    shares = costs.shares(1e12, 2.0, [jax.devices()[0]] * 4)
    assert shares["mfu"] == pytest.approx(0.125)
