"""One recorded PPO step: run again, and everything that was recorded of it compared."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.errors import UserError
from spa_jax.parity import files, released
from spa_jax.parity import model as model_lib
from spa_jax.parity.compare import (
    COEFFICIENT,
    EXACT,
    FORWARD,
    GRADIENT,
    STATISTIC,
    Comparison,
    Tolerance,
    check_padding,
)
from spa_jax.parity.files import Arrays
from spa_jax.parity.model import Model

# Adam divides a gradient by its own size.  Where that is as small as its rounding error, the
# update is anything between plus and minus the learning rate, on the recording machine as on any
# other, and so is all that is computed from that weight.  How far a number may be off for that
# reason is measured: the step is run again from weights whose last bit is changed at random.
UPDATED = Tolerance(absolute=1e-4, relative=1e-5)
WEIGHT = Tolerance(relative=1e-4)
_ADAM = 2e-3  # of the learning rate: what a weight may be off beyond that in any case
_JITTERED_RUNS = 8
_JITTER = 2e-7  # relative; a float32 has 1.2e-7
_SLACK = 6.0  # times the largest move in those runs

_INPUTS = set(
    "input_ids attention_mask query_len response_len n_scores scores frag_mask frag_len "
    "n_segments segments perm".split()
)
_RESULTS = set(
    "masks logprobs ref_logprobs values_raw values_masked rewards non_score_rewards kls "
    "advantages returns mb_indices mb_logprobs mb_vpreds".split()
)
_KEYS = set(
    "case padding_side pad_token_id ppo_config per_epoch_minibatches kl_coef_before "
    "kl_coef_after stats peft trainable weights note".split()
)
# Statistics of a minibatch that its current weights do not enter.
_OF_BATCH = set(
    "policy/advantages policy/advantages_mean returns/mean returns/var val/mean val/var".split()
)
# Settings of TRL's that change none of the numbers, the released step passing over the scaling
# and clipping of scores among them.
_NO_EFFECT = set(
    "exp_name seed log_with task_name model_name query_dataset reward_model "
    "remove_unused_columns tracker_kwargs accelerator_kwargs project_kwargs "
    "tracker_project_name push_to_hub_if_best_kwargs steps init_kl_coef forward_batch_size "
    "world_size optimize_cuda_cache optimize_device_cache compare_steps use_score_scaling "
    "use_score_norm score_clip gradient_checkpointing is_encoder_decoder is_peft_model "
    "backward_batch_size global_backward_batch_size global_batch_size dataset_num_proc "
    "total_ppo_epochs".split()
)


class StepRun(NamedTuple):
    """One run of a case's step.

    Attributes:
      model, batch: what it was run with.
      after: the trainer's state after the step.
      trace: what happened in it.
      stats: its statistics.
    """

    model: Model
    batch: released.Batch
    after: released.State
    trace: released.Trace
    stats: dict[str, jax.Array]

    def numbers(self) -> dict[str, np.ndarray]:
        """What depends on updated weights; of the weights, how far they moved."""
        model, trained = self.model, self.after.trained
        before = model.name(model.trained)
        moves = {
            f"after/{name}": array.astype(np.float64) - before[name]
            for name, array in model.name(trained).items()
        }
        stats = {f"stats/{name}": np.asarray(value) for name, value in self.stats.items()}
        return moves | stats | _by_minibatch(self.trace)


def check(path: pathlib.Path) -> Comparison:
    """Runs the PPO step of a case and compares everything that it recorded."""
    arrays, text = files.read_arrays(path), files.read_json(path)
    return compare(recompute(path, arrays, text), arrays, text)


class Recomputed(NamedTuple):
    """A case's step as we compute it.

    Attributes:
      config: its settings.
      ours: the step.
      slack: how far a number may be off because of how it is rounded, name by name.
      result: what was found so far.
    """

    config: released.Config
    ours: StepRun
    slack: dict[str, np.ndarray]
    result: Comparison


def recompute(path: pathlib.Path, arrays: Arrays, text: Mapping[str, Any]) -> Recomputed:
    """Runs a case's step, and again from weights whose last bits are changed.

    Args:
      path: the case's .npz file, for messages; the weights lie beside it.
      arrays, text: what it and its .json hold.

    Raises:
      UserError: something that the step needs is missing.
    """
    result = Comparison()
    config = _ppo_config(path, text, result)
    model = model_lib.adapted(path, text, result) if "peft" in text else model_lib.full(path, text)
    need = functools.partial(files.need, path, arrays)
    batch = _batch(path, arrays, config)
    orders = _orders(path, need("perm"), config)
    kl_coef = float(text.get("kl_coef_before", text["ppo_config"].get("init_kl_coef", 0.2)))

    def run(model: Model) -> StepRun:
        before = released.start(model.trained, config, kl_coef)
        after, trace = released.step(
            model.forward,
            before,
            model.frozen,
            model.reference,
            batch,
            permutations=orders,
            config=config,
        )
        stats = released.statistics(before, trace, batch, need("query_len"), config)
        return StepRun(model, batch, after, trace, stats)

    ours = run(model)
    others = [run(_jitter(model, seed)) for seed in range(_JITTERED_RUNS)]
    return Recomputed(config, ours, _slack(ours, others), result)


def compare(case: Recomputed, arrays: Arrays, text: Mapping[str, Any]) -> Comparison:
    """Compares a step that was computed again with what was recorded of it."""
    config, ours, slack, result = case
    result = result.copy()
    _compare_experience(result, arrays, ours)
    _compare_minibatches(result, arrays, ours.trace, config, slack)
    _compare_gradient(result, arrays, ours, config)
    moved = dataclasses.replace(WEIGHT, absolute=_ADAM * config.learning_rate)
    for name, array in ours.model.name(ours.after.trained).items():
        if (key := f"after/{name}") in arrays:
            result.add(key, array, arrays[key], moved, slack.get(key, 0.0))
    _compare_text(result, text, ours, config, slack)
    _check_rows(result, arrays)
    result.unchecked += sorted(set(arrays) - result.compared - _INPUTS)
    trained = ours.model.name(ours.model.trained)
    result.need(_RESULTS | {f"mb_stats/{name}" for name in ours.trace.stats[0]})
    result.need(trained, "grad_first/")
    result.need(trained, "after/")
    return result


def _jitter(model: Model, seed: int) -> Model:
    """The model with the last bits of its policy's weights changed at random."""
    rng = np.random.default_rng(seed)

    def change(x: np.ndarray) -> np.ndarray:
        return (x * (1.0 + _JITTER * rng.standard_normal(x.shape))).astype(x.dtype)

    trained, frozen = jax.tree.map(change, (model.trained, model.frozen))
    return dataclasses.replace(model, trained=trained, frozen=frozen)


