"""Trajectories -> static-shape packed rows, on the host, in numpy.

Several trajectories share a row, so that little of a batch is padding.  Two
trajectories of 6 and 4 tokens in a row of L = 12, with P = 5 policy-token slots
and S = 4 step slots (c = context, 0 and 1 = tokens that a step wrote):

    step_id          c  c  0  0  c  1 | c  c  0  0 | .  .
    column           0  1  2  3  4  5   6  7  8  9   10 11
    segment_ids      1  1  1  1  1  1   2  2  2  2   0  0
    positions        0  1  2  3  4  5   0  1  2  3   0  0

    token_index      1  2  4  7  8      the logits that predict a policy token
    targets          tokens[2, 3, 5, 8, 9]
    token_step       0  0  1  2  2      the step slot that the token belongs to
    token_mask       1  1  1  1  1

    value_index      1  4  7  .         the last token before the step's first
    end_index        3  5  9  .         the step's last token
    answer_index     4  5  9  .         the last token before the next step; behind the last step
                                        the trajectory's last (its final observation's, if it is
                                        there: `chat.with_final_observation`)
    step_trajectory  0  0  1 -1         which trajectory of the input list
    step_number      0  1  0  .         k within its trajectory
    step_mask        1  1  1  0

With `share_prefix`, what all trajectories open with (the instruction) stands once a row:
attention is causal, so it is the same for all of them, and every one of them sees it.

    segment_ids     -1  1  1  1  1  1 | 2  2  2 | 0  0  0    (the same, sharing a first token)
    positions        0  1  2  3  4  5   1  2  3   0  0  0

Everything is derived from `step_id`.  A step that wrote no token has no end and
no value position: it takes no slot, and `gather_steps` gives it mask 0.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import chex
import numpy as np
from flax import struct

from spa_jax.errors import UserError
from spa_jax.trajectory import Trajectory

SHARED = -1  # the segment of a row's shared prefix

# Fields of `PackedRows` whose last axis is that of the columns, or of the policy-token slots.
_BY_COLUMN = ("tokens", "positions", "segment_ids")
_BY_TOKEN_SLOT = (
    "token_index",
    "targets",
    "token_mask",
    "token_step",
    "log_probs",
    "ref_log_probs",
)


@struct.dataclass
class PackedRows:
    """R rows of L tokens, P policy-token slots and S step slots; a pytree of numpy arrays.

    Integers are int32, masks (0 or 1) and log-probabilities float32.  An unused
    slot is 0 everywhere, but -1 in `step_trajectory`.  All indices into a row
    are columns of `tokens`.

    Attributes:
      tokens: [R, L] token ids.
      positions: [R, L] position within the trajectory, from 0.
      segment_ids: [R, L] 0 = padding, 1.. = the trajectory within the row, SHARED = the prefix
        of all of them.
      token_index: [R, P] the column whose next token is the policy token.
      targets: [R, P] the policy token's id.
      token_mask: [R, P] 1 where the slot holds a policy token.
      token_step: [R, P] the step slot, in [0, S), of the token.
      log_probs: [R, P] log-probability when the token was drawn, in nats.
      ref_log_probs: [R, P] the same under the reference policy; 0 if there is none.
      step_mask: [R, S] 1 where the slot holds a step.
      value_index: [R, S] the last column before the step's first token.
      end_index: [R, S] the column of the step's last token.
      answer_index: [R, S] the last column before the next step's first token, or of the trajectory.
      step_trajectory: [R, S] index of the trajectory in the list packed; -1 = none.
      step_number: [R, S] k, the step's number within its trajectory.
    """

    tokens: chex.Array
    positions: chex.Array
    segment_ids: chex.Array
    token_index: chex.Array
    targets: chex.Array
    token_mask: chex.Array
    token_step: chex.Array
    log_probs: chex.Array
    ref_log_probs: chex.Array
    step_mask: chex.Array
    value_index: chex.Array
    end_index: chex.Array
    answer_index: chex.Array
    step_trajectory: chex.Array
    step_number: chex.Array


@dataclasses.dataclass(frozen=True)
class _Item:
    """A trajectory's arrays, columns counted from its own start."""

    index: int  # in the list packed
    tokens: np.ndarray  # [T]
    policy: np.ndarray  # [p] columns of its policy tokens
    token_step: np.ndarray  # [p] slot, from 0, of the token's step
    log_probs: np.ndarray  # [p]
    ref_log_probs: np.ndarray  # [p]
    numbers: np.ndarray  # [s] k of each step that wrote a token
    first: np.ndarray  # [s] its first column
    last: np.ndarray  # [s] its last column
    answer: np.ndarray  # [s] the last column before the next step, or of the trajectory

    @property
    def size(self) -> np.ndarray:
        """[3] tokens, policy tokens and steps."""
        return np.array([len(self.tokens), len(self.policy), len(self.numbers)])

    def after(self, n: int) -> "_Item":
        """The same without its first n tokens, none of which the policy wrote."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[n:],
            policy=self.policy - n,
            first=self.first - n,
            last=self.last - n,
            answer=self.answer - n,
        )


def pack(
    trajectories: Sequence[Trajectory],
    *,
    row_length: int,
    policy_slots: int,
    step_slots: int,
    share_prefix: bool = False,
) -> PackedRows:
    """Packs trajectories into rows: first-fit decreasing by length, deterministic.

    A trajectory goes whole into the first row that has room for its tokens, its
    policy tokens and its steps.  One without a policy token teaches nothing and
    takes no room.

    Args:
      trajectories: encoded trajectories; their order is what `step_trajectory` names.
      row_length: L, tokens a row.
      policy_slots: P, policy tokens a row.
      step_slots: S, steps a row.
      share_prefix: put the context that all trajectories open with once into each row.

    Returns:
      The rows, in the order in which they were opened; one of padding if nothing is packed.

    Raises:
      UserError: if a trajectory fits no empty row, was never encoded, or begins
        with a policy token (there are no logits that it was drawn from).
    """
    limits = np.array([row_length, policy_slots, step_slots])
    items = _items(trajectories, limits)
    shared = _common_prefix(items) if share_prefix else 0
    prefix = items[0].tokens[:shared] if items else np.zeros(0, np.int32)
    bins = _first_fit_decreasing([item.after(shared) for item in items], limits - [shared, 0, 0])
    rows = empty(max(1, len(bins)), row_length, policy_slots, step_slots)
    for r, members in enumerate(bins):
        rows.tokens[r, :shared] = prefix
        rows.positions[r, :shared] = np.arange(shared)
        rows.segment_ids[r, :shared] = SHARED
        start = np.array([shared, 0, 0])
        for segment, item in enumerate(members, 1):
            _place(item, rows, r, segment=segment, start=start, shared=shared)
            start += item.size
    return rows


def check_fit(
    trajectories: Sequence[Trajectory], *, row_length: int, policy_slots: int, step_slots: int
) -> None:
    """What `pack` refuses is refused before the first of many batches is packed.

    Raises:
      UserError: as `pack`.
    """
    _items(trajectories, np.array([row_length, policy_slots, step_slots]))


def _items(trajectories: Sequence[Trajectory], limits: np.ndarray) -> list[_Item]:
    """Those that have a policy token; each fits into an empty row."""
    items = [_item(i, t) for i, t in enumerate(trajectories)]
    items = [item for item in items if len(item.policy)]
    for item in items:
        _check_fits(item, trajectories[item.index], limits)
    return items


def _item(index: int, trajectory: Trajectory) -> _Item:
    tokens = np.asarray(trajectory.token_ids, np.int32)
    step_id = np.asarray(trajectory.step_id, np.int32)
    if trajectory.steps and not len(tokens):
        raise UserError(
            f"task {trajectory.task!r} has steps but no token_ids; "
            "encode it first (chat.encode_trajectory)"
        )
    policy = np.flatnonzero(step_id >= 0)
    if len(policy) and policy[0] == 0:
        raise UserError(
            f"task {trajectory.task!r} begins with a policy token: nothing precedes it that it "
            "could have been drawn from; the trajectory lacks its context"
        )
    numbers, first, token_step = np.unique(step_id[policy], return_index=True, return_inverse=True)
    last = np.zeros(len(numbers), np.int64)
    np.maximum.at(last, token_step, policy)
    log_probs = np.asarray(trajectory.log_probs, np.float32)
    given = trajectory.ref_log_probs
    ref = np.zeros_like(log_probs) if given is None else np.asarray(given, np.float32)
    return _Item(
        index=index,
        tokens=tokens,
        policy=policy,
        token_step=token_step,
        log_probs=log_probs[policy],
        ref_log_probs=ref[policy],
        numbers=numbers,
        first=policy[first],
        last=last,
        answer=np.append(policy[first][1:] - 1, len(tokens) - 1)[: len(numbers)],
    )


def _common_prefix(items: list[_Item]) -> int:
    """How many context tokens all items open with.

    Each keeps its last token before the policy's first for itself: its value is read there.
    """
    if len(items) < 2:
        return 0
    longest = min(int(item.policy[0]) - 1 for item in items)
    heads = np.stack([item.tokens[:longest] for item in items])
    differs = np.flatnonzero((heads != heads[0]).any(0))
    return int(differs[0]) if len(differs) else longest


def _check_fits(item: _Item, trajectory: Trajectory, limits: np.ndarray) -> None:
    named = (("tokens", "row_length"), ("policy tokens", "policy_slots"), ("steps", "step_slots"))
    for (what, flag), size, limit in zip(named, item.size, limits, strict=True):
        if size > limit:
            raise UserError(
                f"task {trajectory.task!r} (seed {trajectory.seed}, attempt {trajectory.attempt}) "
                f"has {size} {what}, a row holds {limit}: raise --{flag} or shorten the episodes"
            )


def _first_fit_decreasing(items: list[_Item], limits: np.ndarray) -> list[list[_Item]]:
    """Rows of items; each goes, longest first, to the first row with room in all three."""
    bins: list[list[_Item]] = []
    room = np.zeros((len(items), 3), np.int64)
    for item in sorted(items, key=lambda item: (-len(item.tokens), item.index)):
        fits = np.all(room[: len(bins)] >= item.size, axis=1)
        row = int(np.argmax(fits)) if fits.any() else len(bins)
        if row == len(bins):
            bins.append([])
            room[row] = limits
        bins[row].append(item)
        room[row] -= item.size
    return bins


def empty(num_rows: int, length: int, policy_slots: int, step_slots: int) -> PackedRows:
    """Rows of padding only."""
    widths = dict.fromkeys(_BY_COLUMN, length) | dict.fromkeys(_BY_TOKEN_SLOT, policy_slots)
    floats = ("token_mask", "log_probs", "ref_log_probs", "step_mask")
    arrays = {
        f.name: np.full(
            (num_rows, widths.get(f.name, step_slots)),
            -1 if f.name == "step_trajectory" else 0,
            np.float32 if f.name in floats else np.int32,
        )
        for f in dataclasses.fields(PackedRows)
    }
    return PackedRows(**arrays)


def _used(values: np.ndarray) -> int:
    """How many of the last axis' places come before the end of what is not 0 in any row."""
    return int(np.flatnonzero(values.any(0)).max(initial=-1)) + 1


