"""The state of a training stage, and the pure functions that every update is made of.

    accumulate   (params, frozen, (grads, sums), batch, counts) -> (grads, sums)   a microbatch
    apply        (state, grads) -> (state, gradient norm)                          an update

A loss function gives a *sum* divided by the update's global counts, so gradients of
microbatches and devices simply add up, whatever rows they were dealt.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Params = Any
Counts = Mapping[str, jax.Array]  # global counts of the update, such as "tokens"
Sums = Mapping[str, jax.Array]  # sums of the update; each is divided by a count in the end
# (trained parameters, frozen parameters, batch, counts) -> (loss, sums)
LossFn = Callable[[Params, Params, Any, Counts], tuple[jax.Array, Sums]]

CLIP_NORM = 1.0  # of the policy's gradients, in SFT and PPO


@struct.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
      params: the trained parameters.
      opt_state: the optimiser's.
      update: int32, updates so far.
      skipped: int32, updates that were not made because a gradient was not finite.
    """

    params: Params
    opt_state: Any
    update: jax.Array
    skipped: jax.Array


class Guarded(optax.GradientTransformation):
    """An optimiser that changes nothing, itself included, where a gradient is not finite."""


def create(params: Params, optimizer: Guarded) -> TrainState:
    """The state before the first update; the optimiser's part is float32, whatever is trained."""
    # Two arrays, though both are zero: an update donates the state, and XLA refuses to be given
    # the same buffer twice.
    update, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(_float32(params)), update, skipped)


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def zero_gradients(params: Params) -> Params:
    """float32 zeros in the parameters' shapes, to add an update's gradients to."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)


@struct.dataclass
class AdamWState:
    """What AdamW remembers.

    Attributes:
      count: int32, the updates that were made.
      mu: the mean of the gradients.
      nu: that of their squares.
    """

    count: jax.Array
    mu: Params
    nu: Params


def adamw(schedule: optax.ScalarOrSchedule, *, clip_norm: float, weight_decay: float) -> Guarded:
    """AdamW (arXiv 1711.05101) behind a clip of the global norm: optax's numbers, less memory.

    Behind `optax.adamw`, a guard against gradients that are not finite makes XLA compute every new
    moment twice from the old one, once to keep and once for the weights.  The old one cannot be
    overwritten then: both moments are copied, and memory is read or written 21 times the weights'
    size on a CPU.  Here the weights are made from the new moments, which replace the old in place:
    11 times, and no copy.
    """
    b1, b2, epsilon = 0.9, 0.999, 1e-8

    def init(params: Params) -> AdamWState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamWState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads: Params, state: AdamWState, params: Params) -> tuple[Params, AdamWState]:
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm)
        clip = clip_norm / jnp.maximum(norm, clip_norm)

        def mean(decay: float, power: int, old: Params) -> Params:
            def one(m: jax.Array, g: jax.Array) -> jax.Array:
                return jnp.where(finite, decay * m + (1 - decay) * (clip * g) ** power, m)

            return jax.tree.map(one, old, grads)

        count = state.count + finite
        # Without the barrier XLA would compute the new moments twice, see the docstring.
        mu, nu = jax.lax.optimization_barrier((mean(b1, 1, state.mu), mean(b2, 2, state.nu)))
        rate = schedule(state.count) if callable(schedule) else schedule
        mu_scale, nu_scale = 1 / (1 - b1**count), 1 / (1 - b2**count)

        def change(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            step = m * mu_scale / (jnp.sqrt(v * nu_scale) + epsilon)
            return jnp.where(finite, -rate * (step + weight_decay * p.astype(jnp.float32)), 0.0)

        return jax.tree.map(change, params, mu, nu), AdamWState(count, mu, nu)

    return Guarded(init, update)


@struct.dataclass
class AveragedState:
    """What an optimiser remembers whose weights are averaged.

    Attributes:
      inner: what it would remember otherwise.
      mean: float32, the exponential moving average of the weights.
    """

    inner: AdamWState
    mean: Params


def averaged(optimizer: Guarded, decay: float) -> Guarded:
    """The same updates, and an exponential moving average of the weights that they make.

    Where a constant rate keeps the weights moving about, their average lies still: its held-out
    loss falls smoothly, and more updates change little (Polyak and Juditsky 1992; Morales-Brotons
    et al., arXiv 2411.18704).

    Args:
      optimizer: `adamw`.
      decay: of the average; at most n / (n + 9) after n updates, or it would long be made of the
        weights before the first.
    """

    def init(params: Params) -> AveragedState:
        # A copy: an update donates its state, and no buffer may be donated twice.
        return AveragedState(optimizer.init(params), jax.tree.map(jnp.copy, params))

    def update(grads: Params, state: AveragedState, params: Params) -> tuple[Params, AveragedState]:
        changes, inner = optimizer.update(grads, state.inner, params)
        share = 1 - jnp.minimum(decay, inner.count / (inner.count + 9))
        share = jnp.where(inner.count > state.inner.count, share, 0.0)
        mean = optax.incremental_update(optax.apply_updates(params, changes), state.mean, share)
        return changes, AveragedState(inner, mean)

    return Guarded(init, update)


def policy_params(state: TrainState) -> Params:
    """The weights that are evaluated and saved: the average where there is one, else the newest."""
    if not isinstance(state.opt_state, AveragedState):
        return state.params
    return jax.tree.map(lambda m, p: m.astype(p.dtype), state.opt_state.mean, state.params)


def accumulate(
    params: Params,
    frozen: Params,
    totals: tuple[Params, Sums],
    batch: Any,
    counts: Counts,
    *,
    loss_fn: LossFn,
    add_up: Callable[[Params, Sums], tuple[Params, Sums]] = lambda grads, sums: (grads, sums),
) -> tuple[Params, Sums]:
    """Adds one microbatch's gradients and sums to those before it.

    Args:
      params: what is trained.
      frozen: what the loss needs beside it.
      totals: (gradients, sums) of the update's microbatches so far.
      batch: the microbatch, of the loss's own kind.
      counts: the update's global counts.
      loss_fn: the loss.
      add_up: makes a microbatch's of one device's, where several have rows of their own.

    Returns:
      (gradients, sums) with this microbatch's.
    """
    grads, sums = totals
    gradient, new_sums = jax.grad(loss_fn, has_aux=True)(params, frozen, batch, counts)
    gradient, new_sums = add_up(gradient, dict(new_sums))
    grads = jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, gradient)
    return grads, jax.tree.map(jnp.add, sums, new_sums)


def apply(
    state: TrainState,
    grads: Params,
    *,
    optimizer: Guarded,
    axis_name: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """One optimiser step; a gradient that is not finite leaves the parameters untouched.

    Args:
      state: the state.
      grads: the accumulated gradients of this device.
      optimizer: as in `create`.
      axis_name: the mapped axis whose devices' gradients are added up.

    Returns:
      The new state and the gradient's global norm before clipping.
    """
    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
    grads = _float32(grads)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return (
        TrainState(
            params=params,
            opt_state=opt_state,
            update=state.update + 1,
            skipped=state.skipped + jnp.logical_not(finite),
        ),
        norm,
    )
