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
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import huggingface
from spa_jax.parity import files, padded, ppo, released
from spa_jax.parity.compare import (
    EXACT,
    FORWARD,
    GRADIENT,
    Comparison,
    Tolerance,
    check_padding,
)
from spa_jax.parity.files import Arrays
from spa_jax.parity.released import Params

_BACKBONE = "backbone.lm."
_SAID_TWICE = {"fp32/per_sample_prediction", "fp32/per_sample_loss", "turn_end"}  # may be left out
_IGNORED = -100  # the label of a token that is not trained


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
      UserError: no such folder, none in it, or a .json file without its .npz.
    """
    if not folder.is_dir():
        raise UserError(f"--golden={folder}: no such folder")
    kinds = {
        "gae": check_gae,
        "rewards": check_rewards,
        "progress": check_progress,
        "ppo": ppo.check,
    }
    cases = []
    for kind, check in kinds.items():
        found = {*folder.glob(f"{kind}.*"), *folder.glob(f"{kind}_*.*")}
        paths = {path.with_suffix(".npz") for path in found if path.suffix in (".npz", ".json")}
        for path in sorted(paths):
            if not path.is_file():
                raise UserError(f"{path}: no such file, but its .json is there; fetch it again")
            cases.append(Case(path, check))
    if not cases:
        raise UserError(
            f"--golden={folder}: holds no case (ppo_*.npz, gae.npz, rewards.npz or progress.npz)"
        )
    return cases


# --- Advantages, rewards ------------------------------------------------------------------------


def check_gae(path: pathlib.Path) -> Comparison:
    """Compares a file of GAE and whitening cases."""
    result = Comparison()
    settings = {
        files.setting(path, one, "case"): one for one in _listed(path, files.read_json(path))
    }
    cases = _groups(path)
    for name in sorted(set(settings) - set(cases)):
        raise UserError(f"{path}: has no arrays of case {name}, which its .json describes")
    for name, arrays in cases.items():
        slack = {}
        if name in settings:
            ours = _gae(path, name, arrays, settings[name])
            slack = {"advantages": _rounding(ours["advantages_raw"], arrays["mask"])}
        elif "x" in arrays:
            files.check_shapes(path, arrays, ("x", "mask"), f"{name}/")
            ours = _whitening(arrays)
            rounding = _rounding(arrays["x"], arrays["mask"])
            slack = {"whiten": rounding, "whiten_noshift": rounding}
        else:
            result.failures.append(f"{name}: the .json file does not give its settings")
            continue
        inputs = {"x", "mask", "values", "rewards"}
        _compare_all(result, f"{name}/", ours, arrays, inputs=inputs, slack=slack)
    return result


def _rounding(x: Any, mask: np.ndarray) -> float:
    """What whitening makes of two units in the last digit of x: much, where all of x is equal.

    Numbers without variance are divided by sqrt(1e-8), and what is left of them is rounding.
    """
    largest = float(np.max(np.abs(np.asarray(x, np.float32)), initial=0.0, where=mask > 0))
    variance = float(np.nan_to_num(released.masked_var(x, mask)))
    return 2 * float(np.spacing(np.float32(largest))) / np.sqrt(max(variance, 0.0) + 1e-8)


def _listed(path: pathlib.Path, text: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases that a .json file lists."""
    listed = text.get("gae", text.get("cases", []))
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"{path.with_suffix('.json')}: lists no cases; fetch it again")
    return listed


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
    files.check_shapes(path, arrays, ("values", "rewards", "mask"), f"{name}/")
    got = released.token_gae(
        arrays["values"],
        arrays["rewards"],
        arrays["mask"],
        gamma=files.setting(path, settings, "gamma"),
        lam=files.setting(path, settings, "lam"),
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
    result, text = Comparison(), files.read_json(path)
    settings = {files.setting(path, one, "name"): text | one for one in _listed(path, text)}
    cases = _groups(path)
    for name in sorted(set(settings) - set(cases)):
        raise UserError(f"{path}: has no arrays of case {name}, which its .json describes")
    for name, arrays in cases.items():
        if name not in settings:
            result.failures.append(f"{name}: the .json file does not give its settings")
            continue
        need = functools.partial(files.need, path, arrays, prefix=f"{name}/")
        setting = functools.partial(files.setting, path, settings[name])
        files.check_shapes(path, arrays, ("logprobs", "ref_logprobs"), f"{name}/")
        scores, count, mask = need("scores"), np.array(setting("n_scores")), need("mask")
        kl = released.kl_penalty(need("logprobs"), need("ref_logprobs"), setting("kl_penalty"))
        if mask.shape != kl.shape or not count.shape == scores.shape[:1] == mask.shape[:1]:
            raise UserError(f"{path}: the arrays of {name} do not fit each other")
        penalty = -setting("kl_coef") * kl
        weighted = released.score_rewards(scores, count, mask)
        plain = released.score_rewards(scores, count, mask, weighted=False)
        ours = {
            "kls": kl,
            "non_score": penalty,
            "rewards_ref": penalty + weighted,
            "rewards_plain": penalty + plain,
        }
        inputs = {"logprobs", "ref_logprobs", "mask", "scores"}
        _compare_all(result, f"{name}/", ours, arrays, inputs=inputs)
        check_padding(result, f"{name}/scores", scores, count)
    return result


# --- The progress model -------------------------------------------------------------------------


def check_progress(path: pathlib.Path) -> Comparison:
    """Compares a file of the progress model: one part a side of padding."""
    result, arrays = Comparison(), files.read_arrays(path)
    config, folder = files.read_config(path.parent), path.parent
    policy = files.read_decoder(
        config,
        folder / files.FULL,
        files.part(files.read_arrays(folder / files.FULL), "policy/"),
        files.BASE,
    )
    head = {name: files.need(path, arrays, f"head_{name}") for name in ("weight", "bias")}
    sides = {name.split("/")[0] for name in arrays if name.endswith("/input_ids")}
    if not sides:
        raise UserError(f"{path}: array SIDE/input_ids is missing; fetch the file again")
    for side in sorted(sides):
        part = files.part(arrays, f"{side}/")
        for name, ours, tolerance in _progress(path, config, policy, head, part):
            if name in part:
                result.add(f"{side}/{name}", ours, part[name], tolerance)
            elif name not in _SAID_TWICE:
                result.failures.append(f"{side}/{name} is missing; fetch the file again")
        inputs = {f"{side}/{n}" for n in ("input_ids", "attention_mask", "gpt_unmask", "labels")}
        of_side = {name for name in arrays if name.startswith(f"{side}/")}
        result.unchecked += sorted(of_side - result.compared - inputs)
    others = {name for name in arrays if name.split("/")[0] not in sides}
    result.unchecked += sorted(others - {"head_weight", "head_bias"})
    return result


def _progress(
    path: pathlib.Path, config: ModelConfig, policy: Params, head: Params, arrays: Arrays
) -> Iterator[tuple[str, Any, Tolerance]]:
    """What is compared of one side: its name, our value, its tolerance."""
    need = functools.partial(files.need, path, arrays)
    tokens, attention = need("input_ids"), need("attention_mask")
    pad_id = files.read_pad_id(path.parent)
    ends, labels = released.turn_ends(need("gpt_unmask") != _IGNORED), jnp.asarray(need("labels"))

    @jax.jit
    def run(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = padded.logits(config, params["policy"], tokens, attention, pad_id)
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
    for name, array in huggingface.to_named(config, gradient["policy"]).items():
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


def _groups(path: pathlib.Path) -> dict[str, Arrays]:
    """The arrays of each case of a file: "c00/mask" is the mask of c00."""
    groups: dict[str, Arrays] = {}
    for name, array in files.read_arrays(path).items():
        case, _, rest = name.partition("/")
        groups.setdefault(case, {})[rest] = array
    return groups


def _compare_all(
    result: Comparison,
    prefix: str,
    ours: Mapping[str, Any],
    arrays: Arrays,
    *,
    inputs: set[str],
    slack: Mapping[str, float] = types.MappingProxyType({}),
) -> None:
    """Compares all of `ours`; names what is neither computed nor an input."""
    for name, array in ours.items():
        if name in arrays:
            result.add(prefix + name, array, arrays[name], FORWARD, slack.get(name, 0.0))
    result.need(ours, prefix)
    result.unchecked += [prefix + name for name in sorted(set(arrays) - set(ours) - inputs)]
