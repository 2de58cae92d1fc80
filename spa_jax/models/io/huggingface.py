"""Hugging Face folders to and from parameter trees.

    GGUF file --gguf.py--> Hugging Face folder <--load/save_pretrained--> parameters

Only safetensors are read: a pickle file can run any code when it is opened, and is refused.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import hf_config, weights
from spa_jax.models.io.tensors import (
    Lazy,
    new_folder,
    read_json,
    write_json,
    write_safetensors,
)
from spa_jax.models.io.weights import PICKLES, WEIGHTS
from spa_jax.models.names import hf_shapes, our_shape, tensor_names

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


def load_pretrained(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a Hugging Face folder of a Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model.

    Args:
      folder: holds `config.json` and `model.safetensors` (or shards and their index).

    Returns:
      The model's shape (untied if the file has an output layer of its own, whatever config.json
      says), and its parameters as float32 numpy arrays in the tree of
      `models.transformer` (layers stacked on a leading axis, kernels [in, out]).

    Raises:
      UserError: a missing file, shard or tensor, a tensor of another shape or with numbers that
        are not finite, an architecture that is not supported, a damaged file, or quantised or
        pickled weights.
    """
    folder = pathlib.Path(folder)
    config = _read_config(folder)
    with contextlib.ExitStack() as stack:
        stored = weights.open_folder(folder, stack)
        if config.tie_embeddings and not weights.is_tied(stored):
            # As transformers does: config.json is wrong about a model whose output was trained.
            config = dataclasses.replace(config, tie_embeddings=False)
        if config.tie_embeddings and weights.EMBEDDING not in stored and weights.OUTPUT in stored:
            stored[weights.EMBEDDING] = stored[weights.OUTPUT]
        weights.check(folder, hf_shapes(config), stored, config)
        return config, _stack(config, lambda name: stored[name].read())


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
        write_json(new / "config.json", hf_config.write(config, dtype.name, special))
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
        write_json(new / "config.json", hf_config.write(config, dtype.name, special))
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
        raise UserError(weights.pickle_message(folder))
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give a Hugging Face model folder "
            "(python -m experiments.fetch_policy makes one for the quickstart)"
        )
    return hf_config.read(path)
