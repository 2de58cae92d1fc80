"""The progress estimator's update: a head on a trunk that is frozen, or trained with it.

A frozen trunk's hidden states are computed once (`StepFeatures`); one that is trained reads
the tokens anew in every update (`EstimatorRows`).

What a head reads (--estimator), of an episode of two steps:

    tokens       task .. obs 0 | action 0 | .. obs 1 | action 1 | .. obs 2
    paper                              c_0                  c_1
    answer                   b                   c_0                  c_1
    value                   V_0                  V_1                  V_2       c_k = V_k+1 - V_k

`paper` says what a step is worth before the environment has answered: whether a drawer that is
opened holds what was looked for, nobody knows yet.

The sum of an episode's contributions does not say which step earned it: what every first step gets
can stand in b as well, and a clock on the others in the number of steps.  `answer` therefore reads
a state less the mean of the states behind the same step of other episodes (the *clock*).  True
advantages are like that: under the policy that played, those of all steps k have mean 0.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.attribution import estimator
from spa_jax.batching import PackedRows
from spa_jax.models import heads
from spa_jax.models.config import ModelConfig, Params
from spa_jax.training import forward
from spa_jax.training.state import Counts, LossFn, Sums

ANSWER, VALUE, PAPER = "answer", "value", "paper"
_PRIOR = 4.0  # episodes that a clock's mean over all steps counts as, where few take a step


@struct.dataclass
class StepFeatures:
    """What the estimator sees of N trajectories.

    Attributes:
      hidden: [N, S, D], the trunk's last hidden state behind each step's answer; for `paper` at
        the step's last token.
      start: [N, D], the same at the last token before the first step.
      step_mask: [N, S].
      final_reward: [N], R in [0, 1].
    """

    hidden: chex.Array
    start: chex.Array
    step_mask: chex.Array
    final_reward: chex.Array


@struct.dataclass
class EstimatorRows:
    """What the estimator sees of packed trajectories.

    Attributes:
      rows: the packed trajectories; each lies whole in one row.
      final_reward: [R, S], the R in [0, 1] of each step's trajectory.
    """

    rows: PackedRows
    final_reward: chex.Array


def kind_of(progress: Params) -> str:
    """Which form heads of these parameters are."""
    if "out" in progress:
        return PAPER
    return ANSWER if "start" in progress["0"] else VALUE


def make_clock(kind: str, features: StepFeatures) -> Params:
    """The mean state behind every step: {"clock": {"mean": [S, D]}} for ANSWER, {} for the others.

    m_k = (sum_i h_ik + a m) / (n_k + a),   m the mean over all steps, n_k the episodes that
                                            take step k, a = 4
    """
    if kind != ANSWER:
        return {}
    mask = features.step_mask[..., None] > 0
    hidden = jnp.where(mask, features.hidden, 0.0)
    count = jnp.sum(mask, 0)
    mean = jnp.sum(hidden, (0, 1)) / jnp.maximum(jnp.sum(count), 1)
    return {"clock": {"mean": (jnp.sum(hidden, 0) + _PRIOR * mean) / (count + _PRIOR)}}


def _less_clock(clocked: Params, hidden: chex.Array, number: chex.Array) -> chex.Array:
    """Hidden states [N, S, D] behind steps `number` [N, S], less the clock's if there is one."""
    if "clock" not in clocked:
        return hidden
    mean = clocked["clock"]["mean"]
    return hidden - mean[jnp.minimum(number, mean.shape[0] - 1)]


def _numbers(features: StepFeatures) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(features.step_mask.shape[1]), features.step_mask.shape)


def init(
    kind: str,
    width: int,
    members: int,
    *,
    key: jax.Array,
    features: StepFeatures,
    clock: Params,
) -> Params:
    """Heads that give 0, standardised on the features.

    Args:
      kind: ANSWER, VALUE or PAPER.
      width: units of the hidden layer; 0: linear.
      members: how many are averaged; PAPER has one.
      key: of the first layers.
      features: what they will be trained on.
      clock: of these, see `make_clock`.

    Returns:
      PAPER: a head's tree.  ANSWER: {"0": {"step": head, "start": head}, ...}, a number a member.
      VALUE: {"0": {"state": head}, ...}.
    """
    make = jax.jit(heads.Head(width=width).init)
    hidden = _less_clock(clock, features.hidden, _numbers(features))

    def head(key: jax.Array, hidden: chex.Array, mask: chex.Array) -> Params:
        params = make(key, hidden[:1])["params"]
        return heads.fit_norm(params, hidden, mask)

    if kind == PAPER:
        return head(key, hidden, features.step_mask)
    ones = jnp.ones(features.start.shape[0])
    tree: dict[str, Any] = {}
    for i, one in enumerate(jax.random.split(key, members)):
        of_step, of_start = jax.random.split(one)
        step = head(of_step, hidden, features.step_mask)
        tree[str(i)] = (
            {"step": step, "start": head(of_start, features.start, ones)}
            if kind == ANSWER
            else {"state": step}
        )
    return tree


def _members(progress: Params) -> list[Params]:
    if "out" in progress:
        return [progress]
    return [progress[name] for name in sorted(progress.keys() - {"clock"}, key=int)]


def _outputs(member: Params, hidden: chex.Array, start: chex.Array) -> tuple[jax.Array, jax.Array]:
    """What a member's heads read off the states of the steps and off those before the first."""
    if "out" in member:
        return heads.read(member, hidden), jnp.zeros(start.shape[:-1])
    of_step = member.get("step", member.get("state"))
    return heads.read(of_step, hidden), heads.read(member.get("start", of_step), start)


