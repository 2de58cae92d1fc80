"""Forward passes over whole trajectories: features for the heads, log-probabilities, values."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import struct

from spa_jax import batching
from spa_jax.chat import ChatFormat, with_final_observation
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import axes, limits, tree
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import pretrained
from spa_jax.runtime import distributed
from spa_jax.training import forward, partition
from spa_jax.trajectory import Trajectory


@struct.dataclass
class Scores:
    """What a forward pass says about N trajectories of at most S steps.

    Attributes:
      end_hidden: [N, S, D] the trunk's last hidden state at each step's last token.
      value_hidden: [N, S, D] the same at the last context token before the step.
      answer_hidden: [N, S, D] the same at the last token before the next step, which is behind the
        environment's answer; of the last step only if `score` was given the chat format.
      values: [N, S]; 0 without a value head.
      step_mask: [N, S].
      log_probs: a list of N arrays [T], 0 for context tokens.
      lower_states: a list of N arrays [T, D], the lower layers' hidden states (see the function
        `lower_states`); None if nobody asked for them.
    """

    end_hidden: np.ndarray
    value_hidden: np.ndarray
    answer_hidden: np.ndarray
    values: np.ndarray
    step_mask: np.ndarray
    log_probs: list[np.ndarray]
    lower_states: list[np.ndarray] | None = None


def max_steps(trajectories: Sequence[Trajectory]) -> int:
    """The number of steps of the longest trajectory, at least 1."""
    return max([1, *(len(t.steps) for t in trajectories)])


def score(
    config: ModelConfig,
    params: Params,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    *,
    temperature: float,
    title: str,
    chat: ChatFormat | None = None,
    train_layers: int = 0,
) -> Scores:
    """Scores trajectories with a policy.

    Args:
      config: the model's shape.
      params: {"policy": decoder, "value": head, optional}, not replicated.
      trajectories: N encoded trajectories.
      rows: the static shape.
      temperature: the policy is softmax(logits / temperature).
      title: of the progress bar; "" for none.
      chat: the format of the conversations: the answers to the last actions are read too, where
        rows and model have room for them; None: they are not.
      train_layers: not 0: the hidden states that enter the top `train_layers` layers are wanted
        too.

    Returns:
      The scores, on the host.

    Raises:
      UserError: a score is not finite; names the trajectory.
    """
    read = answered(trajectories, chat, config, rows)
    packed = batching.pack(read, **rows.packing)
    trainer, run = _compiled(config, temperature, rows.partition, rows.mesh)
    top, lower = tree.split(config, axes.cast(params["policy"], config.dtype), train_layers)
    frozen = {"policy": lower} if lower else {}
    placed = trainer.replicate({"params": params | {"policy": top}, "frozen": frozen})
    names = ["log_probs", *_HIDDEN, "values"] + ["lower_states"] * bool(lower)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    cut = []
    batches = list(batching.microbatches(packed, rows.rows_per_device, trainer.devices))
    for batch in tqdm.tqdm(batches, desc=title, unit="batch", disable=not title):
        out = run(placed, batch)
        flat = jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[2:])), batch)
        cut.append(flat)
        for name in names:
            parts[name].append(out[name].reshape(-1, *out[name].shape[2:]))
    packed = jax.tree.map(lambda *xs: np.concatenate(xs), *cut)
    joined = {name: np.concatenate(parts[name]) for name in names}
    scores = _by_trajectory(packed, joined, read, [len(t.token_ids) for t in trajectories])
    _check_finite(scores, trajectories, config)
    return scores


def _check_finite(scores: Scores, trajectories: Sequence[Trajectory], config: ModelConfig) -> None:
    """Refuses scores that are not finite: everything made of them would be NaN too."""
    for i, t in enumerate(trajectories):
        for name in ("log_probs", *_HIDDEN, "values"):
            if not np.isfinite(np.asarray(getattr(scores, name)[i], np.float32)).all():
                raise UserError(
                    f"task {t.task!r} (seed {t.seed}, attempt {t.attempt}): what the model makes "
                    f"of it ({name}) is not finite: {config.dtype} overflows, or the policy "
                    "diverged; give --compute_dtype=float32, or use another checkpoint"
                )


def answered(
    trajectories: Sequence[Trajectory],
    chat: ChatFormat | None,
    config: ModelConfig,
    rows: RowsConfig,
) -> list[Trajectory]:
    """The trajectories with their final observations, see `with_final_observation`."""
    if chat is None:
        return list(trajectories)
    most = min(rows.row_length, limits.longest(config))
    return [with_final_observation(chat, t, most) for t in trajectories]


@functools.lru_cache(maxsize=4)  # the same function for a model, so that it compiles once
def _compiled(
    config: ModelConfig, temperature: float, kind: Literal["pmap", "mesh"], mesh: str
) -> tuple[partition.Trainer, Callable]:
    """Where the weights lie, and the pass: ({"params": ..., "frozen": ...}, rows) -> scores."""
    trainer = partition.without_loss(RowsConfig(partition=kind, mesh=mesh))

    def score(placed: Params, _: Params, rows: batching.PackedRows) -> dict[str, jax.Array]:
        return forward.score(
            config, placed["params"], rows, placed["frozen"], temperature=temperature
        )

    return trainer, trainer.forward(score)


def _by_trajectory(
    packed: batching.PackedRows,
    joined: dict[str, np.ndarray],
    read: Sequence[Trajectory],
    own: Sequence[int],
) -> Scores:
    """The scores of trajectories that were `read`, of whose tokens the first `own` are theirs."""
    count, steps = len(read), max_steps(read)
    arrays = {}
    for name in (*_HIDDEN, "values"):
        arrays[name], mask = batching.gather_steps(joined[name], packed, count, steps)
    log_probs = [np.zeros(length, np.float32) for length in own]
    row, slot = np.nonzero(packed.token_mask)
    step_slot = packed.token_step[row, slot]
    index = packed.step_trajectory[row, step_slot]
    position = packed.positions[row, packed.token_index[row, slot]] + 1
    for i, at, value in zip(index, position, joined["log_probs"][row, slot], strict=True):
        log_probs[i][at] = value
    lower = None
    if "lower_states" in joined:
        lengths = [len(t.token_ids) for t in read]
        every = batching.gather_tokens(joined["lower_states"], packed, lengths)
        lower = [states[:length] for states, length in zip(every, own, strict=True)]
    return Scores(step_mask=mask, log_probs=log_probs, lower_states=lower, **arrays)


def lower_states(
    config: ModelConfig,
    trainer: partition.Trainer,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    *,
    title: str,
) -> list[np.ndarray] | None:
    """The hidden states of every token after the frozen layers, which no update changes.

    Args:
      config: the model's shape.
      trainer: whose `frozen` is {"policy": the frozen part} if layers are frozen.
      trajectories: N encoded trajectories.
      rows: the static shape.
      title: of the progress bar.

    Returns:
      A list of N arrays [T_i, D]; None if nothing is frozen, or there is no trajectory.
    """
    if not trainer.frozen.get("policy") or not trajectories:
        return None
    packed = batching.pack(trajectories, **rows.packing)
    run = trainer.forward(lambda _, frozen, batch: forward.rows_lower_states(config, frozen, batch))
    batches = list(batching.microbatches(packed, rows.rows_per_device, trainer.devices))
    parts = [run({}, batch) for batch in tqdm.tqdm(batches, desc=title, unit="batch")]
    values = np.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])
    lengths = [len(t.token_ids) for t in trajectories]
    return batching.gather_tokens(values[: len(packed.tokens)], packed, lengths)


def lower_states_in_rows(
    lower_states: Sequence[np.ndarray] | None,
    chosen: Sequence[int] | np.ndarray,
    rows: batching.PackedRows,
) -> np.ndarray | None:
    """[..., R, L, D] of rows that the chosen trajectories were packed into; None for None."""
    if lower_states is None:
        return None
    return batching.scatter_tokens([lower_states[i] for i in chosen], rows)


def cached_score(
    config: ModelConfig,
    params: Params,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    *,
    cache: pathlib.Path,
    policy_folder: pathlib.Path,
    temperature: float,
    title: str,
    chat: ChatFormat | None = None,
    write: bool = True,
    lower_cache: pathlib.Path | None = None,
    train_layers: int = 0,
) -> Scores:
    """`score` with a file: estimator, annotation and PPO's first round read the same pass.

    The file is used again only for the same trajectories and the same weights.

    Args:
      config: as in `score`, like params, trajectories, rows, temperature, title, chat and
        train_layers.
      params: as there.
      trajectories: as there.
      rows: as there.
      cache: the file of the scores.
      policy_folder: where `params` lie; their files' names, sizes and times name the weights.
      temperature: as there.
      title: as there.
      chat: as there.
      write: whether scores that had to be computed are written to the file.
      lower_cache: the file that gets the lower layers' hidden states with them, for
        `cached_lower_states`; None: they are not written.
      train_layers: as there.

    Returns:
      The scores; `lower_states` only if they had to be computed.

    Raises:
      UserError: process 0 can read the file and this one cannot.
    """
    read = answered(trajectories, chat, config, rows)
    digest = _digest(read, temperature, config, sorted(params), _stamp(policy_folder))
    by_step = len(read), max_steps(read)
    shapes: dict[str, tuple[int, ...]] = {
        **{name: (*by_step, config.hidden_size) for name in _HIDDEN},
        **{name: by_step for name in ("values", "step_mask")},
        "log_probs": (sum(len(t.token_ids) for t in trajectories),),
    }
    saved = _read(cache, digest, shapes)
    if saved is not None:
        log_probs = _by_token(saved.pop("log_probs"), trajectories)
        return Scores(log_probs=log_probs, **saved)
    scores = score(
        config,
        params,
        trajectories,
        rows,
        temperature=temperature,
        title=title,
        chat=chat,
        train_layers=train_layers,
    )
    if write and distributed.is_first():
        arrays = {name: getattr(scores, name) for name in _BY_STEP}
        _write(cache, digest, log_probs=np.concatenate(scores.log_probs), **arrays)
        if lower_cache is not None and scores.lower_states is not None:
            frozen = tree.split(config, params["policy"], train_layers)[1]
            digest = _digest(trajectories, config, _weights(frozen))
            _write(lower_cache, digest, below=np.concatenate(scores.lower_states))
    return scores


def cached_lower_states(
    cache: pathlib.Path, config: ModelConfig, frozen: Params, trajectories: Sequence[Trajectory]
) -> list[np.ndarray] | None:
    """The lower layers' hidden states that `cached_score` wrote, as `lower_states` gives them.

    Args:
      cache: the file.
      config: the model's shape.
      frozen: {"policy": the lower layers as they are now, on the host in float32}, or {}.
      trajectories: of which they are wanted.

    Returns:
      A list of N arrays [T_i, D]; None if the file holds those of other layers or trajectories,
      is torn or not there.
    """
    if not frozen.get("policy") or not trajectories:
        return None
    digest = _digest(trajectories, config, _weights(frozen["policy"]))
    tokens = sum(len(t.token_ids) for t in trajectories)
    saved = _read(cache, digest, {"below": (tokens, config.hidden_size)})
    if saved is None:
        return None
    # An .npz file knows no bfloat16: numpy reads each number back as two raw bytes.
    return _by_token(saved["below"].view(jnp.dtype(config.dtype)), trajectories)


_HIDDEN = ("end_hidden", "value_hidden", "answer_hidden")
_BY_STEP = (*_HIDDEN, "values", "step_mask")


def _digest(trajectories: Sequence[Trajectory], *made_of: object) -> str:
    """Names what was computed of these trajectories."""
    digest = hashlib.sha256(repr(made_of).encode())
    for t in trajectories:
        digest.update(repr((t.key, t.token_ids)).encode())
    return digest.hexdigest()


def _weights(params: Params) -> str:
    """Names weights by their values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _by_token(values: np.ndarray, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """[sum of T_i, ...] -> a list of N arrays [T_i, ...]."""
    return np.split(values, np.cumsum([len(t.token_ids) for t in trajectories])[:-1])


def _read(
    cache: pathlib.Path, digest: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """The arrays of that digest in the file; None if it holds others, is torn or not there.

    What is torn is said: it is computed again.

    Raises:
      UserError: if process 0 has them and this one has not.
    """
    found = None
    try:
        with np.load(cache) as saved:
            if str(saved["digest"]) == digest:
                found = {name: saved[name] for name in shapes}
                for name, shape in shapes.items():
                    if found[name].shape != shape:
                        raise ValueError(f"{name} has shape {list(found[name].shape)}")
    except FileNotFoundError:
        pass
    except Exception as error:  # of zip, of zlib, of numpy's headers, of memory
        found = None
        distributed.say(
            f"{cache}: cannot be read ({type(error).__name__}: {error}); it is computed again"
        )
    if not distributed.broadcast(f"whether {cache.name} can be used", lambda: found is not None):
        return None
    if found is None:
        raise UserError(f"{cache}: process 0 can read it and this one cannot; is it shared?")
    return found


def _write(cache: pathlib.Path, digest: str, **arrays: np.ndarray) -> None:
    temporary = cache.with_name(f".{cache.stem}.{os.getpid()}.tmp.npz")
    np.savez(temporary, digest=np.array(digest), **arrays)  # type: ignore[arg-type]
    temporary.replace(cache)


def _stamp(folder: pathlib.Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a policy's weight files."""
    files = pretrained.weight_files(folder)
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