def _slack(ours: StepRun, others: Sequence[StepRun]) -> dict[str, np.ndarray]:
    """How far each number may be off because of how it is rounded, name by name."""
    slack: dict[str, np.ndarray] = {}
    numbers = ours.numbers()
    for other in others:
        for name, array in other.numbers().items():
            if array.shape == numbers[name].shape:  # another run may stop an epoch earlier
                with np.errstate(invalid="ignore"):
                    move = np.nan_to_num(np.abs(array - numbers[name]), posinf=0.0)
                slack[name] = np.maximum(slack.get(name, 0.0), _SLACK * move)
    return slack


def _by_minibatch(trace: released.Trace) -> dict[str, np.ndarray]:
    """What every minibatch gave, under the recorded names."""
    found = {
        "mb_logprobs": np.stack([one.log_probs for one in trace.outputs]),
        "mb_vpreds": np.stack([one.values for one in trace.outputs]),
    }
    for name in trace.stats[0]:
        found[f"mb_stats/{name}"] = np.stack([one[name] for one in trace.stats])
    return found


def _ppo_config(path: pathlib.Path, text: Mapping[str, Any], result: Comparison) -> released.Config:
    """The settings that the json states; those that are not known fail the case."""
    stated = text.get("ppo_config")
    if not isinstance(stated, dict):
        raise UserError(f"{path.with_suffix('.json')}: ppo_config is missing; fetch it again")
    fields = {field.name for field in dataclasses.fields(released.Config)}
    for name in sorted(set(stated) - fields - _NO_EFFECT):
        result.failures.append(f"ppo_config: {name} is not a setting that is known here")
    _check_types(path, stated)
    try:
        config = released.Config(**{name: stated[name] for name in stated if name in fields})
    except TypeError as error:
        raise UserError(f"{path.with_suffix('.json')}: ppo_config: {error}") from error
    if config.kl_penalty not in released.KL_PENALTIES:
        raise UserError(
            f"{path.with_suffix('.json')}: kl_penalty {config.kl_penalty!r} is none of "
            f"{', '.join(released.KL_PENALTIES)}"
        )
    update = config.mini_batch_size * config.gradient_accumulation_steps
    if config.batch_size % update:
        raise UserError(
            f"{path.with_suffix('.json')}: batch_size {config.batch_size} is no multiple of "
            f"mini_batch_size * gradient_accumulation_steps, {update}"
        )
    return config


