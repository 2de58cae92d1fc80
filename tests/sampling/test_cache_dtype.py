"""A cache of numbers of its own: what it holds is rounded, and nothing else is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax import play, policy
from spa_jax.config import ComputeConfig, SamplingConfig
from spa_jax.models.kernels import attention, native
from spa_jax.training import memory
from tests import tiny
from tests.sampling import test_engine

KERNELS = ["xla", pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()),
                                                                  reason="no C++ compiler"))]


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_it_holds_is_rounded_and_multiplied_as_it_is(kernel):
    """Exactly what attention to the rounded numbers gives, in float32."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 1, 4, 8), (2, 2, 8, 16), (2, 2, 16, 8))
    )
    rounded = (k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    positions = jnp.asarray([[3], [11]])
    seen = jnp.arange(16) <= positions[:, :, None]

    def attend(kernel, cache):
        return attention.cached(kernel, q, cache, positions=positions, seen=seen, rows=None)

    wide = attend("xla", jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    narrow = attend(kernel, rounded)
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide)
    assert not np.array_equal(narrow, attend("xla", (k, v)))


def test_an_engine_with_half_the_cache_writes_nearly_the_same(tmp_path):
    """No token ends a turn, and the first one depends on the prompt alone."""
    player = policy.load(tiny.tiny_policy(tmp_path / "tiny"))
    found = {}
    for dtype in ("", "float32", "bfloat16"):
        sampling = SamplingConfig(
            slots=1, context_length=64, cache_dtype=dtype, temperature=0.0, max_new_tokens=1
        )
        engine = play.make_engine(player, sampling, 1, 0)
        state = engine._state
        assert state.hidden.dtype == jnp.float32
        assert {x.dtype for x in jax.tree.leaves(state.cache)} == {jnp.dtype(dtype or "float32")}
        engine.open(0, 1)
        found[dtype] = test_engine._turn(engine, {0: list(range(5, 45))})[0]
    assert found[""] == found["float32"]
    difference = found["bfloat16"].log_probs[0] - found[""].log_probs[0]
    assert 0 < abs(difference) < 0.02


def test_the_plan_counts_it():
    sampling = SamplingConfig(slots=4, context_length=64)
    config = dataclasses.replace(tiny.CONFIG, compute=ComputeConfig(compute_dtype="float32"))
    numbers = 2 * 4 * 64 * 2 * 16 * 2  # keys and values, slots, places, heads, K, layers
    half = dataclasses.replace(sampling, cache_dtype="bfloat16")
    assert memory.exploration(config, sampling).cache == 4 * numbers
    assert memory.exploration(config, half).cache == 2 * numbers
