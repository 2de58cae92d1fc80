"""Packing: nothing lost, nothing invented, and no loss term that depends on it."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from spa_jax import batching
from spa_jax.attribution.credit import fused_reward
from spa_jax.errors import UserError
from spa_jax.rl import advantages, losses
from spa_jax.trajectory import Status, Step, Trajectory

few = hypothesis.settings(max_examples=40, deadline=None)
_STEP = Step(observation="", response="", action="", grounded=True)


def trajectory(token_ids, step_id, steps=None, task="t", ref=None):
    steps = max(step_id, default=-1) + 1 if steps is None else steps
    return Trajectory(
        env="e", task=task, split="train", seed=0, attempt=0, policy="p", status=Status.SUCCESS,
        final_reward=1.0, instruction="", steps=(_STEP,) * steps, token_ids=tuple(token_ids),
        step_id=tuple(step_id), log_probs=tuple(-0.01 * i if k >= 0 else 0.0
        for i, k in zip(token_ids, step_id, strict=True)), ref_log_probs=ref,
    )


def example():
    """The two trajectories of the module's drawing."""
    return [
        trajectory(range(10, 16), [-1, -1, 0, 0, -1, 1]),
        trajectory(range(20, 24), [-1, -1, 0, 0], ref=(0.0, 0.0, -0.5, -0.25)),
    ]


