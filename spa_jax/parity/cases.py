"""Recorded cases of the released code's arithmetic, computed again and compared.

A folder holds cases of four kinds, each an .npz file and a .json file of the same name:

    ppo_*     one PPO step: inputs, everything that it computed, gradients, weights after
    gae*      advantages of given values and rewards; masked means and whitening
    rewards*  rewards a token of given scores and log-probabilities
    progress* the progress model with its head on the logits, and its gradients (no .json)

and the weights of the models: weights_tiny.npz, weights_lora.npz, weights_tiny_config.json.
Everything in a case that is not an input is compared; what is not known here is named in
`Comparison.unchecked`.
"""

import dataclasses
import functools
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.errors import UserError
from spa_jax.models import lora, padded, transformer, weights
from spa_jax.models.lora import LoraConfig
from spa_jax.models.transformer import ModelConfig
from spa_jax.parity.compare import EXACT, Comparison, Tolerance
from spa_jax.rl import released
from spa_jax.rl.released import Forward, Params

Arrays = dict[str, np.ndarray]

# What the recorded numbers came with: 1e-5 for forward values, rewards and advantages, 1e-4
# relative for gradients and weights.  Beyond 1 a float32 has fewer digits after the point.
FORWARD = Tolerance(absolute=1e-5, relative=1e-6)
GRADIENT = Tolerance(absolute=5e-7, relative=1e-4, of_largest=1e-5)
STATISTIC = Tolerance(absolute=3e-5, relative=3e-6)  # sums over some hundred tokens
COEFFICIENT = Tolerance(absolute=1e-6)
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

CONFIG = "weights_tiny_config.json"
_FULL, _LORA = "weights_tiny.npz", "weights_lora.npz"
_BASE, _PEFT_BASE = "pretrained_model.", "pretrained_model.base_model.model."
_BACKBONE = "backbone.lm."
_IGNORED = -100  # the label of a token that is not trained

_INPUTS = {
    "input_ids", "attention_mask", "query_len", "response_len", "n_scores", "scores", "frag_mask",
    "frag_len", "n_segments", "segments", "perm",
}  # fmt: skip
_KEYS = {
    "case", "padding_side", "pad_token_id", "ppo_config", "per_epoch_minibatches",
    "kl_coef_before", "kl_coef_after", "stats", "peft", "trainable", "weights", "note",
}  # fmt: skip
# Statistics of a minibatch that its current weights do not enter.
_OF_BATCH = {
    "policy/advantages", "policy/advantages_mean", "returns/mean", "returns/var", "val/mean",
    "val/var",
}  # fmt: skip
# Settings of TRL's that change none of the numbers, the released step passing over the scaling
# and clipping of scores among them.
_NO_EFFECT = {
    "exp_name", "seed", "log_with", "task_name", "model_name", "query_dataset", "reward_model",
    "remove_unused_columns", "tracker_kwargs", "accelerator_kwargs", "project_kwargs",
    "tracker_project_name", "push_to_hub_if_best_kwargs", "steps", "init_kl_coef",
    "forward_batch_size", "world_size", "optimize_cuda_cache", "optimize_device_cache",
    "compare_steps", "use_score_scaling", "use_score_norm", "score_clip",
    "gradient_checkpointing", "is_encoder_decoder", "is_peft_model", "backward_batch_size",
    "global_backward_batch_size", "global_batch_size", "dataset_num_proc", "total_ppo_epochs",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case.

    Attributes:
      path: its .npz file.
      check: compares it.
    """

    path: pathlib.Path
    check: Callable[[pathlib.Path], Comparison]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def find(folder: pathlib.Path) -> list[Case]:
    """The cases of a folder.

    Raises:
      UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"--golden={folder}: no such folder")
    kinds = {"gae": check_gae, "rewards": check_rewards, "progress": check_progress}
    kinds["ppo"] = check_ppo
    cases = [
        Case(path, check)
        for kind, check in kinds.items()
        for path in sorted({*folder.glob(f"{kind}.npz"), *folder.glob(f"{kind}_*.npz")})
    ]
    if not cases:
        raise UserError(
            f"--golden={folder}: holds no case (ppo_*.npz, gae.npz, rewards.npz or progress.npz)"
        )
    return cases