def _place(
    item: _Item, rows: PackedRows, r: int, *, segment: int, start: np.ndarray, shared: int
) -> None:
    """Writes `item` into row `r`, from (token, policy slot, step slot) `start` [3] on."""
    at, slot, step = (slice(a, a + n) for a, n in zip(start, item.size, strict=True))
    rows.tokens[r, at] = item.tokens
    rows.positions[r, at] = shared + np.arange(len(item.tokens))
    rows.segment_ids[r, at] = segment
    rows.token_index[r, slot] = start[0] + item.policy - 1
    rows.targets[r, slot] = item.tokens[item.policy]
    rows.token_mask[r, slot] = 1
    rows.token_step[r, slot] = start[2] + item.token_step
    rows.log_probs[r, slot] = item.log_probs
    rows.ref_log_probs[r, slot] = item.ref_log_probs
    rows.step_mask[r, step] = 1
    rows.value_index[r, step] = start[0] + item.first - 1
    rows.end_index[r, step] = start[0] + item.last
    rows.answer_index[r, step] = start[0] + item.answer
    rows.step_trajectory[r, step] = item.index
    rows.step_number[r, step] = item.numbers


def token_count(rows: PackedRows) -> int:
    """Tokens that are computed: all but padding, a shared prefix once a row."""
    return int(np.count_nonzero(np.asarray(rows.segment_ids)))


