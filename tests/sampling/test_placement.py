"""An engine whose devices share each weight and the cache, against the engine of one device."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from spa_jax import play, policy
from spa_jax.compiler.hlo import Program
from spa_jax.config import ComputeConfig, SamplingConfig
from spa_jax.errors import UserError
from spa_jax.models import tree
from spa_jax.sampling import placement, programs, weights
from spa_jax.sampling.engine import Engine
from spa_jax.sampling.parallel import ParallelEngine
from spa_jax.sampling.placement import Placement
from tests import tiny
from tests.sampling import test_engine
from tests.sampling.test_engine import CONFIG, DRAWN, EOT, GREEDY

DEVICES = tuple(jax.local_devices())
FOUR_HEADS = dataclasses.replace(CONFIG, num_kv_heads=4)
# Its vocabulary is no multiple of 4, and it has what Qwen has.
UNEVEN = dataclasses.replace(
    FOUR_HEADS, vocab_size=386, tie_embeddings=False, qkv_bias=True, qk_norm=True
)


def _engine(config, sampling, devices, slots=3) -> Engine:
    return Engine(
        config,
        _params(config),
        slots=slots,
        context_length=test_engine.CONTEXT,
        sampling=sampling,
        end_of_turn=(EOT,),
        seed=test_engine.SEED,
        devices=devices,
    )


def _params(config):
    if config is CONFIG:
        return test_engine.PARAMS
    if config is FOUR_HEADS:
        return tiny.tiny_params(config)
    return jax.tree.map(lambda x: 0.2 * x, tiny.random_params(config))


def _assert_same(ours, theirs) -> None:
    assert [e.ids for e in ours] == [e.ids for e in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    assert sum(len(e.ids) for e in ours) > 100


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("config", "tensor"),
    [(CONFIG, 2), (FOUR_HEADS, 4), (UNEVEN, 4)],
    ids=["2 devices", "4 devices", "uneven vocabulary"],
)
def test_devices_that_share_a_model_draw_what_one_draws(config, tensor, sampling):
    episodes = [
        test_engine._play(_engine(config, sampling, devices), test_engine._episodes(), 0)
        for devices in (DEVICES[:1], DEVICES[2 : 2 + tensor])
    ]
    _assert_same(*episodes)


def test_several_such_engines_play_side_by_side():
    def make(slots, devices):
        return _engine(CONFIG, DRAWN, devices, slots)

    engine = ParallelEngine(make, 4, placement.groups(DEVICES[:4], 2))
    engine.warm_up()
    compiled = engine.compiled
    one = _engine(CONFIG, DRAWN, DEVICES[:1])
    ours, theirs = (test_engine._play(e, test_engine._episodes(), 1) for e in (engine, one))
    _assert_same(ours, theirs)
    assert engine.compiled == compiled
    used = [part._state.hidden.devices() for part in engine._engines]
    assert used == [set(DEVICES[:2]), set(DEVICES[2:4])]


def test_what_lies_where_by_hand():
    """Parts of a half each: heads, units and ids; norms, and what is not even, whole."""
    here = Placement(DEVICES[:2])
    config = dataclasses.replace(UNEVEN, num_kv_heads=2, vocab_size=385)
    params = tiny.random_params(config)
    placed = weights.place(config, params, here)
    wanted = tree.unstack(jax.device_put(params), config.dtype, config.matmul_dtype)
    tiny.assert_same(jax.device_get(placed), jax.device_get(wanted))
    parts = jax.tree.map(lambda x: x.addressable_shards[1].data.shape, placed["layers"][1])
    assert parts == {
        "attn_norm": {"scale": (32,)}, "mlp_norm": {"scale": (32,)},
        "q": {"transposed": (16, 32), "bias": (16,)}, "q_norm": {"scale": (8,)},
        "k": {"transposed": (8, 32), "bias": (8,)}, "k_norm": {"scale": (8,)},
        "v": {"transposed": (8, 32), "bias": (8,)},
        "o": {"transposed": (32, 16)}, "down": {"transposed": (32, 32)},
        "gate": {"transposed": (32, 32)}, "up": {"transposed": (32, 32)},
    }
    whole = placed["embed"]["embedding"]
    assert whole.addressable_shards[1].data.shape == whole.shape == (385, 32)
    even = here.put({"embed": {"embedding": np.zeros((386, 32))}})["embed"]["embedding"]
    assert even.addressable_shards[1].data.shape == (193, 32)
    # The order of devices is that of the heads.
    np.testing.assert_array_equal(
        placed["layers"][1]["k"]["transposed"].addressable_shards[1].data,
        params["layers"]["k"]["kernel"][1].T[8:],
    )


def test_each_device_holds_its_heads_of_the_cache():
    engine = _engine(CONFIG, DRAWN, DEVICES[:2])
    for keys, values in engine._state.cache:
        for x in (keys, values):
            assert [s.data.shape for s in x.addressable_shards] == [(3, 1, *x.shape[2:])] * 2
    assert engine._state.hidden.sharding.is_fully_replicated


def test_one_device_has_the_shardings_it_always_had():
    here = Placement(DEVICES[3:4])
    one = jax.sharding.SingleDeviceSharding(DEVICES[3])
    assert here.replicated == here.cache == one
    assert set(jax.tree.leaves(here.weights(test_engine.PARAMS))) == {one}
    assert here.computed(CONFIG) is CONFIG


def test_no_weight_and_no_cache_travels():
    """What the devices exchange in a step is smaller than a matrix, but for the logits."""
    engine = _engine(FOUR_HEADS, DRAWN, DEVICES[:4])
    shape = engine._programs._shape
    name = f"decode {shape.context_length}"
    found = Program(programs.lower(shape, [name])[name].compile().as_text()).collectives
    assert found
    logits = shape.slots * FOUR_HEADS.vocab_size * 4
    assert max(c.size for c in found) <= logits


def test_native_attention_is_computed_by_xla():
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(attention="native"))
    assert Placement(DEVICES[:2]).computed(config).compute.attention == "xla"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, "--sampling_tensor=3: .*2 key/value heads.* multiple of 3"),
        (4, "--sampling_tensor=4: .*2 key/value heads.* multiple of 4"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(tensor, message, tmp_path):
    player = policy.load(tiny.tiny_policy(tmp_path / "tiny"))
    sampling = SamplingConfig(slots=3, context_length=64, sampling_tensor=tensor)
    with pytest.raises(UserError, match=message):
        play.make_engine(player, sampling, 9, 0)
    with pytest.raises(UserError, match=re.escape(f"--sampling_tensor={tensor}")):
        _engine(CONFIG, DRAWN, DEVICES[:tensor])


def test_devices_that_would_be_left_over_are_refused():
    sampling = SamplingConfig(context_length=64, sampling_tensor=3)
    with pytest.raises(UserError, match="--sampling_tensor=3: there are 8 devices .*multiple of 3"):
        play.most_slots(sampling)


@pytest.mark.parametrize(("episodes", "slots"), [(1, 1), (4, 4), (5, 8), (100, 12)])
def test_slots_are_those_of_each_engine(episodes, slots, tmp_path):
    """Four engines of two devices, three slots each."""
    player = policy.load(tiny.tiny_policy(tmp_path / "tiny"))
    sampling = SamplingConfig(slots=3, context_length=64, sampling_tensor=2)
    assert play.make_engine(player, sampling, episodes, 0).slots == slots
    assert play.most_slots(sampling) == 12