def _compose(
    member: Params, step: chex.Array, start: chex.Array, mask: chex.Array
) -> tuple[jax.Array, jax.Array]:
    """(c [N, S], b [N]) from what the heads read off the steps [N, S] and the starts [N]."""
    if "state" not in member:
        return step, start
    # The state before a step is the one behind the last step that wrote a token.
    number = jnp.where(mask > 0, jnp.arange(1, mask.shape[1] + 1), 0)
    before = jax.lax.cummax(jnp.pad(number, ((0, 0), (1, 0)))[:, :-1], axis=1)
    states = jnp.concatenate([start[:, None], step], axis=1)
    return step - jnp.take_along_axis(states, before, 1), start


def contributions(progress: Params, features: StepFeatures) -> tuple[jax.Array, jax.Array]:
    """What the heads give each step, and what they expect before the first.

    Args:
      progress: the heads, with their clock.
      features: of N trajectories.

    Returns:
      (c [N, S], 0 where the mask is 0; b [N], 0 for `paper`), the means of the members.
    """
    mask, found = features.step_mask, []
    hidden = _less_clock(progress, features.hidden, _numbers(features))
    for member in _members(progress):
        step, start = _outputs(member, hidden, features.start)
        c, b = _compose(member, step, start, mask)
        found.append((jnp.where(mask > 0, c, 0.0), b))
    c, b = (jnp.mean(jnp.stack(x), 0) for x in zip(*found, strict=True))
    return c, b


def _member_loss(
    member: Params,
    outputs: tuple[chex.Array, chex.Array],
    mask: chex.Array,
    final_reward: chex.Array,
    *,
    prefixes: float,
) -> tuple[jax.Array, jax.Array]:
    """(the sum of the losses, that of the squared errors at the end) of a member."""
    c, b = _compose(member, *outputs, mask)
    if "out" in member:
        error, _ = estimator.progress_loss(c, mask, final_reward)
        return error, error
    return estimator.prefix_loss(c, b, mask, final_reward, prefixes=prefixes)


def _mean_loss(losses: list[tuple[jax.Array, jax.Array]], counts: Counts) -> tuple[jax.Array, Sums]:
    loss, error = (sum(x) / len(losses) for x in zip(*losses, strict=True))
    return loss / counts["trajectories"], {"squared_error": jnp.asarray(error)}


def estimator_loss(
    params: Params, frozen: Params, batch: StepFeatures, counts: Counts, *, prefixes: float = 0.0
) -> tuple[jax.Array, Sums]:
    """L = sum_i (R_hat_i - R_i)^2 / (number of trajectories of the update), and what prefixes add.

    Source: SPA-RL, arXiv 2505.20732, section 3; see `estimator.prefix_loss`.

    Args:
      params: {"progress": heads}.
      frozen: the clock; the trunk's part is in the features.
      batch: the features.
      counts: "trajectories" of the whole update.
      prefixes: the weight of the errors behind every step; `paper` has none.

    Returns:
      The loss of these trajectories, the mean of the members', and the sum "squared_error".
    """
    hidden = _less_clock(frozen, batch.hidden, _numbers(batch))
    losses = [
        _member_loss(
            member,
            _outputs(member, hidden, batch.start),
            batch.step_mask,
            batch.final_reward,
            prefixes=prefixes,
        )
        for member in _members(params["progress"])
    ]
    return _mean_loss(losses, counts)


def trunk_loss(
    params: Params,
    frozen: Params,
    batch: EstimatorRows,
    counts: Counts,
    *,
    config: ModelConfig,
    prefixes: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """`estimator_loss`, with the hidden states computed from the tokens.

        step_trajectory   0  0  1 -1        a row of two trajectories, S = 4
        slot 0            c  c              trajectory 0 stands at its first step's slot
        slot 1                              not a first step: no trajectory
        slot 2                  c           trajectory 1

    Args:
      params: {"policy": the trunk, or what is trained of it, "progress": heads}.
      frozen: {"policy": the rest} or {}, and the clock.
      batch: the rows.
      counts: "trajectories" of the whole update.
      config: the model's shape.
      prefixes: as in `estimator_loss`.

    Returns:
      The loss of these rows and the sum "squared_error".
    """
    rows, progress = batch.rows, params["progress"]
    hidden = forward.rows_hidden(config, forward.with_frozen(config, params, frozen), rows)
    read = rows.end_index if kind_of(progress) == PAPER else rows.answer_index
    number = rows.step_trajectory
    slots = number.shape[1]
    same = (number[:, :, None] == number[:, None, :]) & (rows.step_mask[:, None, :] > 0)
    first = (rows.step_mask > 0) & (jnp.argmax(same, -1) == jnp.arange(slots))
    mask = (same & first[:, :, None]).reshape(-1, slots)
    behind = _less_clock(frozen, forward.at(hidden, read), rows.step_number)
    before = forward.at(hidden, rows.value_index)
    losses = []
    for member in _members(progress):
        step, start = _outputs(member, behind, before)
        by_slot = jnp.broadcast_to(step[:, None, :], same.shape).reshape(mask.shape)
        outputs = by_slot, start.reshape(-1)
        target = batch.final_reward.reshape(-1)
        losses.append(_member_loss(member, outputs, mask, target, prefixes=prefixes))
    return _mean_loss(losses, counts)


def make_loss(prefixes: float) -> LossFn:
    """The loss of heads on a frozen trunk."""
    return functools.partial(estimator_loss, prefixes=prefixes)


def make_trunk_loss(config: ModelConfig, prefixes: float) -> LossFn:
    """The loss of a trunk of this shape, and its heads."""
    return functools.partial(trunk_loss, config=config, prefixes=prefixes)