def padding_share(*batches: PackedRows) -> float:
    """The share of all the batches' `tokens`, in [0, 1], that holds no trajectory."""
    segments = [np.asarray(rows.segment_ids) for rows in batches]
    return float(sum(np.count_nonzero(s == 0) for s in segments) / sum(s.size for s in segments))


def scatter_steps(values: np.ndarray, rows: PackedRows) -> np.ndarray:
    """Brings numbers a (trajectory, step) into the rows' step slots.

    Args:
      values: [N, S'] by index in the list packed and step number k.
      rows: the rows, with any leading axes (`microbatches` adds one for devices).

    Returns:
      [..., R, S], 0 in unused slots.
    """
    used = np.asarray(rows.step_mask) > 0
    values = np.asarray(values)
    out = np.zeros(used.shape, values.dtype)
    out[used] = values[rows.step_trajectory[used], rows.step_number[used]]
    return out


def gather_steps(
    values: np.ndarray, rows: PackedRows, num_trajectories: int, max_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `scatter_steps`: numbers computed on rows, by (trajectory, step).

    Args:
      values: [..., R, S] or [..., R, S, D], a number or a vector a step slot.
      rows: the rows they were computed on, with the same leading axes.
      num_trajectories: N, the length of the list that was packed.
      max_steps: S', at least the number of steps of the longest trajectory.

    Returns:
      ([N, S'] or [N, S', D] values, [N, S'] float32 mask).  A step that is not in the rows (it
      wrote no token, or lies behind the episode's end) is 0 in both.

    Raises:
      ValueError: if `rows` hold a step beyond [N, S'].
    """
    used = np.asarray(rows.step_mask) > 0
    trajectory, number = rows.step_trajectory[used], rows.step_number[used]
    if len(number) and (trajectory.max() >= num_trajectories or number.max() >= max_steps):
        raise ValueError(
            f"rows hold trajectory {trajectory.max()} and step {number.max()}, "
            f"beyond [{num_trajectories}, {max_steps}]"
        )
    values = np.asarray(values)
    out = np.zeros((num_trajectories, max_steps, *values.shape[used.ndim :]), values.dtype)
    mask = np.zeros((num_trajectories, max_steps), np.float32)
    out[trajectory, number] = values[used]
    mask[trajectory, number] = 1
    return out, mask


def _placements(rows: PackedRows) -> Iterator[tuple[int, int, int, slice]]:
    """Where each trajectory lies: (row, its index in the list packed, length of the row's
    shared prefix, columns of the rest); the rows' leading axes are counted as one."""
    segments, ends, used, trajectory = (
        np.asarray(a).reshape(-1, np.shape(a)[-1])
        for a in (rows.segment_ids, rows.end_index, rows.step_mask, rows.step_trajectory)
    )
    for r in range(len(segments)):
        shared = int(np.count_nonzero(segments[r] == SHARED))
        of_slot = segments[r, ends[r]]
        for segment in range(1, int(segments[r].max()) + 1):
            columns = np.flatnonzero(segments[r] == segment)
            slot = np.flatnonzero((of_slot == segment) & (used[r] > 0))[0]
            yield r, int(trajectory[r, slot]), shared, slice(columns[0], columns[-1] + 1)


def scatter_tokens(values: Sequence[np.ndarray], rows: PackedRows) -> np.ndarray:
    """Brings vectors a (trajectory, token) into the rows' columns.

    Args:
      values: [T_i, D] by index in the list packed.
      rows: the rows, with any leading axes.

    Returns:
      [..., R, L, D], 0 in padding; a shared prefix gets its vectors from one of its trajectories.
    """
    shape = np.shape(rows.segment_ids)
    out = np.zeros((int(np.prod(shape[:-1])), shape[-1], values[0].shape[-1]), values[0].dtype)
    for row, trajectory, shared, columns in _placements(rows):
        out[row, :shared] = values[trajectory][:shared]
        out[row, columns] = values[trajectory][shared:]
    return out.reshape(*shape, -1)


def gather_tokens(values: np.ndarray, rows: PackedRows, lengths: Sequence[int]) -> list[np.ndarray]:
    """The inverse of `scatter_tokens`.

    Args:
      values: [..., R, L, D] vectors computed on rows.
      rows: the rows, with the same leading axes.
      lengths: T_i of each trajectory of the list that was packed.

    Returns:
      [T_i, D] by index in that list; 0 for a trajectory that is in no row.
    """
    values = np.asarray(values)
    flat = values.reshape(-1, *values.shape[-2:])
    out = [np.zeros((length, values.shape[-1]), values.dtype) for length in lengths]
    for row, trajectory, shared, columns in _placements(rows):
        out[trajectory][:shared] = flat[row, :shared]
        out[trajectory][shared:] = flat[row, columns]
    return out


def microbatches(
    rows: PackedRows, rows_per_batch: int, devices: int | None = None, buckets: int = 1
) -> Iterator[PackedRows]:
    """Cuts the rows, in order, into batches of one static shape, or of a few.

    The last batch is filled up with padding rows, which change no sum.  With buckets, a batch
    loses the padding at its rows' ends, down to the next of so many lengths, and the same share of
    its policy-token slots unless it needs more (then it keeps all: few shapes are compiled):

        L = 8, P = 4, buckets = 4    (columns, slots) 2, 1   4, 2   6, 3   8, 4
        rows that use 3 and 5 columns, 1 and 3 slots: a batch of 6 columns and 3 slots

    Args:
      rows: [R, ...] arrays.
      rows_per_batch: rows a batch (and a device).
      devices: the leading axis for `pmap`; None for none.
      buckets: how many lengths there are, L the longest; 1: all batches have L columns.

    Yields:
      Batches of [rows_per_batch, ...] or [devices, rows_per_batch, ...] arrays.
    """
    count = rows_per_batch * (devices or 1)
    lead = (rows_per_batch,) if devices is None else (devices, rows_per_batch)
    names = [f.name for f in dataclasses.fields(PackedRows)]
    shape = (rows.tokens.shape[1], rows.targets.shape[1], rows.step_mask.shape[1])
    for start in range(0, rows.tokens.shape[0], count):
        part = {name: np.asarray(getattr(rows, name))[start : start + count] for name in names}
        missing = count - len(part["tokens"])
        if missing:
            fill = empty(missing, *shape)
            part = {name: np.concatenate([part[name], getattr(fill, name)]) for name in names}
        if buckets > 1:
            columns, slots, _ = shape
            step = -(-columns // buckets)
            length = min(columns, max(1, -(-_used(part["segment_ids"]) // step)) * step)
            share = -(-slots * length // columns)
            slots = share if _used(part["token_mask"]) <= share else slots
            part |= {name: part[name][:, :length] for name in _BY_COLUMN}
            part |= {name: part[name][:, :slots] for name in _BY_TOKEN_SLOT}
        yield PackedRows(**{name: a.reshape(*lead, a.shape[-1]) for name, a in part.items()})
