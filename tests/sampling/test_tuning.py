"""What an accelerator's engine does otherwise gives the same tokens; a TPU's copies no cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.config import ComputeConfig
from spa_jax.models.config import ModelConfig
from spa_jax.models.kernels.attention import CacheOrder
from spa_jax.sampling import programs, tuning
from spa_jax.sampling.engine import Engine
from spa_jax.sampling.programs import Shape
from spa_jax.sampling.tuning import CPU, Tuning
from tests.sampling import test_engine

TPU = tuning.of("tpu", 2)
DRAWN = test_engine.DRAWN


def _shape(**settings) -> Shape:
    settings = {"tuning": CPU, "slots": 4, "context_length": 32} | settings
    return Shape(
        config=test_engine.CONFIG, dtype=jnp.dtype("float32"), steps=4, end_of_turn=(2,),
        temperature=1.0, top_k=0, top_p=1.0, devices=(jax.local_devices()[0],), **settings,
    )


def test_the_order_in_memory_by_hand():
    """Slot, place, head, K of an array of numbers that say where they belong."""
    slots, heads, size, places = 2, 3, 4, 5
    keys = np.arange(slots * heads * size * places).reshape(slots, heads, size, places)
    values = keys.swapaxes(2, 3)
    order = tuning.of("tpu", 3).order
    assert (keys.transpose(order.keys) == values.transpose(order.values)).all()
    assert keys.transpose(order.keys).shape == (slots, places, heads, size)
    one = tuning.of("tpu", 1).order
    assert keys.transpose(one.keys).shape == (slots, heads, places, size)
    assert values.transpose(one.values).shape == (slots, heads, places, size)
    assert tuning.of("cpu", 3).order is None


def test_the_places_that_decoding_reads_by_hand():
    """Parts of the context, in 128s; all of it is always there, and nothing is larger."""
    both = Tuning(parts=(4, 2, 1))
    assert both.places(4096) == (1024, 2048, 4096)
    assert both.places(1000) == (256, 512, 1000)
    assert both.places(192) == (128, 192)
    assert both.places(128) == (128,) and both.places(64) == (64,)
    assert CPU.places(4096) == (4096,)


def test_the_rows_of_a_prefill_call_by_hand():
    assert _shape(slots=9).rows == 3
    assert _shape(slots=90).rows == 23
    assert _shape(slots=90, tuning=TPU).rows == TPU.most_rows == 4


@pytest.mark.parametrize(
    "tuned",
    [
        TPU,
        tuning.of("tpu", 1),
        tuning.of("gpu", 2),
        Tuning(chunks=(3, 130)),
        Tuning(most_rows=1, chunks=(8,)),
        Tuning(parts=(2, 1)),
    ],
    ids=["tpu", "one head", "gpu", "chunks", "one row", "parts"],
)
def test_a_tuning_changes_no_token(tuned: Tuning):
    """It runs on this CPU as it would elsewhere, in the order that a TPU keeps its cache in."""
    _plays_the_same(test_engine.CONFIG, tuned)


def test_a_tuning_changes_no_token_of_xlas_attention():
    """The kernel that accelerators run, with a part of the places read."""
    compute = ComputeConfig(compute_dtype="float32", attention="xla")
    engine = _plays_the_same(dataclasses.replace(test_engine.CONFIG, compute=compute), TPU)
    assert engine._programs._shape.places == (128, 192)


def _plays_the_same(config: ModelConfig, tuned: Tuning) -> Engine:
    wanted = test_engine._play(test_engine._shared_engine(4, DRAWN), test_engine._episodes(), 0)
    engine = Engine(
        config, test_engine.PARAMS, slots=4, context_length=test_engine.CONTEXT, sampling=DRAWN,
        end_of_turn=(test_engine.EOT,), seed=test_engine.SEED, tuned=tuned,
    )
    engine.warm_up()
    order = tuned.order or CacheOrder((0, 1, 2, 3), (0, 1, 2, 3))
    played = test_engine._play(engine, test_engine._episodes(), 1)
    for ours, theirs in zip(played, wanted, strict=True):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
    keys, values = engine._state.cache[0]
    assert keys.format.layout.major_to_minor == order.keys
    assert values.format.layout.major_to_minor == order.values
    return engine


def test_decoding_reads_as_many_places_as_the_longest_slot_needs():
    """Three programs by hand; what lies behind the places that are read is not seen at all."""
    engine = test_engine._engine(
        2, dataclasses.replace(DRAWN, max_new_tokens=4), context_length=512,
        tuned=Tuning(parts=(4, 2, 1)),
    )
    assert engine._programs._shape.places == (128, 256, 512)

    def ran(lengths: dict[int, int]) -> set[str]:
        engine._programs._executables.clear()
        for slot in lengths:
            engine.open(slot, slot)
            engine._cached[slot] = []
        test_engine._turn(engine, {slot: [5 + slot] * n for slot, n in lengths.items()})
        return {name for name in engine._programs._executables if name.startswith("decode")}

    # Before the first of four steps at most 124 tokens are in a cache of which 128 are read.
    assert ran({0: 124}) == {"decode 128"}
    assert ran({0: 125}) == {"decode 256"}
    assert ran({0: 30, 1: 252}) == {"decode 256"}
    assert ran({0: 30, 1: 253}) == {"decode 512"}
    assert ran({0: 511, 1: 3}) >= {"decode 512"}
    # A slot that is long and does not write counts for nothing.
    assert ran({1: 20}) == {"decode 128"}


def test_lowering_takes_shapes_alone():
    shape = _shape()
    lowered = programs.lower(shape)
    assert list(lowered) == programs.names_of(shape)
    assert list(programs.lower(shape, ["decode 32"])) == ["decode 32"]
    with pytest.raises(KeyError):
        programs.lower(shape, ["prefill 17"])
    # What it lowers is what an engine compiles: the arguments of one are those of the other.
    state, params = lowered["decode 32"].in_avals[0][1], lowered["decode 32"].in_avals[0][0]
    engine = test_engine._engine(4, DRAWN, context_length=32)
    for ours, theirs in ((state, engine._state), (params, engine._params)):
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), ours, theirs)
        assert jax.tree.all(same)
