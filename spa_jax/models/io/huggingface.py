"""Hugging Face folders to and from parameter trees.

    GGUF file --gguf.py--> Hugging Face folder <--load/save_pretrained--> parameters

Only safetensors are read: a pickle file can run any code when it is opened, and is refused.
"""

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params, RopeScaling
from spa_jax.models.io.tensors import (
    Lazy,
    new_folder,
    open_safetensors,
    read_json,
    read_tensor,
    write_json,
    write_safetensors,
)
from spa_jax.models.names import Shape, hf_shapes, our_shape, tensor_names

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
            return read_tensor(path, file, name)

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
        source = read_json(tokenizer_from / "config.json")
        special = {
            k: v for k, v in source.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
    with new_folder(pathlib.Path(folder)) as new:
        copy_tokenizer(tokenizer_from, new)
        if chat_template is not None:
            # A folder's chat_template.jinja goes before what tokenizer_config.json says.
            (new / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        tensors = _unstack(config, params)
        dtype = next(iter(tensors.values()))[1]
        write_json(new / "config.json", hf_config(config, dtype.name, special))
        write_safetensors(new / WEIGHTS, tensors)


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
    with new_folder(pathlib.Path(folder)) as new:
        special = write_tokenizer(new)
        dtype = next(iter(tensors.values()))[1]
        write_json(new / "config.json", hf_config(config, dtype.name, special))
        write_json(new / "generation_config.json", {"_from_model_config": True, **special})
        write_safetensors(new / WEIGHTS, tensors)


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


def _stack(config: ModelConfig, get: Callable[[str], np.ndarray]) -> Params:
    """The parameter tree, from a function that returns a Hugging Face tensor by name.

    Each is written where it belongs, and converted on the way, before the next one is read.
    """
    params: dict[str, Any] = {"layers": {}}
    for path, name, _ in tensor_names(config):
        module, leaf, layer = path
        shape = our_shape(path, config)
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
    for path, name, _ in tensor_names(config):
        module, leaf, layer = path
        tree = params if layer is None else params["layers"]
        try:
            array = tree[module][leaf]
        except KeyError as error:
            raise UserError(f"parameter {module}/{leaf} is missing from the tree") from error
        shape = our_shape(path, config)
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
    raw = read_json(path)
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
        weight_map = read_json(index).get("weight_map")
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
        file = open_safetensors(folder / name, stack)
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
