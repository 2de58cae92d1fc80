"""Weights on disk: Hugging Face folders to and from parameter trees.

    GGUF file --gguf_import--> Hugging Face folder <--load/save_pretrained--> parameters

This file and `gguf_import.py` are the only ones in `models/` that touch a disk.
Only safetensors and GGUF are read: both are plain arrays with a header.  A pickle
file can run any code when it is opened, and is refused.

Tensors are moved one at a time, so that the peak of host memory is the model
and its largest tensor.
"""

import contextlib
import functools
import glob
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from spa_jax.config import LoraConfig
from spa_jax.errors import UserError
from spa_jax.models import lora as lora_lib
from spa_jax.models.transformer import ModelConfig, RopeScaling

Params = Any  # a pytree of arrays
Shape = tuple[int, ...]
# A tensor that is made when it is written: its shape, its dtype, and how to get it.
Lazy = tuple[Shape, np.dtype, Callable[[], np.ndarray]]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADS = "heads.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    CHAT_TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)

# The families that `transformer.Decoder` computes: Hugging Face's model_type -> its class.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Ours -> (Hugging Face's name in a layer, GGUF's name in a block). Kernels are transposed:
# Hugging Face and GGUF store a linear layer as [out, in], Flax as [in, out].
_LAYER = {
    ("attn_norm", "scale"): ("input_layernorm", "attn_norm"),
    ("q", "kernel"): ("self_attn.q_proj", "attn_q"),
    ("k", "kernel"): ("self_attn.k_proj", "attn_k"),
    ("v", "kernel"): ("self_attn.v_proj", "attn_v"),
    ("q", "bias"): ("self_attn.q_proj", "attn_q"),
    ("k", "bias"): ("self_attn.k_proj", "attn_k"),
    ("v", "bias"): ("self_attn.v_proj", "attn_v"),
    ("q_norm", "scale"): ("self_attn.q_norm", "attn_q_norm"),
    ("k_norm", "scale"): ("self_attn.k_norm", "attn_k_norm"),
    ("o", "kernel"): ("self_attn.o_proj", "attn_output"),
    ("mlp_norm", "scale"): ("post_attention_layernorm", "ffn_norm"),
    ("gate", "kernel"): ("mlp.gate_proj", "ffn_gate"),
    ("up", "kernel"): ("mlp.up_proj", "ffn_up"),
    ("down", "kernel"): ("mlp.down_proj", "ffn_down"),
}
_TOP = {
    ("embed", "embedding"): ("model.embed_tokens.weight", "token_embd.weight"),
    ("norm", "scale"): ("model.norm.weight", "output_norm.weight"),
    ("unembed", "kernel"): ("lm_head.weight", "output.weight"),
}
# Settings of PEFT's adapter_config.json that change what an adapter computes.
_ADAPTER_SETTINGS = (
    "peft_type", "bias", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "modules_to_save", "layers_to_transform", "lora_bias",
)  # fmt: skip
_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def load_pretrained(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a Hugging Face folder of a Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model.

    Args:
      folder: holds `config.json` and `model.safetensors` (or shards and their index).

    Returns:
      The model's shape, and its parameters as float32 numpy arrays in the tree of
      `models.transformer` (layers stacked on a leading axis, kernels [in, out]).

    Raises:
      UserError: a missing file, shard or tensor, a tensor of another shape, an architecture that
        is not supported, a damaged file, or pickled weights.
    """
    folder = pathlib.Path(folder)
    config = _read_config(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        shapes = hf_shapes(config)
        _check_names(folder, shapes, tensors, config)

        def get(name: str) -> np.ndarray:
            path, file = tensors[name]
            shape = tuple(file.get_slice(name).get_shape())
            if shape != shapes[name]:
                raise UserError(
                    f"{path}: tensor {name} has shape {list(shape)}, "
                    f"{folder / 'config.json'} asks for {list(shapes[name])}"
                )
            return _get(path, file, name)

        return config, _stack(config, get)


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer_from: str | os.PathLike[str],
    chat_template: str | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers (and `load_pretrained`) can load.

    The folder appears whole or not at all: it is written under a temporary name and renamed. One
    that is already there is replaced if it holds a model, and left alone otherwise.

    Args:
      folder: where to write.
      config: the model's shape.
      params: the parameter tree of `models.transformer`; numpy or JAX arrays, float32, float16 or
        bfloat16, written bit for bit.
      tokenizer_from: a folder whose tokenizer files are copied.
      chat_template: Jinja source that takes the place of the copied tokenizer's; None keeps it.

    Raises:
      UserError: `tokenizer_from` has no tokenizer, `folder` is something else's, or a parameter
        is missing or of another shape than `config` says.
    """
    tokenizer_from = pathlib.Path(tokenizer_from)
    special = {}
    if (tokenizer_from / "config.json").is_file():
        source = _read_json(tokenizer_from / "config.json")
        special = {
            k: v for k, v in source.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
    with _new_folder(pathlib.Path(folder)) as new:
        copy_tokenizer(tokenizer_from, new)
        if chat_template is not None:
            # A folder's chat_template.jinja goes before what tokenizer_config.json says.
            (new / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        tensors = _unstack(config, params)
        dtype = next(iter(tensors.values()))[1]
        _write_json(new / "config.json", hf_config(config, dtype.name, special))
        _write_safetensors(new / WEIGHTS, tensors)


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a tokenizer's files, chat template and all, into an existing folder.

    Raises:
      UserError: there is no tokenizer in `source`.
    """
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source / 'tokenizer.json'}: no such file; it is to be copied")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def save_adapter(
    folder: str | os.PathLike[str], config: LoraConfig, adapter: Params, base: str
) -> None:
    """Writes an adapter that PEFT (and `load_adapter`) can load into a folder of its own.

    Args:
      folder: is made; one that is there must not hold an adapter that is in use.
      config: the adapter's shape.
      adapter: the tree of `models.lora`.
      base: what it belongs to: the model's folder, or one relative to `folder`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Lazy] = {}
    for name, array in lora_lib.to_peft(adapter).items():
        name = "base_model.model." + name.replace(".default.", ".")
        tensors[name] = (array.shape, array.dtype, functools.partial(np.asarray, array))
    _write_safetensors(folder / ADAPTER, tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": lora_lib.modules_of(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write_json(folder / ADAPTER_CONFIG, settings)


def adapter_base(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of the model that an adapter belongs to.

    Raises:
      UserError: its settings name no folder of this machine.
    """
    path = pathlib.Path(folder) / ADAPTER_CONFIG
    named = _read_json(path).get("base_model_name_or_path")
    for base in (pathlib.Path(folder) / str(named), pathlib.Path(str(named))):
        if named and base.is_dir():
            return base.resolve()
    raise UserError(
        f"{path}: base_model_name_or_path is {named!r}, and no such folder is here; fetch that "
        "model, and write its folder there"
    )


def load_adapter(folder: str | os.PathLike[str], model: ModelConfig) -> tuple[LoraConfig, Params]:
    """Reads a PEFT adapter folder.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      model: the shape of the model that it belongs to.

    Returns:
      The adapter's shape and its tree (`models.lora`), float32.

    Raises:
      UserError: a missing or damaged file, a setting of PEFT's that is not supported, or an
        adapter of another model.
    """
    path, settings = pathlib.Path(folder) / ADAPTER, pathlib.Path(folder) / ADAPTER_CONFIG
    raw = _read_json(settings)
    plain = {"peft_type": "LORA", "bias": "none"}
    for key in _ADAPTER_SETTINGS:
        if raw.get(key) and raw[key] != plain.get(key):
            raise UserError(f"{settings}: {key}={raw[key]!r} is not supported")
    if not path.is_file():
        raise UserError(f"{path}: no such file; only an adapter in safetensors is read")
    with contextlib.ExitStack() as stack:
        file = _open_safetensors(path, stack)
        tensors = {
            name: _get(path, file, name).astype(np.float32, copy=False) for name in file.keys()
        }
    try:
        adapter = lora_lib.from_peft(tensors)
        config = LoraConfig(int(raw["r"]), float(raw["lora_alpha"]), tuple(adapter["layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if len(tensors) != sum(2 * len(pair["a"]) for pair in adapter["layers"].values()):
        raise UserError(f"{path}: holds something else than LoRA's matrices")
    for name, pair in adapter["layers"].items():
        inputs, outputs = _our_shape((name, "kernel"), model)
        wanted = {
            "a": (model.num_layers, inputs, config.rank),
            "b": (model.num_layers, config.rank, outputs),
        }
        for leaf, shape in wanted.items():
            if pair[leaf].shape != shape:
                raise UserError(
                    f"{path}: the {leaf.upper()} of {name} are {list(pair[leaf].shape)} (layers, "
                    f"inputs, outputs), the model and {settings.name} ask for {list(shape)}"
                )
    return config, adapter


def weight_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files that a policy's weights come from, those of an adapter's base among them."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    return files + (weight_files(adapter_base(folder)) if is_adapter(folder) else [])


def load_heads(folder: str | os.PathLike[str]) -> dict[str, Params]:
    """Reads the value and progress heads beside a model; {} if there are none.

    Returns:
      {"value": tree, "progress": tree}, those that were saved, in their dtype.

    Raises:
      UserError: the file is damaged.
    """
    path = pathlib.Path(folder) / HEADS
    if not path.is_file():
        return {}
    heads: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        file = _open_safetensors(path, stack)
        for name in file.keys():
            *parents, leaf = name.split("/")
            node = heads
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = file.get_tensor(name)
    return heads


def from_named(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """The parameter tree of `models.transformer` from tensors under Hugging Face's names.

    Args:
      config: the model's shape.
      tensors: "model.embed_tokens.weight" -> array, and so on.

    Raises:
      UserError: a tensor is missing or of another shape; the caller names the file.
    """
    shapes = hf_shapes(config)
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"tensor {name} is missing")
        if tensors[name].shape != shape:
            raise UserError(
                f"tensor {name} has shape {list(tensors[name].shape)}, "
                f"the model's config asks for {list(shape)}"
            )
    return _stack(config, tensors.__getitem__)


def to_named(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Hugging Face's name -> array of every tensor of a parameter tree, as `from_named` reads."""
    return {name: get() for name, (_, _, get) in _unstack(config, params).items()}


def save_heads(folder: str | os.PathLike[str], heads: Mapping[str, Params]) -> None:
    """Writes heads beside a model, as `heads.safetensors` with names such as "value/kernel".

    Args:
      folder: an existing folder.
      heads: name -> tree of nested dicts of arrays.
    """
    path = pathlib.Path(folder) / HEADS
    flat = jax.tree_util.tree_flatten_with_path(dict(heads))[0]
    tensors = {}
    for keys, leaf in flat:
        array = np.asarray(leaf)
        name = "/".join(str(key.key) for key in keys)
        tensors[name] = (array.shape, array.dtype, lambda array=array: array)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_safetensors(temporary, tensors)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    write_tokenizer: Callable[[pathlib.Path], Mapping[str, int]],
) -> None:
    """Writes a Hugging Face folder of tensors that are made one after the other.

    Args:
      folder: where to write; as `save_pretrained`.
      config: the model's shape.
      tensors: all of `hf_shapes`, of one dtype.
      write_tokenizer: writes the tokenizer's files into the folder that it is given; returns the
        special ids under config.json's names ("eos_token_id", ...).
    """
    with _new_folder(pathlib.Path(folder)) as new:
        special = write_tokenizer(new)
        dtype = next(iter(tensors.values()))[1]
        _write_json(new / "config.json", hf_config(config, dtype.name, special))
        _write_json(new / "generation_config.json", {"_from_model_config": True, **special})
        _write_safetensors(new / WEIGHTS, tensors)


# --- Names and shapes ---------------------------------------------------------------------------


def names(config: ModelConfig) -> Iterator[tuple[tuple, str, str]]:
    """(our path, with the layer last; Hugging Face's name; GGUF's name) of every tensor."""
    for path, (hf, ggml) in _TOP.items():
        if path[0] != "unembed" or not config.tie_embeddings:
            yield (*path, None), hf, ggml
    present = {"bias": config.qkv_bias, "q_norm": config.qk_norm, "k_norm": config.qk_norm}
    for i in range(config.num_layers):
        for path, (hf, ggml) in _LAYER.items():
            if not all(present.get(part, True) for part in path):
                continue
            kind = "bias" if path[1] == "bias" else "weight"
            yield (*path, i), f"model.layers.{i}.{hf}.{kind}", f"blk.{i}.{ggml}.{kind}"


def _our_shape(path: tuple, config: ModelConfig) -> Shape:
    """The shape of a parameter (of one layer)."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "embed": (config.vocab_size, d), "unembed": (d, config.vocab_size),
        "q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d),
        "gate": (d, f), "up": (d, f), "down": (f, d),
        "q_norm": (config.head_dim,), "k_norm": (config.head_dim,),
    }  # fmt: skip
    shape = shapes.get(path[0], (d,))
    return shape[1:] if path[1] == "bias" else shape


def hf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Hugging Face's name -> shape of every tensor of the model."""
    shapes = {}
    for path, name, _ in names(config):
        shape = _our_shape(path, config)
        shapes[name] = shape[::-1] if path[1] == "kernel" else shape
    return shapes


def _stack(config: ModelConfig, get: Callable[[str], np.ndarray]) -> Params:
    """The parameter tree, from a function that returns a Hugging Face tensor by name.

    Each is written where it belongs, and converted on the way, before the next one is read.
    """
    params: dict[str, Any] = {"layers": {}}
    for path, name, _ in names(config):
        module, leaf, layer = path
        shape = _our_shape(path, config)
        node = params if layer is None else params["layers"]
        if not layer:  # None, or the first layer
            full = shape if layer is None else (config.num_layers, *shape)
            node.setdefault(module, {})[leaf] = np.empty(full, np.float32)
        # No name for the tensor: it would be kept while the next one is read.
        at = ... if layer is None else layer
        node[module][leaf][at] = get(name).T if leaf == "kernel" else get(name)
    return params


def _unstack(config: ModelConfig, params: Params) -> dict[str, Lazy]:
    """Hugging Face's name -> tensor, to be made when it is written."""
    tensors: dict[str, Lazy] = {}
    for path, name, _ in names(config):
        module, leaf, layer = path
        tree = params if layer is None else params["layers"]
        try:
            array = tree[module][leaf]
        except KeyError as error:
            raise UserError(f"parameter {module}/{leaf} is missing from the tree") from error
        shape = _our_shape(path, config)
        expected = shape if layer is None else (config.num_layers, *shape)
        if array.shape != expected:
            raise UserError(
                f"parameter {module}/{leaf} has shape {list(array.shape)}, "
                f"the model's config asks for {list(expected)}"
            )

        is_kernel = leaf == "kernel"
        get = functools.partial(_one_tensor, array, layer, is_kernel)
        tensors[name] = (shape[::-1] if is_kernel else shape, np.dtype(array.dtype), get)
    return tensors


def _one_tensor(array: Any, layer: int | None, is_kernel: bool) -> np.ndarray:
    """Hugging Face's tensor of a parameter, or of one layer of a stacked one."""
    array = np.asarray(array if layer is None else array[layer])
    return array.T if is_kernel else array


# --- Hugging Face folders -----------------------------------------------------------------------


def _read_config(folder: pathlib.Path) -> ModelConfig:
    """ModelConfig of a folder's config.json."""
    path = folder / "config.json"
    if folder.suffix in PICKLES and folder.is_file():
        raise UserError(_pickle_message(folder))
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give a Hugging Face model folder "
            "(python -m experiments.fetch_policy makes one for the quickstart)"
        )
    return read_config(path)


def read_config(path: pathlib.Path) -> ModelConfig:
    """The model's shape of a Hugging Face config.json, whatever the file is called.

    Raises:
      UserError: not JSON, or an architecture or setting that is not supported.
    """
    raw = _read_json(path)
    family = raw.get("model_type")
    if family not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UserError(f"{path}: model_type {family!r} is not supported ({known} are)")
    unsupported = {
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "use_sliding_window": family != "mistral" and bool(raw.get("use_sliding_window")),
    }
    for key, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{path}: {key} as set there is not supported")
    try:
        heads = int(raw["num_attention_heads"])
        theta, scaling = _read_rope(path, raw)
        return ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            intermediate_size=int(raw["intermediate_size"]),
            rope_theta=theta,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position=int(raw.get("max_position_embeddings", 2048)),
            model_type=family,
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            rope_scaling=scaling,
            sliding_window=int((family == "mistral" and raw.get("sliding_window")) or 0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error!r} is missing or not a number") from error


def _read_rope(path: pathlib.Path, raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json.

    transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{path}: rope_scaling of type {kind!r} is not supported (llama3 is)")
    try:
        return theta, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{path}: rope_scaling of type llama3 lacks {error}") from error


def hf_config(config: ModelConfig, dtype: str, special: Mapping[str, int]) -> dict[str, Any]:
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


def _open_tensors(
    folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, tuple[pathlib.Path, Any]]:
    """Tensor name -> (its file's path, the open file), of one file or of shards."""
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: weight_map is missing; fetch the file again")
        names = sorted(set(weight_map.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise UserError(_pickle_message(pickles[0]))
        raise UserError(f"{folder / WEIGHTS}: no such file, and no {INDEX}; fetch the model again")
    tensors: dict[str, tuple[pathlib.Path, Any]] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: this shard of {index} is missing; fetch it")
        file = _open_safetensors(folder / name, stack)
        tensors |= {tensor: (folder / name, file) for tensor in file.keys()}
    return tensors


def _check_names(
    folder: pathlib.Path,
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, Any],
    config: ModelConfig,
) -> None:
    """Refuses a folder that lacks a tensor, or has one that the model would leave out."""
    where = folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS)
    for name in shapes:
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing; fetch the model again")
    for name in sorted(set(tensors) - set(shapes)):
        # Old checkpoints store the rotary table; a tied output layer may be stored twice.
        known = name.endswith("rotary_emb.inv_freq") or (
            config.tie_embeddings and name == "lm_head.weight"
        )
        if not known:
            raise UserError(
                f"{where}: tensor {name} is not part of the {config.model_type} architecture that "
                f"{folder / 'config.json'} names"
            )


def _pickle_message(path: pathlib.Path) -> str:
    return (
        f"{path}: pickled weights are not read, because opening a pickle can run any code; "
        "fetch the safetensors version of the model, or convert the file where you trust it"
    )


# --- Files --------------------------------------------------------------------------------------


def _open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except Exception as error:  # SafetensorError: header too large, incomplete buffer, ...
        raise UserError(
            f"{path}: not a safetensors file, or a truncated one ({error}); fetch it again"
        ) from error


def _get(path: pathlib.Path, file: Any, name: str) -> np.ndarray:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES.values():
        raise UserError(
            f"{path}: tensor {name} is {dtype}, which is not read (F32, F16 and BF16 are); fetch "
            "the model in one of them"
        )
    return file.get_tensor(name)


def _write_safetensors(path: pathlib.Path, tensors: Mapping[str, Lazy]) -> None:
    """Writes tensors one at a time (the library's own writer copies all of them first).

    The format: 8 bytes little-endian header length, a JSON header padded with spaces to 8 bytes,
    the arrays in C order. https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype, _) in tensors.items():
        if dtype not in _DTYPES:
            raise UserError(f"parameter {name} is {dtype}; only {list(_DTYPES.values())} are saved")
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, get in tensors.values():
            array = np.ascontiguousarray(get(), dtype=dtype)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that takes `folder`'s name when the block ends well.

    What a killed writer of the same folder left is removed then, and not before: until the new
    folder stands, it may be the only whole copy.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder}: holds something else than a model; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    new = folder.with_name(f".{folder.name}.{mark}.tmp")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
        for suffix in ("tmp", "old"):
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.{suffix}"):
                shutil.rmtree(left, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return value


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
