"""Dtypes of what is trained: bfloat16 weights with a float32 optimiser, gradients in either."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax.training import partition, parts
from spa_jax.training import state as state_lib
from tests import tiny


def _loss(params, frozen, batch, counts):
    """sum of (w - x)^2 over a microbatch's numbers x."""
    del frozen
    error = jnp.sum(jnp.square(params["w"].astype(jnp.float32) - batch)) / counts["n"]
    return error, {"error": error}


def _updated(trainer_of, param_dtype):
    optimizer = state_lib.adamw(0.25, clip_norm=1e9, weight_decay=0.1)
    params = {"w": np.arange(1, 5, dtype=np.float32).astype(jnp.dtype(param_dtype))}
    state = state_lib.create(params, optimizer)
    trainer = trainer_of(optimizer)
    state = trainer.replicate(state)
    # No gradient near 0: Adam divides it by its own size, and would make rounding a whole step.
    batches = [np.full((1, 4), x, np.float32) for x in (0.5, 2.75, 3.25)]
    state, sums = trainer.update(state, batches, {"n": 3.0})
    return jax.device_get(trainer.unreplicate(state)), sums


TRAINERS = {
    "pmap": lambda optimizer: partition.Pmap(_loss, optimizer, 1),
    "mesh": lambda optimizer: partition.Mesh(_loss, optimizer, (1, 1)),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_the_optimiser_is_float32_whatever_is_trained(trainer, param):
    state, sums = _updated(TRAINERS[trainer], param)
    exact, wanted = _updated(TRAINERS["pmap"], "float32")
    assert state.params["w"].dtype == jnp.dtype(param)
    moments = [x for x in jax.tree.leaves(state.opt_state) if np.size(x) == 4]
    assert len(moments) == 2 and {x.dtype for x in moments} == {np.dtype("float32")}
    np.testing.assert_allclose(
        state.params["w"].astype(np.float32), exact.params["w"], rtol=1 / 128
    )
    assert sums["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1 / 128)


def test_adamw_in_float32_is_optax_s_own():
    """One update by hand: g = 2 (w - mean x), then optax."""
    state, _ = _updated(TRAINERS["pmap"], "float32")
    w = np.arange(1, 5, dtype=np.float32)
    gradient = {"w": (2 * (3 * w - 6.5) / 3).astype(np.float32)}
    optimizer = optax.adamw(0.25, weight_decay=0.1)
    changes, _ = optimizer.update(gradient, optimizer.init({"w": w}), {"w": w})
    np.testing.assert_allclose(state.params["w"], w + changes["w"], rtol=1e-6)


def _adamw_updates(optimizer, gradients):
    """The parameters after every update, and the last state."""
    params = {"a": np.linspace(-1, 2, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(2)}
    state = state_lib.create(jax.tree.map(jnp.float32, params), optimizer)
    step, seen = jax.jit(functools.partial(state_lib.apply, optimizer=optimizer)), []
    for gradient in gradients:
        state, _ = step(state, gradient)
        seen.append(jax.device_get(state.params))
    return seen, jax.device_get(state)


def _gradients(*sizes):
    rng = np.random.default_rng(3)
    return [
        {"a": (size * rng.normal(size=(2, 3))).astype(np.float32), "b": np.float32([size, -size])}
        for size in sizes
    ]


def test_adamw_is_optax_s_own_over_several_updates():
    """Clipped and unclipped gradients under a schedule."""
    rate = optax.linear_schedule(0.0, 0.3, 4)
    ours, _ = _adamw_updates(
        state_lib.adamw(rate, clip_norm=2.0, weight_decay=0.1), _gradients(0.1, 30.0, 1e-4, 2.0)
    )
    chain = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(rate, weight_decay=0.1))
    theirs, _ = _adamw_updates(chain, _gradients(0.1, 30.0, 1e-4, 2.0))
    for got, wanted in zip(ours, theirs, strict=True):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-6), got, wanted)
    assert not np.allclose(ours[0]["a"], ours[-1]["a"])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_adamw_goes_on_as_if_a_gradient_that_is_not_finite_had_never_been(at, poison):
    optimizer = state_lib.adamw(0.1, clip_norm=2.0, weight_decay=0.1)
    good = _gradients(1.0, 5.0)
    bad = {"a": np.full((2, 3), poison, np.float32), "b": np.ones(2, np.float32)}
    seen, state = _adamw_updates(optimizer, [*good[:at], bad, *good[at:]])
    _, wanted = _adamw_updates(optimizer, good)
    assert (state.update, state.skipped) == (3, 1)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, wanted.opt_state)
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)
    if at:
        jax.tree.map(np.testing.assert_array_equal, seen[at], seen[at - 1])