def _check_types(path: pathlib.Path, stated: Mapping[str, Any]) -> None:
    """Refuses settings of another type than TRL's."""
    kinds: dict[Any, Callable[[Any], bool]] = {
        int: lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0,
        float: lambda x: isinstance(x, (int, float)) and not isinstance(x, bool),
        bool: lambda x: isinstance(x, bool),
        str: lambda x: isinstance(x, str),
        float | None: lambda x: x is None or isinstance(x, (int, float)),
    }
    for field in dataclasses.fields(released.Config):
        if field.name in stated and not kinds[field.type](stated[field.name]):
            raise UserError(
                f"{path.with_suffix('.json')}: ppo_config: {field.name} is "
                f"{stated[field.name]!r}; fetch it again"
            )


def _compare_experience(result: Comparison, arrays: Arrays, run: StepRun) -> None:
    """What was computed before the first update."""
    ours = run.trace.experience
    found = {
        "masks": run.batch.mask,
        "logprobs": ours.log_probs,
        "ref_logprobs": ours.ref_log_probs,
        "values_raw": ours.values,
        "kls": ours.kl,
        "rewards": ours.rewards,
        "non_score_rewards": ours.non_score_rewards,
        "values_masked": ours.advantages.values,
        "advantages": ours.advantages.whitened,
        "returns": ours.advantages.returns,
        "advantages_raw": ours.advantages.raw,
        "masks_aligned_derived": _aligned(arrays),
    }
    for name, array in found.items():
        if name in arrays:
            result.add(name, array, arrays[name], FORWARD)


def _aligned(arrays: Arrays) -> np.ndarray:
    """[B, T-1] the mask if the trained tokens moved with padding on the left."""
    moved = np.zeros_like(arrays["frag_mask"])
    for i, (row, attention) in enumerate(
        zip(arrays["frag_mask"], arrays["attention_mask"], strict=True)
    ):
        first = int(np.argmax(attention))
        moved[i, first:] = row[: row.size - first]
    return moved[:, 1:]


