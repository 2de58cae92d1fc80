"""PEFT's adapter_config.json: what is understood of it, and which matrices it adapts.

PEFT has many ways to make an adapter, and most change what it computes: PiSSA, CorDA and OLoRA take
a part out of the base weights, DoRA scales columns, activated LoRA begins behind a token.  A plain
LoRA is read here; any other value of a setting, and any setting that is not known, is refused by
its name.
"""

import pathlib
import re
import time
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, field_validator

from spa_jax import schema
from spa_jax.config import Target
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig
from spa_jax.models.io.tensors import read_json
from spa_jax.models.names import MATRICES
from spa_jax.schema import Count, Flag, Number, Schema, Size, Text

ADAPTER_CONFIG = "adapter_config.json"
# What says nothing of how an adapter computes, once it is trained.
_PASSED_OVER = frozenset(
    "auto_mapping base_model_name_or_path inference_mode lora_dropout megatron_core peft_version "
    "qalora_group_size revision runtime_config".split()
)
_Off = Literal[False] | None
_Empty = Annotated[dict | list, Field(max_length=0)] | None
_PATTERN_SECONDS = 5.0  # for a regular expression over all names: a bad one would never end
# Beside the layers' matrices, what PEFT could adapt: it is refused by name.
_OTHERS = ("model.embed_tokens", "lm_head")


class AdapterConfig(Schema):
    """The settings of a LoRA adapter that are understood."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM", "FEATURE_EXTRACTION"] | None = None
    r: Annotated[Size, Field(le=65_536)]
    lora_alpha: Annotated[Number, Field(gt=0, le=1e9)]
    target_modules: list[Text] | Text
    exclude_modules: list[Text] | Text | None = None
    layers_to_transform: list[Count] | Count | None = None
    layers_pattern: list[Text] | Text | None = None
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    bias: Literal["none"] = "none"
    fan_in_fan_out: _Off = False
    use_rslora: _Off = False
    use_dora: _Off = False
    use_qalora: _Off = False
    lora_bias: _Off = False
    ensure_weight_tying: Flag | None = False
    rank_pattern: _Empty = None
    alpha_pattern: _Empty = None
    modules_to_save: _Empty = None

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _known_initialisation(cls, value: Any) -> Any:
        if not isinstance(value, bool) and value not in ("gaussian", "orthogonal"):
            raise ValueError(
                "such an adapter changes the base weights when it is loaded, or its initialisation "
                "is not known here"
            )
        return value

    def adapts(self, module: str, deadline: float) -> bool:
        """Whether PEFT would adapt a module, by its full name in the model.

        Args:
          module: such as "model.layers.0.self_attn.q_proj".
          deadline: when the search must have ended, of `time.monotonic`.

        Raises:
          TimeoutError: a regular expression takes too long.
          regex.error: it is none.
        """
        if self.exclude_modules and _names(self.exclude_modules, module, deadline):
            return False
        if self.target_modules == "all-linear":
            return module not in _OTHERS
        if not _names(self.target_modules, module, deadline):
            return False
        chosen = self.layers_to_transform
        if isinstance(self.target_modules, str) or chosen is None or chosen == []:
            return True
        patterns = self.layers_pattern or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = _match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module, deadline, whole=False)
            if found:
                return int(found["idx"]) in ([chosen] if isinstance(chosen, int) else chosen)
        return False


def _names(given: list[str] | str, module: str, deadline: float) -> bool:
    """Whether a list of names, by their ends, or a regular expression names a module."""
    if isinstance(given, str):
        return bool(_match(given, module, deadline, whole=True))
    return module in given or any(module.endswith(f".{name}") for name in given)


def _match(pattern: str, text: str, deadline: float, *, whole: bool) -> "regex.Match[str] | None":
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    search = regex.fullmatch if whole else regex.match
    return search(pattern, text, timeout=left)


def read(path: pathlib.Path) -> AdapterConfig:
    """The settings of an adapter.

    Raises:
      UserError: not JSON, or a setting that is not understood; names it.
    """
    raw = read_json(path)
    known = set(AdapterConfig.model_fields) | _PASSED_OVER
    for name, value in raw.items():
        if name not in known and value not in (None, False, [], {}, ""):
            raise UserError(
                f"{path}: {schema.printable(name)}={value!r} is not understood here (plain LoRA "
                "is); merge the adapter into its base with PEFT's merge_and_unload(), and give the "
                "merged folder"
            )
    given = {name: raw[name] for name in AdapterConfig.model_fields if name in raw}
    try:
        return schema.check(AdapterConfig, given, path)
    except UserError as error:
        raise UserError(
            f"{error}; plain LoRA is understood: merge other adapters into their base with PEFT's "
            "merge_and_unload(), and give the merged folder"
        ) from error


def targets(
    path: pathlib.Path, config: AdapterConfig, model: ModelConfig
) -> set[tuple[Target, int]]:
    """(our name of a matrix, layer) of all that an adapter adapts, matched as PEFT matches them.

    Raises:
      UserError: nothing matches, what matches is no matrix of a layer, or a regular expression is
        none or takes too long.
    """
    deadline = time.monotonic() + _PATTERN_SECONDS
    try:
        found = {
            (name, layer)
            for name, (module, _) in MATRICES.items()
            for layer in range(model.num_layers)
            if config.adapts(f"model.layers.{layer}.{module}", deadline)
        }
        others = [module for module in _OTHERS if config.adapts(module, deadline)]
    except (regex.error, re.error, TimeoutError) as error:
        reason = (
            "takes too long" if isinstance(error, TimeoutError) else f"cannot be read ({error})"
        )
        raise UserError(
            f"{path}: a regular expression of target_modules, exclude_modules or layers_pattern "
            f"{reason}; list the modules' names instead"
        ) from error
    if others:
        raise UserError(f"{path}: target_modules adapts {others[0]}, which is not supported")
    if not found:
        raise UserError(
            f"{path}: target_modules={config.target_modules!r} names no matrix of this model's "
            "layers: the adapter belongs to another model"
        )
    return found