# --- Advantages, rewards ------------------------------------------------------------------------


def check_gae(path: pathlib.Path) -> Comparison:
    """Compares a file of GAE and whitening cases."""
    result = Comparison()
    settings = {one["case"]: one for one in read_json(path).get("gae", [])}
    cases = _groups(path)
    for name in sorted(set(settings) - set(cases)):
        raise UserError(f"{path}: has no arrays of case {name}, which its .json describes")
    for name, arrays in cases.items():
        if "x" in arrays:
            ours = _whitening(arrays)
        elif name in settings:
            ours = _gae(path, name, arrays, settings[name])
        else:
            result.failures.append(f"{name}: the .json file does not give its settings")
            continue
        inputs = {"x", "mask", "values", "rewards"}
        _compare_all(result, f"{name}/", ours, arrays, inputs)
    return result


def _whitening(arrays: Arrays) -> dict[str, jax.Array]:
    x, mask = arrays["x"], arrays["mask"]
    return {
        "mean": released.masked_mean(x, mask),
        "var_unbiased": released.masked_var(x, mask),
        "var_biased": released.masked_var(x, mask, unbiased=False),
        "whiten": released.whiten(x, mask),
        "whiten_noshift": released.whiten(x, mask, shift_mean=False),
    }


def _gae(
    path: pathlib.Path, name: str, arrays: Arrays, settings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    got = released.token_gae(
        *(_need(path, arrays, part, f"{name}/") for part in ("values", "rewards", "mask")),
        gamma=settings["gamma"],
        lam=settings["lam"],
        whiten_rewards=settings.get("whiten_rewards", False),
    )
    return {
        "values_masked": got.values,
        "advantages": got.whitened,
        "advantages_raw": got.raw,
        "returns": got.returns,
    }


def check_rewards(path: pathlib.Path) -> Comparison:
    """Compares a file of reward cases."""
    result, text = Comparison(), read_json(path)
    settings = {one["name"]: text | one for one in text.get("cases", [])}
    cases = _groups(path)
    for name in sorted(set(settings) - set(cases)):
        raise UserError(f"{path}: has no arrays of case {name}, which its .json describes")
    for name, arrays in cases.items():
        if name not in settings:
            result.failures.append(f"{name}: the .json file does not give its settings")
            continue
        one = settings[name]
        need = functools.partial(_need, path, arrays, prefix=f"{name}/")
        scores, count, mask = need("scores"), np.array(one["n_scores"]), need("mask")
        kl = released.kl_penalty(need("logprobs"), need("ref_logprobs"), one["kl_penalty"])
        penalty = -one["kl_coef"] * kl
        weighted = released.score_rewards(scores, count, mask)
        plain = released.score_rewards(scores, count, mask, weighted=False)
        ours = {
            "kls": kl,
            "non_score": penalty,
            "rewards_ref": penalty + weighted,
            "rewards_plain": penalty + plain,
        }
        inputs = {"logprobs", "ref_logprobs", "mask", "scores"}
        _compare_all(result, f"{name}/", ours, arrays, inputs)
        _check_padding(result, f"{name}/scores", scores, count)
    return result


# --- The progress model -------------------------------------------------------------------------


def check_progress(path: pathlib.Path) -> Comparison:
    """Compares a file of the progress model: one part a side of padding."""
    result, arrays = Comparison(), read_arrays(path)
    config, folder = read_config(path.parent), path.parent
    policy = _decoder(config, folder / _FULL, _part(read_arrays(folder / _FULL), "policy/"), _BASE)
    head = {name: _need(path, arrays, f"head_{name}") for name in ("weight", "bias")}
    sides = {name.split("/")[0] for name in arrays if name.endswith("/input_ids")}
    if not sides:
        raise UserError(f"{path}: array SIDE/input_ids is missing; fetch the file again")
    for side in sorted(sides):
        part = _part(arrays, f"{side}/")
        for name, ours, tolerance in _progress(path, config, policy, head, part):
            if name in part:
                result.add(f"{side}/{name}", ours, part[name], tolerance)
        known = {e.name.split("[")[0].split(" (")[0] for e in result.errors}
        inputs = {f"{side}/{n}" for n in ("input_ids", "attention_mask", "gpt_unmask", "labels")}
        of_side = {name for name in arrays if name.startswith(f"{side}/")}
        result.unchecked += sorted(of_side - known - inputs)
    others = {name for name in arrays if name.split("/")[0] not in sides}
    result.unchecked += sorted(others - {"head_weight", "head_bias"})
    return result


def _progress(
    path: pathlib.Path, config: ModelConfig, policy: Params, head: Params, arrays: Arrays
) -> Iterator[tuple[str, Any, Tolerance]]:
    """What is compared of one side: its name, our value, its tolerance."""
    need = functools.partial(_need, path, arrays)
    tokens, attention = need("input_ids"), need("attention_mask")
    ends, labels = released.turn_ends(need("gpt_unmask") != _IGNORED), jnp.asarray(need("labels"))

    @jax.jit
    def run(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = padded.logits(config, params["policy"], tokens, attention)
        values = released.turn_values(logits, params["head"]["weight"], params["head"]["bias"])
        predictions = released.progress_predictions(values, ends)
        return released.progress_loss(predictions, labels), (values, predictions)

    params = {"policy": policy, "head": head}
    (loss, (values, predictions)), gradient = jax.value_and_grad(run, has_aux=True)(params)
    table, places = _by_turn(np.asarray(values), np.asarray(ends))
    error = np.square(np.asarray(predictions) - np.asarray(labels))
    yield "turn_end", places, EXACT
    yield "fp32/n_turns", np.asarray(ends).sum(1), EXACT
    yield "fp32/turn_values", table, FORWARD
    for name in ("predictions", "per_sample_prediction"):
        yield f"fp32/{name}", predictions, FORWARD
    yield "fp32/per_sample_loss", error, FORWARD
    yield "fp32/loss", loss, FORWARD
    for name, array in weights.to_named(config, gradient["policy"]).items():
        yield f"fp32/grad/{_BACKBONE}{name}", array, GRADIENT
    for name in ("weight", "bias"):
        yield f"fp32/grad/LN.{name}", gradient["head"][name], GRADIENT


def _by_turn(values: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, S] the values at the turns' ends, nan behind them, and their columns, -1 behind them."""
    count = int(ends.sum(1).max(initial=0))
    table, places = np.full((len(ends), count), np.nan), np.full((len(ends), count), -1)
    for i, row in enumerate(ends):
        (columns,) = np.nonzero(row)
        table[i, : len(columns)], places[i, : len(columns)] = values[i, columns], columns
    return table, places


# --- The PPO step -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """The models of a PPO case.

    Attributes:
      forward: logits and values of its parameters.
      trained, frozen, reference: as `released.step` takes them.
      name: trained parameters -> {recorded name: array}.
    """

    forward: Forward
    trained: Params
    frozen: Params
    reference: Params
    name: Callable[[Params], Arrays]


def check_ppo(path: pathlib.Path) -> Comparison:
    """Runs the PPO step of a case and compares everything that it recorded."""
    result, arrays, text = Comparison(), read_arrays(path), read_json(path)
    config = _ppo_config(path, text, result)
    model = _lora_model(path, text, result) if "peft" in text else _full_model(path, text)
    need = functools.partial(_need, path, arrays)
    mask = released.policy_mask(need("frag_mask"))
    inputs = ("input_ids", "attention_mask", "scores", "n_scores")
    tokens, attention, scores, count = (jnp.asarray(need(name)) for name in inputs)
    batch = released.Batch(tokens, attention, mask, scores, count)
    orders = _orders(path, need("perm"), config)
    kl_coef = float(text.get("kl_coef_before", text["ppo_config"].get("init_kl_coef", 0.2)))

    def run(model: Model) -> Run:
        before = released.start(model.trained, config, kl_coef)
        after, trace = released.step(
            model.forward, before, model.frozen, model.reference, batch, orders, config
        )
        stats = released.statistics(before, trace, batch, need("query_len"), config)
        return Run(model, after, trace, stats)

    ours = run(model)
    slack = _slack(ours, [run(_jitter(model, seed)) for seed in range(_JITTERED_RUNS)])
    _compare_experience(result, arrays, ours.trace.experience, mask)
    _compare_minibatches(result, arrays, ours.trace, config, slack)
    _compare_gradient(result, arrays, model, ours.trace, config)
    moved = dataclasses.replace(WEIGHT, absolute=_ADAM * config.learning_rate)
    for name, array in model.name(ours.after.trained).items():
        if (key := f"after/{name}") in arrays:
            result.add(key, array, arrays[key], moved, slack.get(key, 0.0))
    _compare_text(result, text, ours, config, slack)
    _check_rows(result, arrays)
    known = {e.name.split("[")[0].split(" (")[0] for e in result.errors}
    result.unchecked += sorted(set(arrays) - known - _INPUTS)
    return result


class Run(NamedTuple):
    """One run of a case's step.

    Attributes:
      model: what it was run with.
      after: the trainer's state after the step.
      trace: what happened in it.
      stats: its statistics.
    """

    model: Model
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


def _jitter(model: Model, seed: int) -> Model:
    """The model with the last bits of its policy's weights changed at random."""
    rng = np.random.default_rng(seed)

    def change(x: np.ndarray) -> np.ndarray:
        return (x * (1.0 + _JITTER * rng.standard_normal(x.shape))).astype(x.dtype)

    trained, frozen = jax.tree.map(change, (model.trained, model.frozen))
    return dataclasses.replace(model, trained=trained, frozen=frozen)


def _slack(ours: Run, others: Sequence[Run]) -> dict[str, np.ndarray]:
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
    config = released.Config(**{name: stated[name] for name in stated if name in fields})
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


def _full_model(path: pathlib.Path, text: Mapping[str, Any]) -> Model:
    """All parameters are trained; the reference is a model of its own."""
    config, file = read_config(path.parent), path.parent / str(text.get("weights", _FULL))
    arrays = read_arrays(file)

    def parts(who: str) -> Params:
        named = _part(arrays, f"{who}/")
        return {"policy": _decoder(config, file, named, _BASE), "value": _value_head(file, named)}

    def name(params: Params) -> Arrays:
        named = weights.to_named(config, params["policy"])
        return _with_value_head({_BASE + key: array for key, array in named.items()}, params)

    return Model(_forward(config, None), parts("policy"), {}, parts("ref"), name)


def _lora_model(path: pathlib.Path, text: Mapping[str, Any], result: Comparison) -> Model:
    """An adapter and the value head are trained; the reference is the base, without an adapter."""
    config, file = read_config(path.parent), path.parent / str(text.get("weights", _LORA))
    named = {
        name.removeprefix("policy/").replace(".base_layer.", "."): array
        for name, array in read_arrays(file).items()
    }
    peft = text["peft"]
    try:
        adapter = lora.from_peft(named)
        targets = lora.targets_of(peft["target_modules"])
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    scale = float(peft.get("scaling", peft["lora_alpha"] / peft["r"]))
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if peft.get(key):
            result.failures.append(f"peft: {key} is not supported")
    result.add("peft/lora_alpha", scale * peft["r"], peft["lora_alpha"], FORWARD)
    ranks = {leaves["a"].shape[-1] for leaves in adapter["layers"].values()}
    result.add("peft/r", sorted(ranks), [peft["r"]], EXACT)
    result.add("peft/target_modules", sorted(targets), sorted(adapter["layers"]), EXACT)
    settings = LoraConfig(peft["r"], scale * peft["r"], targets)
    base = {"policy": _decoder(config, file, named, _PEFT_BASE)}
    value = {"value": _value_head(file, named)}

    def name(params: Params) -> Arrays:
        adapter = lora.to_peft(params["adapter"])
        return _with_value_head({_PEFT_BASE + key: a for key, a in adapter.items()}, params)

    trained = {"adapter": adapter} | value
    return Model(_forward(config, settings), trained, base, base | value, name)


@functools.lru_cache(maxsize=8)  # one function a shape of model: what is compiled is kept
def _forward(config: ModelConfig, adapter: LoraConfig | None) -> Forward:
    """Logits and values of {"policy", "value"}, and of an adapter where there is one."""

    def forward(
        params: Params, tokens: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        policy = params["policy"]
        if adapter is not None and "adapter" in params:
            policy = lora.merge(adapter, policy, params["adapter"])
        hidden = padded.hidden_states(config, policy, tokens, attention_mask)
        values = hidden @ params["value"]["weight"][0] + params["value"]["bias"][0]
        return transformer.logits(policy, hidden), values

    return forward


def _compare_experience(
    result: Comparison, arrays: Arrays, ours: released.Experience, mask: jax.Array
) -> None:
    """What was computed before the first update."""
    found = {
        "masks": mask, "logprobs": ours.log_probs, "ref_logprobs": ours.ref_log_probs,
        "values_raw": ours.values, "kls": ours.kl, "rewards": ours.rewards,
        "non_score_rewards": ours.non_score_rewards, "values_masked": ours.advantages.values,
        "advantages": ours.advantages.whitened, "returns": ours.advantages.returns,
        "advantages_raw": ours.advantages.raw,
        "masks_aligned_derived": _aligned(arrays),
    }  # fmt: skip
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
    result.add("mb_indices", trace.minibatches, arrays.get("mb_indices", []), EXACT)
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
    result: Comparison,
    arrays: Arrays,
    model: Model,
    trace: released.Trace,
    config: released.Config,
) -> None:
    """The first gradient; which one is meant is only said for the plain case.

    Where minibatches are accumulated or the gradient is clipped, "first" may be that of the
    first minibatch, or of the first update before or after clipping.  It must be one of them as a
    whole, and the report says which.
    """
    readings = {"the first minibatch's": trace.first_gradient}
    if config.gradient_accumulation_steps > 1:
        readings["the first update's, accumulated"] = trace.first_update
    if config.max_grad_norm is not None:
        clipped = released.clip_gradient(trace.first_update, config.max_grad_norm)
        readings["the first update's, clipped"] = clipped
    tried = {}
    for what, gradient in readings.items():
        tried[what] = Comparison()
        _compare_one_gradient(tried[what], arrays, model.name(gradient))
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
    ours: Run,
    config: released.Config,
    slack: Mapping[str, np.ndarray],
) -> None:
    """The json's numbers: statistics, the coefficient, the number of minibatches."""
    for name, recorded in text.get("stats", {}).items():
        key = f"stats/{name}"
        if name in ("objective/kl_coef", "ppo/learning_rate"):
            result.add(key, ours.stats[name], recorded, COEFFICIENT)
        elif (
            name in ours.stats
            and name.removeprefix("ppo/")
            in ours.trace.stats[0].keys() | {"val/var_explained"} - _OF_BATCH
        ):
            result.add(key, ours.stats[name], recorded, UPDATED, slack.get(key, 0.0))
        elif name in ours.stats:
            result.add(key, ours.stats[name], recorded, STATISTIC)
        elif not name.startswith("time/"):
            result.unchecked.append(key)
    if "kl_coef_after" in text:
        result.add("kl_coef_after", ours.after.kl_coef, text["kl_coef_after"], COEFFICIENT)
    if "per_epoch_minibatches" in text:
        minibatches = config.batch_size // config.mini_batch_size
        result.add("per_epoch_minibatches", minibatches, text["per_epoch_minibatches"], EXACT)
    if "trainable" in text:
        names = sorted(ours.model.name(ours.model.trained))
        result.add("trainable", names, sorted(text["trainable"]), EXACT)
    result.unchecked += sorted(set(text) - _KEYS)


def _orders(path: pathlib.Path, perm: np.ndarray, config: released.Config) -> list[list[int]]:
    """The order of the rows in each epoch; refuses what is none."""
    orders = perm.tolist()
    rows = list(range(config.batch_size))
    if perm.ndim != 2 or any(sorted(order) != rows for order in orders):
        raise UserError(f"{path}: perm is not orders of {config.batch_size} rows")
    if len(orders) < config.ppo_epochs and not config.early_stopping:
        raise UserError(f"{path}: perm has {len(orders)} orders for {config.ppo_epochs} epochs")
    return orders


def _check_rows(result: Comparison, arrays: Arrays) -> None:
    """What is recorded of the rows beside what the step reads."""
    _check_padding(result, "scores", arrays["scores"], arrays["n_scores"])
    lengths = arrays["attention_mask"].sum(1)
    if "response_len" in arrays:
        result.add("lengths", arrays["query_len"] + arrays["response_len"], lengths, EXACT)
    if "segments" in arrays:
        covered = np.zeros_like(arrays["frag_mask"])
        for row, segments in zip(covered, arrays["segments"], strict=True):
            for begin, end in segments:
                row[max(begin, 0) : max(end, 0)] = 1
        if not np.array_equal(covered, arrays["frag_mask"]):
            result.unchecked.append("segments (they are not the tokens of frag_mask)")


def _check_padding(result: Comparison, name: str, scores: np.ndarray, count: np.ndarray) -> None:
    """Behind a row's scores there is nothing: 0, or nan."""
    behind = np.arange(scores.shape[1]) >= np.asarray(count)[:, None]
    rest = np.nan_to_num(scores[behind].astype(np.float64))
    result.add(f"{name} (padding)", np.zeros_like(rest), rest, FORWARD)


# --- Files --------------------------------------------------------------------------------------


def read_arrays(path: pathlib.Path) -> Arrays:
    """All arrays of an .npz file.

    Raises:
      UserError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file ({error}); fetch it again") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The .json file beside a case's .npz file.

    Raises:
      UserError: no such file, or a damaged one.
    """
    path = path.with_suffix(".json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; it states the case's settings") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return value


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The shape of the cases' model.

    Raises:
      UserError: as `weights.read_config`, or no such file.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: no such file")
    return weights.read_config(folder / CONFIG)


def _need(path: pathlib.Path, arrays: Arrays, name: str, prefix: str = "") -> np.ndarray:
    if name not in arrays:
        raise UserError(f"{path}: array {prefix}{name} is missing; fetch the file again")
    return arrays[name]


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _groups(path: pathlib.Path) -> dict[str, Arrays]:
    """The arrays of each case of a file: "c00/mask" is the mask of c00."""
    groups: dict[str, Arrays] = {}
    for name, array in read_arrays(path).items():
        case, _, rest = name.partition("/")
        groups.setdefault(case, {})[rest] = array
    return groups


def _compare_all(
    result: Comparison,
    prefix: str,
    ours: Mapping[str, Any],
    arrays: Arrays,
    inputs: set[str],
) -> None:
    """Compares what is recorded of `ours`; names what is neither computed nor an input."""
    for name, array in ours.items():
        if name in arrays:
            result.add(prefix + name, array, arrays[name], FORWARD)
    result.unchecked += [prefix + name for name in sorted(set(arrays) - set(ours) - inputs)]


def _decoder(config: ModelConfig, file: pathlib.Path, named: Arrays, prefix: str) -> Params:
    try:
        return weights.from_named(config, _part(named, prefix))
    except UserError as error:
        raise UserError(f"{file}: {error} (below {prefix})") from error


def _value_head(file: pathlib.Path, named: Arrays) -> Params:
    return {part: _need(file, named, f"v_head.summary.{part}") for part in ("weight", "bias")}


def _with_value_head(named: Arrays, params: Params) -> Arrays:
    head = {f"v_head.summary.{part}": a for part, a in params["value"].items()}
    return {name: np.asarray(array) for name, array in {**named, **head}.items()}