def _compare_minibatches(
    result: Comparison,
    arrays: Arrays,
    trace: released.Trace,
    config: released.Config,
    slack: Mapping[str, np.ndarray],
) -> None:
    """What every minibatch gave; the first ones' weights are those of before."""
    if "mb_indices" in arrays:
        result.add("mb_indices", trace.minibatches, arrays["mb_indices"], EXACT)
    first = config.gradient_accumulation_steps
    for name, ours in _by_minibatch(trace).items():
        if name not in arrays:
            continue
        recorded = arrays[name]
        if name.removeprefix("mb_stats/") in _OF_BATCH or ours.shape != recorded.shape:
            result.add(name, ours, recorded, STATISTIC if ours.ndim == 1 else FORWARD)
            continue
        loose = slack.get(name, np.zeros(ours.shape))
        before = STATISTIC if ours.ndim == 1 else FORWARD
        result.add(name, ours[:first], recorded[:first], before)
        result.add(f"{name}[{first}:]", ours[first:], recorded[first:], UPDATED, loose[first:])


def _compare_gradient(
    result: Comparison, arrays: Arrays, ours: StepRun, config: released.Config
) -> None:
    """The first gradient; which one is meant is only said for the plain case.

    Where minibatches are accumulated or the gradient is clipped, "first" may be that of the
    first minibatch, or of the first update before or after clipping.  It must be one of them as a
    whole, and the report says which.
    """
    trace = ours.trace
    readings = {"the first minibatch's": trace.first_gradient}
    if config.gradient_accumulation_steps > 1:
        readings["the first update's, accumulated"] = trace.first_update
    if config.max_grad_norm is not None:
        clipped = released.clip_gradient(trace.first_update, config.max_grad_norm)
        readings["the first update's, clipped"] = clipped
    tried = {}
    for what, gradient in readings.items():
        tried[what] = Comparison()
        _compare_one_gradient(tried[what], arrays, ours.model.name(gradient))
    best = min(tried, key=lambda what: tried[what].worst.share)
    result.errors += tried[best].errors
    if len(readings) > 1:
        result.notes.append(f"grad_first is {best}")


def _compare_one_gradient(result: Comparison, arrays: Arrays, named: Arrays) -> None:
    for name, array in named.items():
        if f"grad_first/{name}" in arrays:
            result.add(f"grad_first/{name}", array, arrays[f"grad_first/{name}"], GRADIENT)
    if "grad_first_names" in arrays:
        result.add("grad_first_names", sorted(named), sorted(arrays["grad_first_names"]), EXACT)
    norms = {name: np.linalg.norm(array.astype(np.float64)) for name, array in named.items()}
    if "grad_first_norms" in arrays:
        order = arrays.get("grad_first_names", np.array(sorted(named)))
        ours = [norms.get(str(name), np.nan) for name in order]
        result.add("grad_first_norms", ours, arrays["grad_first_norms"], GRADIENT)
    if "grad_first_total_norm" in arrays:
        total = np.linalg.norm(list(norms.values()))
        result.add("grad_first_total_norm", total, arrays["grad_first_total_norm"], GRADIENT)


def _compare_text(
    result: Comparison,
    text: Mapping[str, Any],
    ours: StepRun,
    config: released.Config,
    slack: Mapping[str, np.ndarray],
) -> None:
    """The json's numbers: statistics, the coefficient, the number of minibatches."""
    updated = (set(ours.trace.stats[0]) | {"val/var_explained"}) - _OF_BATCH
    for name, recorded in text.get("stats", {}).items():
        key = f"stats/{name}"
        if name in ("objective/kl_coef", "ppo/learning_rate"):
            result.add(key, ours.stats[name], recorded, COEFFICIENT)
        elif name in ours.stats and name.removeprefix("ppo/") in updated:
            result.add(key, ours.stats[name], recorded, UPDATED, slack.get(key, 0.0))
        elif name in ours.stats:
            result.add(key, ours.stats[name], recorded, STATISTIC)
        elif not name.startswith("time/"):
            result.unchecked.append(key)
    result.failures += [
        f"{name} is missing in the .json file; fetch it again"
        for name in ("stats", "kl_coef_after")
        if name not in text
    ]
    if "kl_coef_after" in text:
        result.add("kl_coef_after", ours.after.kl_coef, text["kl_coef_after"], COEFFICIENT)
    if "per_epoch_minibatches" in text:
        minibatches = config.batch_size // config.mini_batch_size
        result.add("per_epoch_minibatches", minibatches, text["per_epoch_minibatches"], EXACT)
    if "trainable" in text:
        names = sorted(ours.model.name(ours.model.trained))
        result.add("trainable", names, sorted(text["trainable"]), EXACT)
    result.unchecked += sorted(set(text) - _KEYS)


