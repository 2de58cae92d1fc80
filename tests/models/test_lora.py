"""Low-rank adapters: what they add, and their derivative."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.config import LORA_TARGETS, LoraConfig
from spa_jax.models import lora, names, transformer
from tests import tiny

CONFIG = tiny.tiny_config()
PARAMS = transformer.init(CONFIG, jax.random.key(0))
ALL = LoraConfig(rank=4, alpha=8.0, targets=LORA_TARGETS)


def test_a_new_adapter_changes_nothing():
    adapter = lora.init(ALL, PARAMS, jax.random.key(1))
    merged = lora.merge(ALL, PARAMS, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)
    a = np.asarray(adapter["layers"]["down"]["a"])
    assert a.shape == (2, 64, 4)
    assert 0.1 < np.abs(a).max() <= 1 / 8  # 1 / sqrt(64 inputs)


def test_merged_by_hand():
    kernels = {"q": {"kernel": jnp.ones((1, 2, 3))}, "v": {"kernel": jnp.ones((1, 2, 1))}}
    params = {"layers": kernels}
    adapter = {"layers": {"q": {"a": jnp.array([[[1.0], [2.0]]]), "b": jnp.array([[[3.0, 0, 1]]])}}}
    merged = lora.merge(LoraConfig(rank=1, alpha=0.5, targets=("q",)), params, adapter)
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"], [[[2.5, 1, 1.5], [4, 1, 2]]])
    assert merged["layers"]["v"] is params["layers"]["v"]


def _trained(config: LoraConfig):
    """An adapter whose b is not 0 any more."""
    adapter = lora.init(config, PARAMS, jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), adapter)


def test_every_matrix_can_have_one():
    assert tuple(names.MATRICES) == LORA_TARGETS
    assert set(LORA_TARGETS) == {k for k, v in PARAMS["layers"].items() if "kernel" in v}


@pytest.mark.parametrize("targets", [("q", "v"), LORA_TARGETS], ids="-".join)
def test_attached_computes_what_merged_does(targets):
    config = LoraConfig(rank=3, alpha=6.0, targets=targets)
    biased = dataclasses.replace(CONFIG, qkv_bias=True)
    params = transformer.init(biased, jax.random.key(0))
    adapter = _trained(config)
    attached = lora.attach(config, params, adapter)
    assert attached["layers"]["q"]["kernel"] is params["layers"]["q"]["kernel"]  # no copy
    ids = jnp.arange(12).reshape(2, 6)
    ours, theirs, base = (
        transformer.hidden_states(biased, tree, ids, ids % 6, jnp.ones_like(ids))
        for tree in (attached, lora.merge(config, params, adapter), params)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.abs(ours - base).max() > 0.1


def test_no_derivative_of_a_weight_is_computed():
    """Forward and backward of the base's products cost 2/3 of what training them does."""
    wide = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=512, head_dim=32)
    params = transformer.init(wide, jax.random.key(0))
    config = LoraConfig(rank=1, targets=LORA_TARGETS)
    adapter = lora.init(config, params, jax.random.key(1))
    ids = jnp.arange(64)[None]

    def loss(params):
        hidden = transformer.hidden_states(wide, params, ids, ids, jnp.ones_like(ids))
        return jnp.sum(jnp.square(hidden))

    def adapted(adapter, params):
        return loss(lora.attach(config, params, adapter))

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    forward, whole = flops(loss, params), flops(jax.grad(loss), params)
    ours = flops(jax.grad(adapted), adapter, params)
    assert whole > 2.5 * forward
    assert ours < 0.75 * whole


def test_the_gradient_is_the_adapters():
    config = LoraConfig(rank=2, targets=("q", "v"))
    adapter = lora.init(config, PARAMS, jax.random.key(1))
    ids = jnp.arange(6)[None]

    def loss(adapter):
        params = lora.attach(config, PARAMS, adapter)
        hidden = transformer.hidden_states(CONFIG, params, ids, ids, jnp.ones_like(ids))
        return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape)))

    gradient = jax.jit(jax.grad(loss))(adapter)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    for name in ("q", "v"):
        np.testing.assert_array_equal(gradient["layers"][name]["a"], 0)  # b is 0
        assert np.any(np.asarray(gradient["layers"][name]["b"]) != 0)
