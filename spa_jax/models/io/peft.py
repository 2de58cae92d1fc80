"""Adapter folders as PEFT writes and reads them: `models.lora`'s trees to and from a disk."""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from spa_jax.config import LoraConfig, Target
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io.tensors import (
    Lazy,
    open_safetensors,
    read_json,
    read_tensor,
    write_json,
    write_safetensors,
)
from spa_jax.models.names import MATRICES, our_shape

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Settings of PEFT's adapter_config.json that change what an adapter computes.
_ADAPTER_SETTINGS = (
    "peft_type bias use_dora use_rslora rank_pattern alpha_pattern fan_in_fan_out "
    "modules_to_save layers_to_transform lora_bias"
).split()
_PEFT = re.compile(r"model\.layers\.(\d+)\.(.+)\.lora_([AB])\.(?:default\.)?weight")


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (pathlib.Path(folder) / ADAPTER_CONFIG).is_file()


def adapter_base(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of the model that an adapter belongs to.

    Raises:
      UserError: its settings name no folder of this machine.
    """
    path = pathlib.Path(folder) / ADAPTER_CONFIG
    named = read_json(path).get("base_model_name_or_path")
    for base in (pathlib.Path(folder) / str(named), pathlib.Path(str(named))):
        if named and base.is_dir():
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
      The adapter's shape and its tree (`models.lora`), float32.

    Raises:
      UserError: a missing or damaged file, a setting of PEFT's that is not supported, or an
        adapter of another model.
    """
    path, settings = pathlib.Path(folder) / ADAPTER, pathlib.Path(folder) / ADAPTER_CONFIG
    raw = read_json(settings)
    plain = {"peft_type": "LORA", "bias": "none"}
    for key in _ADAPTER_SETTINGS:
        if raw.get(key) and raw[key] != plain.get(key):
            raise UserError(f"{settings}: {key}={raw[key]!r} is not supported")
    if not path.is_file():
        raise UserError(f"{path}: no such file; only an adapter in safetensors is read")
    with contextlib.ExitStack() as stack:
        file = open_safetensors(path, stack)
        tensors = {
            name: read_tensor(path, file, name).astype(np.float32, copy=False)
            for name in file.keys()
        }
    try:
        adapter = from_named(tensors)
        config = LoraConfig(int(raw["r"]), float(raw["lora_alpha"]), tuple(adapter["layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if len(tensors) != sum(2 * len(pair["a"]) for pair in adapter["layers"].values()):
        raise UserError(f"{path}: holds something else than LoRA's matrices")
    for name, pair in adapter["layers"].items():
        inputs, outputs = our_shape((name, "kernel"), model)
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