def _batch(path: pathlib.Path, arrays: Arrays, config: released.Config) -> released.Batch:
    """The rows of the case; refuses arrays that do not fit each other."""
    need = functools.partial(files.need, path, arrays)
    shape = (config.batch_size, need("input_ids").shape[-1])
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": shape,
        "attention_mask": shape,
        "frag_mask": shape,
    }
    shapes["scores"] = (config.batch_size, need("scores").shape[-1])
    shapes |= {"n_scores": shape[:1], "query_len": shape[:1]}
    for name, wanted in shapes.items():
        if need(name).shape != wanted:
            raise UserError(f"{path}: {name} has shape {need(name).shape}, expected {wanted}")
    tokens, attention, scores, count = (
        jnp.asarray(need(name)) for name in ("input_ids", "attention_mask", "scores", "n_scores")
    )
    mask = released.policy_mask(need("frag_mask"))
    return released.Batch(tokens, attention, mask, scores, count)


def _orders(path: pathlib.Path, perm: np.ndarray, config: released.Config) -> list[list[int]]:
    """The order of the rows in each epoch; refuses what is none."""
    orders = perm.tolist()
    rows = list(range(config.batch_size))
    if perm.ndim != 2 or any(sorted(order) != rows for order in orders):
        raise UserError(f"{path}: perm is not orders of {config.batch_size} rows")
    if not orders or (len(orders) < config.ppo_epochs and not config.early_stopping):
        raise UserError(f"{path}: perm has {len(orders)} orders for {config.ppo_epochs} epochs")
    return orders


def _check_rows(result: Comparison, arrays: Arrays) -> None:
    """What is recorded of the rows beside what the step reads."""
    check_padding(result, "scores", arrays["scores"], arrays["n_scores"])
    lengths = arrays["attention_mask"].sum(1)
    if "response_len" in arrays:
        result.add("lengths", arrays["query_len"] + arrays["response_len"], lengths, EXACT)
    if "frag_len" in arrays:
        result.add("frag_len", arrays["frag_len"], lengths, EXACT)
    if "segments" in arrays:
        segments, masks = arrays["segments"], arrays["frag_mask"]
        if segments.ndim != 3 or segments.shape[::2] != (len(masks), 2):
            result.failures.append(f"segments has shape {segments.shape}")
            return
        wrong = [i for i, row in enumerate(segments) if not _covers(row, masks[i])]
        result.failures += [f"segments[{i}] are not the tokens of frag_mask[{i}]" for i in wrong]
        if "n_segments" in arrays:
            count = np.any(segments != -1, -1).sum(1)
            result.add("n_segments", arrays["n_segments"], count, EXACT)


def _covers(segments: np.ndarray, mask: np.ndarray) -> bool:
    """Whether segments [S, 2], apart from those of -1, are the tokens of a mask [T].

    They may be those of the row as it was before it was cut on the left.
    """
    used = segments[np.any(segments != -1, -1)]
    if not np.array_equal(used, np.round(used)) or np.any(used[1:, 0] < used[:-1, 1]):
        return False
    begins, ends = used[:, 0].astype(int), used[:, 1].astype(int)
    width = max(mask.size, int(ends.max(initial=0)))
    row = np.zeros(2 * width, mask.dtype)
    for begin, end in zip(begins, ends, strict=True):
        row[max(begin, 0) : max(end, 0)] = 1
    padded = np.pad(mask, (0, 2 * width - mask.size))
    return any(np.array_equal(row[cut:], padded[: row.size - cut]) for cut in range(width))
