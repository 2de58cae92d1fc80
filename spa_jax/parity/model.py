"""The models of a recorded PPO step: all parameters trained, or an adapter on a frozen base."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spa_jax.config import LoraConfig
from spa_jax.errors import UserError
from spa_jax.models import lora, transformer
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import huggingface, peft
from spa_jax.parity import files, padded
from spa_jax.parity.compare import EXACT, FORWARD, Comparison
from spa_jax.parity.files import Arrays
from spa_jax.parity.released import Forward, Params


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


def full(path: pathlib.Path, text: Mapping[str, Any]) -> Model:
    """All parameters are trained; the reference is a model of its own."""
    config, pad_id = files.read_config(path.parent), files.read_pad_id(path.parent)
    file = path.parent / str(text.get("weights", files.FULL))
    arrays = files.read_arrays(file)

    def parts(who: str) -> Params:
        named = files.part(arrays, f"{who}/")
        return {
            "policy": files.read_decoder(config, file, named, files.BASE),
            "value": _value_head(file, named),
        }

    def name(params: Params) -> Arrays:
        named = huggingface.to_named(config, params["policy"])
        return _with_value_head({files.BASE + key: array for key, array in named.items()}, params)

    return Model(_forward(config, None, pad_id), parts("policy"), {}, parts("ref"), name)


def adapted(path: pathlib.Path, text: Mapping[str, Any], result: Comparison) -> Model:
    """An adapter and the value head are trained; the reference is the base, without an adapter."""
    config, pad_id = files.read_config(path.parent), files.read_pad_id(path.parent)
    file = path.parent / str(text.get("weights", files.LORA))
    named = {
        name.removeprefix("policy/").replace(".base_layer.", "."): array
        for name, array in files.read_arrays(file).items()
    }
    stated = text["peft"]
    modules, alpha, rank = (
        files.setting(path, stated, name) for name in ("target_modules", "lora_alpha", "r")
    )
    try:
        adapter = peft.from_named(named)
        targets = peft.targets_of(modules)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    scale = float(stated.get("scaling", alpha / rank))
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if stated.get(key):
            result.failures.append(f"peft: {key} is not supported")
    result.add("peft/lora_alpha", scale * rank, alpha, FORWARD)
    ranks = {leaves["a"].shape[-1] for leaves in adapter["layers"].values()}
    result.add("peft/r", sorted(ranks), [rank], EXACT)
    result.add("peft/target_modules", sorted(targets), sorted(adapter["layers"]), EXACT)
    settings = LoraConfig(rank, scale * rank, targets)
    base = {"policy": files.read_decoder(config, file, named, files.PEFT_BASE)}
    value = {"value": _value_head(file, named)}

    def name(params: Params) -> Arrays:
        adapter = peft.to_named(params["adapter"])
        return _with_value_head({files.PEFT_BASE + key: a for key, a in adapter.items()}, params)

    trained = {"adapter": adapter} | value
    return Model(_forward(config, settings, pad_id), trained, base, base | value, name)


@functools.lru_cache(maxsize=8)  # one function a shape of model: what is compiled is kept
def _forward(config: ModelConfig, adapter: LoraConfig | None, pad_id: int | None) -> Forward:
    """Logits and values of {"policy", "value"}, and of an adapter where there is one."""

    def forward(
        params: Params, tokens: jax.Array, attention_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        policy = params["policy"]
        if adapter is not None and "adapter" in params:
            policy = lora.merge(adapter, policy, params["adapter"])
        hidden = padded.hidden_states(config, policy, tokens, attention_mask, pad_id)
        values = hidden @ params["value"]["weight"][0] + params["value"]["bias"][0]
        return transformer.logits(policy, hidden), values

    return forward


def _value_head(file: pathlib.Path, named: Arrays) -> Params:
    return {part: files.need(file, named, f"v_head.summary.{part}") for part in ("weight", "bias")}


def _with_value_head(named: Arrays, params: Params) -> Arrays:
    head = {f"v_head.summary.{part}": a for part, a in params["value"].items()}
    return {name: np.asarray(array) for name, array in {**named, **head}.items()}
