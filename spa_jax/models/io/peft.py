"""Adapter folders as PEFT writes and reads them: `models.lora`'s trees to and from a disk."""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa_jax.config import LoraConfig, Target
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import adapter_config
from spa_jax.models.io.adapter_config import ADAPTER_CONFIG
from spa_jax.models.io.tensors import (
    Lazy,
    open_safetensors,
    read_json,
    write_json,
    write_safetensors,
)
from spa_jax.models.io.weights import Stored, plain_name
from spa_jax.models.names import MATRICES, our_shape

ADAPTER = "adapter_model.safetensors"
_BASE_MODEL = "base_model.model."
_PEFT = re.compile(r"model\.layers\.(\d+)\.(.+)\.lora_([AB])\.(?:default\.)?weight")


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def adapter_base(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of the model that an adapter belongs to.

    Raises:
      UserError: its settings name no folder of this machine, or, over other adapters, itself.
    """
    base = _named_base(pathlib.Path(folder))
    seen, at = {pathlib.Path(folder).resolve()}, base
    while is_adapter(at):
        if at in seen:
            raise UserError(
                f"{at / ADAPTER_CONFIG}: base_model_name_or_path leads back to this adapter; "
                "write the folder of the model there that it was trained on"
            )
        seen.add(at)
        at = _named_base(at)
    return base


def _named_base(folder: pathlib.Path) -> pathlib.Path:
    path = folder / ADAPTER_CONFIG
    named = read_json(path).get("base_model_name_or_path")
    if isinstance(named, str) and named and "\0" not in named:
        for base in (folder / named, pathlib.Path(named)):
            if base.is_dir():
                return base.resolve()
    raise UserError(
        f"{path}: base_model_name_or_path is {named!r}, and no such folder is here; fetch that "
        "model, and write its folder there"
    )


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
    for name, array in to_named(adapter).items():
        name = "base_model.model." + name.replace(".default.", ".")
        tensors[name] = (array.shape, array.dtype, functools.partial(np.asarray, array))
    write_safetensors(folder / ADAPTER, tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": modules_of(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, settings)


def load_adapter(folder: str | os.PathLike[str], model: ModelConfig) -> tuple[LoraConfig, Params]:
    """Reads a PEFT adapter folder.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      model: the shape of the model that it belongs to.

    Returns:
      The adapter's shape and its tree (`models.lora`), float32; layers that it leaves as they are
      have zeros.

    Raises:
      UserError: a missing or damaged file, a setting of PEFT's that is not understood, tensors
        that are not those that the settings ask for, or an adapter of another model.
    """
    path, settings = pathlib.Path(folder) / ADAPTER, pathlib.Path(folder) / ADAPTER_CONFIG
    about = adapter_config.read(settings)
    wanted = adapter_config.targets(settings, about, model)
    if not path.is_file():
        raise UserError(f"{path}: no such file; only an adapter in safetensors is read")
    names = [name for name in MATRICES if any(name == target for target, _ in wanted)]
    layers = {
        name: {
            "a": np.zeros((model.num_layers, our_shape((name, "kernel"), model)[0], about.r), "f4"),
            "b": np.zeros((model.num_layers, about.r, our_shape((name, "kernel"), model)[1]), "f4"),
        }
        for name in names
    }
    with contextlib.ExitStack() as stack:
        stored = _adapter_tensors(path, open_safetensors(path, stack))
        for (name, layer), pair in stored.items():
            if (name, layer) not in wanted:
                raise UserError(
                    f"{path}: tensor {pair['a'].name} is of a matrix that {settings.name} does not "
                    "adapt, so PEFT would leave it out; correct target_modules there"
                )
            for leaf, tensor in pair.items():
                into = layers[name][leaf][layer].T
                if tensor.shape != into.shape:
                    raise UserError(
                        f"{path}: tensor {tensor.name} has shape {list(tensor.shape)}, the model "
                        f"and {settings.name} ask for {list(into.shape)}"
                    )
                into[...] = tensor.read()
    for name, layer in sorted(wanted - stored.keys()):
        raise UserError(
            f"{path}: holds no adapter of model.layers.{layer}.{MATRICES[name][0]}, which "
            f"{settings.name} asks for; fetch the adapter again, or correct target_modules there"
        )
    return LoraConfig(about.r, about.lora_alpha, tuple(names)), {"layers": layers}


def _adapter_tensors(path: pathlib.Path, file: Any) -> dict[tuple[Target, int], dict[str, Stored]]:
    """(our name of a matrix, layer) -> {"a", "b"} of all tensors of an open file."""
    ours = {hugging_face: name for name, (hugging_face, _) in MATRICES.items()}
    found: dict[tuple[Target, int], dict[str, Stored]] = {}
    for tensor in file.keys():
        match = _PEFT.fullmatch(plain_name(plain_name(tensor).removeprefix(_BASE_MODEL)))
        if not match or match[2] not in ours:
            raise UserError(
                f"{path}: tensor {tensor} is no LoRA matrix of this model's layers: it belongs to "
                "another part of a larger model, or to another kind of adapter"
            )
        pair = found.setdefault((ours[match[2]], int(match[1])), {})
        if match[3].lower() in pair:
            raise UserError(f"{path}: tensor {tensor} is there twice; remove one")
        pair[match[3].lower()] = Stored(path, file, tensor)
    for (name, layer), pair in found.items():
        if len(pair) < 2:
            raise UserError(
                f"{path}: the adapter of model.layers.{layer}.{MATRICES[name][0]} lacks its "
                f"lora_{'B' if 'a' in pair else 'A'}; fetch the adapter again"
            )
    return found


def from_named(tensors: Mapping[str, np.ndarray]) -> Params:
    """An adapter from PEFT's tensors; names that are not of an adapter are passed over.

    Args:
      tensors: "...model.layers.0.self_attn.q_proj.lora_A.default.weight" -> [r, in],
        "...lora_B.default.weight" -> [out, r].

    Raises:
      ValueError: a module that is none of `MATRICES`, or layers that are not 0, 1, 2, ...
    """
    ours = {hugging_face: name for name, (hugging_face, _) in MATRICES.items()}
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for tensor, array in tensors.items():
        match = _PEFT.search(tensor)
        if not match:
            continue
        layer, module, letter = match.groups()
        if module not in ours:
            raise ValueError(f"{tensor}: an adapter of {module} is not supported")
        leaves = found.setdefault(ours[module], {"a": {}, "b": {}})
        leaves[letter.lower()][int(layer)] = array.T
    for name, leaves in found.items():
        for leaf, layers in leaves.items():
            if sorted(layers) != list(range(len(leaves["a"]))):
                raise ValueError(f"the adapter of {name} lacks {leaf} of some layer")
    return {
        "layers": {
            name: {
                leaf: np.stack([layers[i] for i in range(len(layers))])
                for leaf, layers in found[name].items()
            }
            for name in MATRICES
            if name in found
        }
    }


def to_named(adapter: Params) -> dict[str, np.ndarray]:
    """PEFT's tensors of an adapter: "model.layers.0.self_attn.q_proj.lora_A.default.weight"."""
    tensors = {}
    for name, leaves in adapter["layers"].items():
        for leaf, stacked in leaves.items():
            for i, array in enumerate(np.asarray(stacked)):
                key = f"model.layers.{i}.{MATRICES[name][0]}.lora_{leaf.upper()}.default.weight"
                tensors[key] = array.T
    return tensors


def targets_of(modules: Sequence[str]) -> tuple[Target, ...]:
    """Our names of PEFT's `target_modules`, such as "q_proj".

    Raises:
      ValueError: a module that is none of `MATRICES`.
    """
    ours = {hugging_face.split(".")[-1]: name for name, (hugging_face, _) in MATRICES.items()}
    unknown = sorted(set(modules) - set(ours))
    if unknown:
        raise ValueError(f"an adapter of {unknown[0]} is not supported ({', '.join(ours)} are)")
    return tuple(ours[module] for module in modules)


def modules_of(targets: Sequence[Target]) -> list[str]:
    """PEFT's names of our `targets`, as `targets_of` reads them."""
    return [MATRICES[name][0].split(".")[-1] for name in targets]