def test_adamw_overwrites_what_it_was_given():
    """No copy of weights or moments: XLA's analysis finds next to no temporary memory."""
    optimizer = state_lib.adamw(0.1, clip_norm=2.0, weight_decay=0.1)
    grads = {"w": jnp.ones((1 << 10, 1 << 10))}
    state = state_lib.create(grads, optimizer)
    step = jax.jit(functools.partial(state_lib.apply, optimizer=optimizer), donate_argnums=0)
    analysis = step.lower(state, grads).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < grads["w"].nbytes / 8
    assert analysis.alias_size_in_bytes >= 3 * grads["w"].nbytes


def test_averaged_weights_by_hand():
    """The newest weights' share is 9 / (n + 9), and 1 - decay where that is more."""
    plain, _ = _adamw_updates(
        state_lib.adamw(0.1, clip_norm=2.0, weight_decay=0.1), _gradients(1, 5, 2)
    )
    optimizer = state_lib.averaged(
        state_lib.adamw(0.1, clip_norm=2.0, weight_decay=0.1), decay=0.2
    )
    seen, state = _adamw_updates(optimizer, _gradients(1, 5, 2))
    jax.tree.map(np.testing.assert_array_equal, seen, plain)  # the updates are the same
    mean = np.linspace(-1, 2, 6, dtype=np.float32).reshape(2, 3)
    for params, share in zip(plain, (0.9, 9 / 11, 0.8), strict=True):
        mean = share * params["a"] + (1 - share) * mean
    np.testing.assert_allclose(state_lib.policy_params(state)["a"], mean, rtol=1e-6)


@pytest.mark.parametrize("at", [0, 1])
def test_an_average_takes_no_part_of_an_update_that_was_not_made(at):
    optimizer = state_lib.averaged(state_lib.adamw(0.1, clip_norm=2.0, weight_decay=0.0), 0.9)
    good = _gradients(1.0, 5.0)
    bad = {"a": np.full((2, 3), np.nan, np.float32), "b": np.ones(2, np.float32)}
    _, state = _adamw_updates(optimizer, [*good[:at], bad, *good[at:]])
    _, wanted = _adamw_updates(optimizer, good)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, wanted.opt_state)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_an_average_is_float32_and_kept_in_the_dtype_of_the_weights(trainer, param):
    optimizer = state_lib.averaged(state_lib.adamw(0.25, clip_norm=1e9, weight_decay=0.0), 0.9)
    start = np.arange(1, 5, dtype=np.float32)
    made = TRAINERS[trainer](optimizer)
    state = made.replicate(state_lib.create({"w": start.astype(jnp.dtype(param))}, optimizer))
    state, _ = made.update(state, [np.full((1, 4), 2.75, np.float32)], {"n": 1.0})
    state = jax.device_get(made.unreplicate(state))
    assert state.opt_state.mean["w"].dtype == np.float32
    mean = state_lib.policy_params(state)["w"]
    assert mean.dtype == jnp.dtype(param)
    wanted = 0.9 * state.params["w"].astype(np.float32) + 0.1 * start
    np.testing.assert_allclose(mean.astype(np.float32), wanted, rtol=1 / 128)
    assert not np.allclose(mean.astype(np.float32), start)


def test_what_is_trained_is_cast_and_what_is_saved_is_not():
    """--param_dtype rounds the trained weights; a policy's folder holds float32 as ever."""
    config = tiny.tiny_config()
    compute = dataclasses.replace(config.compute, param_dtype="bfloat16")
    params = tiny.tiny_params(config)
    made = parts.split(dataclasses.replace(config, compute=compute), params, 1)
    assert {x.dtype for x in jax.tree.leaves(made.trained)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(made.frozen)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(made.frozen_in("bfloat16"))} == {jnp.dtype("bfloat16")}
    whole = made.merge(made.trained)
    assert {x.dtype for x in jax.tree.leaves(whole)} == {np.dtype("float32")}
    np.testing.assert_array_equal(whole["embed"]["embedding"], params["embed"]["embedding"])
    kernel = params["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(whole["layers"]["q"]["kernel"][0], kernel[0])
    np.testing.assert_allclose(whole["layers"]["q"]["kernel"][1], kernel[1], rtol=1 / 128)


def test_default_dtypes_copy_nothing():
    """The tree that a stage holds is the tree that it was given."""
    params = tiny.tiny_params(tiny.tiny_config())
    made = parts.split(tiny.tiny_config(), params, 0)
    for ours, given in zip(
        jax.tree.leaves(made.trained), jax.tree.leaves({"policy": params}), strict=True
    ):
        assert np.shares_memory(ours, given)