def _packed(made, multiple, **limits):
    """The rows, and padding rows up to a multiple, as the last of several batches gets them."""
    rows = batching.pack(made, **limits)
    (filled,) = batching.microbatches(rows, -(-len(rows.tokens) // multiple) * multiple)
    return filled


def _take(rows, order):
    """The rows named by `order`, in that order."""
    return jax.tree.map(lambda x: x[np.asarray(order, np.int64)], rows)


def test_the_drawn_example():
    rows = batching.pack(example(), row_length=12, policy_slots=5, step_slots=4)
    expected = {
        "tokens": [10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0],
        "token_index": [1, 2, 4, 7, 8],
        "targets": [12, 13, 15, 22, 23],
        "token_mask": [1, 1, 1, 1, 1],
        "token_step": [0, 0, 1, 2, 2],
        "log_probs": [-0.12, -0.13, -0.15, -0.22, -0.23],
        "ref_log_probs": [0, 0, 0, -0.5, -0.25],
        "step_mask": [1, 1, 1, 0],
        "value_index": [1, 4, 7, 0],
        "end_index": [3, 5, 9, 0],
        "answer_index": [4, 5, 9, 0],
        "step_trajectory": [0, 0, 1, -1],
        "step_number": [0, 1, 0, 0],
    }
    assert set(expected) == set(vars(rows))
    for name, value in expected.items():
        array = getattr(rows, name)
        floating = "log" in name or "mask" in name
        assert array.dtype == (np.float32 if floating else np.int32), name
        np.testing.assert_allclose(array, [value], err_msg=name, rtol=1e-6)
    assert batching.padding_share(rows) == pytest.approx(2 / 12)


def test_it_is_a_pytree_of_arrays():
    rows = batching.pack(example(), row_length=12, policy_slots=5, step_slots=4)
    doubled = jax.tree.map(lambda x: 2 * x, rows)
    assert isinstance(doubled, batching.PackedRows)
    np.testing.assert_array_equal(doubled.tokens, 2 * rows.tokens)


@pytest.mark.parametrize(
    "limits", [(9, 5, 4), (12, 4, 4), (12, 5, 2)], ids=["tokens", "policy tokens", "steps"]
)
def test_each_of_the_three_limits_opens_a_second_row(limits):
    length, policy_slots, step_slots = limits
    rows = batching.pack(
        example(), row_length=length, policy_slots=policy_slots, step_slots=step_slots
    )
    assert rows.tokens.shape == (2, length)
    np.testing.assert_array_equal(rows.step_mask.sum(1), [2, 1])
    np.testing.assert_array_equal(rows.positions[1, :4], [0, 1, 2, 3])


def test_first_fit_decreasing():
    # Longest first: 6 opens a row, 5 another, 4 fits beside the 6, 3 beside the 5.
    lengths = [4, 6, 3, 5]
    made = [trajectory([i] * n, [-1] * (n - 1) + [0]) for i, n in enumerate(lengths)]
    rows = batching.pack(made, row_length=10, policy_slots=9, step_slots=9)
    assert [list(np.unique(r)) for r in rows.tokens] == [[0, 1], [0, 2, 3]]
    np.testing.assert_array_equal(rows.step_trajectory[:, :2], [[1, 0], [3, 2]])


def test_rows_are_padded_to_a_multiple_and_padding_is_silent():
    rows = _packed(example(), 4, row_length=12, policy_slots=5, step_slots=4)
    assert rows.tokens.shape == (4, 12)
    for name in ("segment_ids", "token_mask", "step_mask"):
        assert not getattr(rows, name)[1:].any()
    nothing = _packed([], 2, row_length=12, policy_slots=5, step_slots=4)
    assert nothing.tokens.shape == (2, 12) and not nothing.step_mask.any()
    assert batching.padding_share(nothing) == 1.0


def test_a_step_without_tokens_takes_no_slot():
    odd = trajectory(range(6), [-1, -1, 0, -1, 2, -1], steps=4)  # steps 1 and 3 wrote nothing
    rows = batching.pack([odd], row_length=6, policy_slots=2, step_slots=2)
    np.testing.assert_array_equal(rows.step_number, [[0, 2]])
    np.testing.assert_array_equal(rows.value_index, [[1, 3]])
    np.testing.assert_array_equal(rows.end_index, [[2, 4]])
    values, mask = batching.gather_steps(np.array([[5.0, 7.0]]), rows, 1, 4)
    np.testing.assert_array_equal(values, [[5, 0, 7, 0]])
    np.testing.assert_array_equal(mask, [[1, 0, 1, 0]])


def test_a_trajectory_without_policy_tokens_takes_no_room():
    silent = [trajectory(range(50), [-1] * 50), trajectory([], [])]
    rows = batching.pack(silent + example(), row_length=12, policy_slots=5, step_slots=4)
    assert rows.tokens.shape == (1, 12)
    np.testing.assert_array_equal(rows.step_trajectory, [[2, 2, 3, -1]])


@pytest.mark.parametrize(
    "limits,flag",
    [((3, 9, 9), "row_length"), ((9, 1, 9), "policy_slots"), ((9, 9, 1), "step_slots")],
)
def test_what_fits_no_row_is_the_users_to_solve(limits, flag):
    long = trajectory(range(4), [-1, 0, -1, 1], task="pick_mug-3")
    length, policy_slots, step_slots = limits
    with pytest.raises(UserError, match=rf"pick_mug-3.*--{flag}"):
        batching.pack([long], row_length=length, policy_slots=policy_slots, step_slots=step_slots)
    with pytest.raises(UserError, match=rf"pick_mug-3.*--{flag}"):
        batching.check_fit(
            [trajectory([0], [-1]), long],
            row_length=length, policy_slots=policy_slots, step_slots=step_slots,
        )


def test_trajectories_that_cannot_be_trained_on():
    pack = {"row_length": 9, "policy_slots": 9, "step_slots": 9}
    with pytest.raises(UserError, match="encode it first"):
        batching.pack([trajectory([], [], steps=2)], **pack)
    with pytest.raises(UserError, match="begins with a policy token"):
        batching.pack([trajectory([1, 2], [0, 0])], **pack)


@st.composite
def episodes(draw, max_size=8):
    """Trajectories whose token ids are unique in the list."""
    made, next_id = [], 1
    for _ in range(draw(st.integers(0, max_size))):
        step_id = []
        for k in range(draw(st.integers(0, 4))):
            step_id += [-1] * draw(st.integers(1, 3)) + [k] * draw(st.integers(0, 3))
        step_id += [-1] * draw(st.integers(0, 2))
        ids = range(next_id, next_id + len(step_id))
        next_id += len(step_id)
        made.append(trajectory(ids, step_id))
    return made


LIMITS = {"row_length": 26, "policy_slots": 14, "step_slots": 5}


@few
@hypothesis.given(episodes(), st.integers(1, 3))
def test_packing_loses_nothing(made, multiple):
    rows = _packed(made, multiple, **LIMITS)
    assert len(rows.tokens) % multiple == 0
    taught = [t for t in made if max(t.step_id, default=-1) >= 0]
    seen = []
    for r, segment in ((r, s) for r in range(len(rows.tokens)) for s in range(1, 9)):
        columns = np.flatnonzero(rows.segment_ids[r] == segment)
        if len(columns):
            seen.append(tuple(rows.tokens[r, columns]))
            np.testing.assert_array_equal(rows.positions[r, columns], np.arange(len(columns)))
            np.testing.assert_array_equal(np.diff(columns), 1)
    assert sorted(seen) == sorted(t.token_ids for t in taught)
    # Every policy token once, with its own log-probability, step and trajectory.
    used = rows.token_mask > 0
    r = np.nonzero(used)[0]
    step = rows.token_step[used]
    packed = zip(
        rows.targets[used], rows.log_probs[used],
        rows.step_trajectory[r, step], rows.step_number[r, step],
        rows.tokens[r, rows.token_index[used] + 1], strict=True,
    )
    wanted = [
        (token, np.float32(lp), i, k, token)
        for i, t in enumerate(made)
        for token, k, lp in zip(t.token_ids, t.step_id, t.log_probs, strict=True)
        if k >= 0
    ]
    assert sorted(packed) == sorted(wanted)


@few
@hypothesis.given(episodes())
def test_steps_begin_and_end_where_step_id_says(made):
    rows = batching.pack(made, **LIMITS)
    for r, s in zip(*np.nonzero(rows.step_mask), strict=True):
        t, k = made[rows.step_trajectory[r, s]], rows.step_number[r, s]
        wrote = [token for token, i in zip(t.token_ids, t.step_id, strict=True) if i == k]
        begin, end = rows.value_index[r, s], rows.end_index[r, s]
        np.testing.assert_array_equal(rows.tokens[r, begin + 1 : end + 1], wrote)
        assert rows.segment_ids[r, begin] == rows.segment_ids[r, end]  # its own context
    assert rows.step_mask.sum() == sum(len(set(t.step_id) - {-1}) for t in made)
    np.testing.assert_array_equal(rows.step_trajectory[rows.step_mask == 0], -1)


@few
@hypothesis.given(episodes(), st.integers(0, 4))
def test_a_shared_prefix_stands_once_a_row(made, length):
    prefix = list(range(-length, 0))  # ids that no episode has
    made = [trajectory(prefix + list(t.token_ids), [-1] * length + list(t.step_id)) for t in made]
    limits = LIMITS | {"row_length": 30}
    rows = batching.pack(made, share_prefix=True, **limits)
    taught = [t for t in made if max(t.step_id, default=-1) >= 0]
    shared = rows.segment_ids == batching.SHARED
    count = int(shared[0].sum())
    # The last context token before the first of the policy's stays everybody's own.
    assert count == length if len(taught) > 1 else count == 0
    seen = []
    for r in range(len(rows.tokens)):
        assert rows.tokens[r, :count].tolist() == prefix[:count]
        for segment in range(1, rows.segment_ids[r].max() + 1):
            columns = np.flatnonzero(rows.segment_ids[r] == segment)
            np.testing.assert_array_equal(np.diff(columns), 1)
            np.testing.assert_array_equal(
                rows.positions[r, columns], count + np.arange(len(columns))
            )
            seen.append((*prefix[:count], *rows.tokens[r, columns]))
    assert sorted(seen) == sorted(t.token_ids for t in taught)
    for r, s in zip(*np.nonzero(rows.step_mask), strict=True):
        t, k = made[rows.step_trajectory[r, s]], rows.step_number[r, s]
        wrote = [token for token, i in zip(t.token_ids, t.step_id, strict=True) if i == k]
        begin, end = rows.value_index[r, s], rows.end_index[r, s]
        np.testing.assert_array_equal(rows.tokens[r, begin + 1 : end + 1], wrote)
        assert rows.segment_ids[r, begin] == rows.segment_ids[r, end]


@few
@hypothesis.given(episodes(), st.randoms(use_true_random=False))
def test_scatter_and_gather_are_inverse_in_any_order_of_rows(made, random):
    rows = _packed(made, 2, **LIMITS)
    order = list(range(len(rows.tokens)))
    random.shuffle(order)
    rows = _take(rows, order)
    table = np.arange(1, 1 + len(made) * 4, dtype=np.float32).reshape(len(made), 4)
    in_rows = batching.scatter_steps(table, rows)
    assert in_rows.shape == rows.step_mask.shape
    assert not in_rows[rows.step_mask == 0].any()
    back, mask = batching.gather_steps(in_rows, rows, len(made), 4)
    wrote = np.array([[k in t.step_id for k in range(4)] for t in made]).reshape(-1, 4)
    np.testing.assert_array_equal(mask > 0, wrote)
    np.testing.assert_array_equal(back, table * wrote)
    # A vector a step, such as a hidden state, goes the same way.
    vectors, mask = batching.gather_steps(np.stack([in_rows, -in_rows], -1), rows, len(made), 4)
    np.testing.assert_array_equal(vectors, np.stack([back, -back], -1))


@pytest.mark.parametrize("share", [False, True])
def test_tokens_are_scattered_and_gathered_wherever_they_lie(share):
    opening = (7, 8, 9)
    made = [
        dataclasses.replace(
            t, token_ids=opening + tuple(t.token_ids), step_id=(-1,) * 3 + tuple(t.step_id),
            log_probs=(0.0,) * 3 + tuple(t.log_probs), ref_log_probs=None,
        )
        for t in example()
    ]
    lengths = [len(t.token_ids) for t in made]
    vectors = [np.array([[100.0 * i + p, token] for p, token in enumerate(t.token_ids)])
               for i, t in enumerate(made)]
    rows = batching.pack(made, row_length=30, policy_slots=12, step_slots=8, share_prefix=share)
    dealt = next(batching.microbatches(rows, 1, 2))
    scattered = batching.scatter_tokens(vectors, dealt)
    assert scattered.shape == (2, 1, 30, 2)
    np.testing.assert_array_equal(scattered[..., 1], dealt.tokens)
    np.testing.assert_array_equal(
        scattered[..., 0] % 100, np.where(dealt.segment_ids, dealt.positions, 0)
    )
    back = batching.gather_tokens(scattered, dealt, lengths)
    for mine, theirs in zip(back, vectors, strict=True):
        own = slice(rows.segment_ids[0].tolist().count(batching.SHARED), None)
        np.testing.assert_array_equal(mine[:, 1], theirs[:, 1])
        np.testing.assert_array_equal(mine[own], theirs[own])


def test_gather_refuses_tables_that_are_too_small():
    rows = batching.pack(example(), row_length=12, policy_slots=5, step_slots=4)
    with pytest.raises(ValueError, match="beyond"):
        batching.gather_steps(rows.step_mask, rows, 1, 2)
    with pytest.raises(ValueError, match="beyond"):
        batching.gather_steps(rows.step_mask, rows, 2, 1)


def test_microbatches_have_one_shape_and_hold_every_row():
    made = [trajectory([i] * 5, [-1, -1, 0, -1, 1]) for i in range(1, 6)]
    rows = batching.pack(made, row_length=6, policy_slots=3, step_slots=3)
    assert len(rows.tokens) == 5
    flat = list(batching.microbatches(rows, 2))
    assert [b.tokens.shape for b in flat] == [(2, 6)] * 3
    np.testing.assert_array_equal(np.concatenate([b.targets for b in flat])[:5], rows.targets)
    assert not flat[-1].token_mask[1].any() and (flat[-1].step_trajectory[1] == -1).all()
    (dealt, rest) = batching.microbatches(rows, 2, devices=2)
    assert dealt.tokens.shape == (2, 2, 6) and rest.step_mask.shape == (2, 2, 3)
    # gather and scatter work on batches with a leading device axis too.
    numbers, mask = batching.gather_steps(dealt.step_number + 1, dealt, 5, 2)
    np.testing.assert_array_equal(numbers, np.where(np.arange(5)[:, None] < 4, [1, 2], 0))
    np.testing.assert_array_equal(
        batching.scatter_steps(numbers, dealt), (dealt.step_number + 1) * dealt.step_mask
    )
    one = list(batching.microbatches(rows, 5, devices=1))
    assert [b.tokens.shape for b in one] == [(1, 5, 6)]


def test_buckets_cut_padding_and_nothing_else():
    """Rows of 9, 5 and 2 columns of 10 in lengths 4, 8, 10 (the last bucket ends with the row)."""
    made = [trajectory([i + 1] * n, [-1] * (n - 1) + [0]) for i, n in enumerate((9, 5, 2))]
    rows = batching.pack(made, row_length=10, policy_slots=1, step_slots=1)
    whole = list(batching.microbatches(rows, 1))
    cut = list(batching.microbatches(rows, 1, buckets=3))
    assert [b.tokens.shape for b in cut] == [(1, 10), (1, 8), (1, 4)]
    for ours, wanted in zip(cut, whole, strict=True):
        length = ours.tokens.shape[1]
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(wanted, field.name)
            by_column = field.name in ("tokens", "positions", "segment_ids")
            np.testing.assert_array_equal(a, b[:, :length] if by_column else b)
        assert not wanted.segment_ids[:, length:].any()
    assert batching.padding_share(*whole) == pytest.approx(14 / 30)
    assert batching.padding_share(*cut) == pytest.approx(6 / 22)
    # Rows of one microbatch have one length; one of padding only has the shortest.
    assert [b.tokens.shape for b in batching.microbatches(rows, 2, buckets=3)] == [(2, 10), (2, 4)]
    dealt = list(batching.microbatches(rows, 1, devices=2, buckets=3))
    assert [b.tokens.shape for b in dealt] == [(2, 1, 10), (2, 1, 4)]
    nothing = batching.pack([], row_length=10, policy_slots=1, step_slots=1)
    assert next(batching.microbatches(nothing, 1, buckets=5)).tokens.shape == (1, 2)


def test_buckets_cut_slots_by_the_same_share_unless_they_are_needed():
    """In rows of 8 columns and 4 slots: 5 columns with 2 policy tokens, then 3 with 2, 3 with 1."""
    made = [
        trajectory([i + 1] * n, [-1] * (n - p) + [0] * p)
        for i, (n, p) in enumerate(((5, 2), (3, 2), (3, 1)))
    ]
    shape = {"row_length": 8, "policy_slots": 4, "step_slots": 1}
    rows = [batching.pack([t], **shape) for t in made]
    cut = [next(batching.microbatches(r, 1, buckets=4)) for r in rows]
    assert [(b.tokens.shape[1], b.targets.shape[1]) for b in cut] == [(6, 3), (4, 2), (4, 2)]
    for ours, wanted in zip(cut, rows, strict=True):
        for field in ("token_index", "targets", "token_mask", "token_step", "log_probs"):
            a, b = getattr(ours, field), getattr(wanted, field)
            np.testing.assert_array_equal(a, b[:, : a.shape[1]])
        assert ours.token_mask.sum() == wanted.token_mask.sum()
    # Half of the columns have room for one policy token of two: both places stay.
    (narrow,) = batching.microbatches(
        batching.pack(made[1:2], row_length=8, policy_slots=2, step_slots=1), 1, buckets=2
    )
    assert (narrow.tokens.shape[1], narrow.targets.shape[1]) == (4, 2)


def _loss_terms(made, new_log_prob, values, *, order=None, multiple=1, **limits):
    """Every loss term of PPO, through the rows, from tables by token id and by step."""
    rows = _packed(made, multiple, **limits)
    rows = rows if order is None else _take(rows, np.argsort(order(len(rows.tokens))))
    old_values = batching.scatter_steps(values, rows)
    v, mask = batching.gather_steps(old_values, rows, len(made), 4)
    contributions = np.where(np.arange(4) == 1, 0.0, v / 2)  # step 1 earns nothing
    rewards = fused_reward(contributions, np.ones_like(mask), mask)
    advantage, returns = advantages.step_gae(rewards, v, mask, gamma=0.9, gae_lambda=0.8)
    advantage = batching.scatter_steps(np.asarray(advantages.whiten(advantage, mask)), rows)
    returns = batching.scatter_steps(np.asarray(returns), rows)
    by_token = np.take_along_axis(advantage, rows.token_step, axis=1)
    new = new_log_prob[rows.targets]
    policy, stats = losses.clipped_policy_loss(
        new, rows.log_probs, by_token, rows.token_mask, clip=0.2
    )
    value = losses.clipped_value_loss(
        old_values + 0.3, old_values, returns, rows.step_mask, clip=0.2
    )
    kl = losses.k3_kl(new, rows.ref_log_probs, rows.token_mask)
    return [float(x) for x in (policy, value, kl, losses.nll(new, rows.token_mask), *stats)]


def _with_more_context(t, where):
    """The same episode with two more tokens in one of its contexts, and one at the end."""
    places = [i for i, k in enumerate(t.step_id) if k == -1]
    at = places[where % len(places)]
    grow = lambda xs, fill: (*xs[:at], fill, fill, *xs[at:], fill)  # noqa: E731
    return trajectory(grow(t.token_ids, 0), grow(t.step_id, -1), steps=len(t.steps))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(episodes(max_size=4), st.integers(0, 20), st.integers(0, 2**16))
def test_no_loss_term_depends_on_packing_context_or_order(made, where, seed):
    made = [t for t in made if t.token_ids]
    rng = np.random.default_rng(seed)
    log_prob = -rng.random(200, dtype=np.float32)
    values = rng.random((len(made), 4), dtype=np.float32)
    plain = _loss_terms(made, log_prob, values, row_length=48, policy_slots=24, step_slots=8)
    longer = [_with_more_context(t, where) for t in made]
    limits = {"row_length": 32, "policy_slots": 12, "step_slots": 4}
    alone = _loss_terms(longer, log_prob, values, order=rng.random, multiple=3, **limits)
    np.testing.assert_allclose(alone, plain, rtol=1e-4, atol=1e-5)
