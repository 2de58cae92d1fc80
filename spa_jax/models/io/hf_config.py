"""Hugging Face's config.json to and from a `ModelConfig`.

What the file says is checked before it is believed: each field's type, sign and size, and what the
fields say of each other.  What would change the computation and is not computed is refused by name.
"""

import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from spa_jax import schema
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, RopeScaling
from spa_jax.models.io.tensors import read_json
from spa_jax.schema import Count, Flag, Number, Schema, Size

# The families that `transformer.Decoder` computes: Hugging Face's model_type -> its class.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MISTRALS_WINDOW = 4096  # of a config.json that says nothing of it

_Positive = Annotated[Number, Field(gt=0, le=1e12)]
_Layers = Annotated[int, Field(strict=True, ge=1, le=10_000)]
_Width = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
_Vocabulary = Annotated[int, Field(strict=True, ge=1, le=100_000_000)]


class Shape(Schema):
    """The numbers of a decoder, under config.json's names."""

    vocab_size: _Vocabulary
    hidden_size: _Width
    num_hidden_layers: _Layers
    num_attention_heads: _Width
    num_key_value_heads: _Width | None = None
    head_dim: _Width | None = None
    intermediate_size: _Width
    rope_theta: _Positive | None = None
    rms_norm_eps: Annotated[Number, Field(ge=0, le=1)] = 1e-6
    max_position_embeddings: Size = 2048

    @property
    def key_value_heads(self) -> int:
        """Key/value heads: as many as query heads unless the file says otherwise."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head(self) -> int:
        """The size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class _Config(Shape):
    """Those that change what is computed, beside the numbers."""

    tie_word_embeddings: Flag | None = False
    sliding_window: Count | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None


class _Llama3(Schema):
    """Llama 3.1's rotary scaling."""

    factor: _Positive
    low_freq_factor: _Positive
    high_freq_factor: _Positive
    original_max_position_embeddings: Size


def read(path: pathlib.Path) -> ModelConfig:
    """The model's shape of a Hugging Face config.json, whatever the file is called.

    Raises:
      UserError: not JSON, a field of another type or out of range, or an architecture or setting
        that is not supported.
    """
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UserError(f"{path}: model_type {family!r} is not supported ({known} are)")
    _check_supported(path, raw, family)
    found = schema.check(_Config, raw, path)
    theta, scaling = _read_rope(path, raw, found)
    window = 0
    if family == "mistral":
        given = found.sliding_window if "sliding_window" in raw else _MISTRALS_WINDOW
        if given == 0:
            raise UserError(f"{path}: sliding_window=0 lets no token see another; null is all")
        window = given or 0
    return ModelConfig(
        **numbers(path, found),
        rope_theta=theta,
        tie_embeddings=bool(found.tie_word_embeddings),
        model_type=family,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
        sliding_window=window,
    )


def numbers(path: pathlib.Path, shape: Shape) -> dict[str, Any]:
    """The fields of `ModelConfig` that are plain numbers, by name.

    Raises:
      UserError: they contradict each other.
    """
    heads, pairs = shape.num_attention_heads, shape.key_value_heads
    if shape.head_dim is None and shape.hidden_size % heads:
        raise UserError(
            f"{path}: num_attention_heads={heads} does not divide hidden_size={shape.hidden_size}, "
            "and there is no head_dim; fetch the file again"
        )
    if shape.head % 2:
        raise UserError(
            f"{path}: a head of size {shape.head} (head_dim) has no halves to rotate; it must be "
            "even"
        )
    if heads % pairs:
        raise UserError(
            f"{path}: num_key_value_heads={pairs} does not divide num_attention_heads={heads}; "
            "fetch the file again"
        )
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": pairs,
        "head_dim": shape.head,
        "intermediate_size": shape.intermediate_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position": shape.max_position_embeddings,
    }


def quantised(raw: Mapping[str, Any]) -> str:
    """How the weights are quantised, by a config.json ("gptq", ...); "" if it does not say."""
    for key in ("quantization_config", "compression_config"):
        if about := raw.get(key):
            kind = about.get("quant_method") if isinstance(about, dict) else None
            return str(kind or key)
    return ""


def quantised_message(where: object, kind: str) -> str:
    """What to say of quantised weights."""
    return (
        f"{where}: the weights are quantised ({kind}), and such weights are not read; fetch the "
        "model's F32, F16 or BF16 folder, or a GGUF file, or write one with transformers' "
        "model.dequantize()"
    )


def _check_supported(path: pathlib.Path, raw: Mapping[str, Any], family: str) -> None:
    if kind := quantised(raw):
        raise UserError(quantised_message(path, kind))
    slides = family.startswith("qwen") and set(_listed(raw.get("layer_types"))) - {"full_attention"}
    unsupported = {
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "hidden_act": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "use_sliding_window": family != "mistral" and bool(raw.get("use_sliding_window")),
        "layer_types": bool(slides),
    }
    for key, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported")


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _read_rope(
    path: pathlib.Path, raw: Mapping[str, Any], found: _Config
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json.

    transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling, which goes
    first where both are there.
    """
    key = "rope_scaling" if found.rope_scaling else "rope_parameters"
    rope = found.rope_scaling or found.rope_parameters or {}
    by_layer = sorted(name for name, value in rope.items() if isinstance(value, dict))
    if by_layer:
        raise UserError(
            f"{path}: {key} differs by layer ({', '.join(by_layer)}), which is not computed; use a "
            "model whose layers rotate alike"
        )
    default = found.rope_theta or 10_000.0
    theta = schema.check(_Theta, rope, f"{path}: {key}").rope_theta or default
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{path}: {key} of type {kind!r} is not computed (default and llama3 are), and "
            "without it every position would be wrong; use another model"
        )
    given = schema.check(_Llama3, rope, f"{path}: {key} of type llama3")
    if given.high_freq_factor <= given.low_freq_factor:
        raise UserError(
            f"{path}: {key}: high_freq_factor={given.high_freq_factor} must be above "
            f"low_freq_factor={given.low_freq_factor}"
        )
    return theta, RopeScaling(
        factor=given.factor,
        low_freq_factor=given.low_freq_factor,
        high_freq_factor=given.high_freq_factor,
        original_max_position=given.original_max_position_embeddings,
    )


class _Theta(Schema):
    """The base of the rotary frequencies, in a dictionary of its own."""

    rope_theta: _Positive | None = None


def write(config: ModelConfig, dtype: str, special: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a model; read by transformers 4 and 5."""
    family = config.model_type
    made: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
    if scaling := config.rope_scaling:
        made["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    if family in ("llama", "qwen3"):
        made["attention_bias"] = False
    if family == "llama":
        made["mlp_bias"] = False
    if family == "mistral":
        made["sliding_window"] = config.sliding_window or None
    if family in ("qwen2", "qwen3"):
        made["use_sliding_window"] = False
    return {**made, **special}
