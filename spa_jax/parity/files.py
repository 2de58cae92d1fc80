"""The files of recorded cases: arrays, settings, weights."""

import json
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import hf_config, huggingface

Arrays = dict[str, np.ndarray]

CONFIG = "weights_tiny_config.json"
FULL, LORA = "weights_tiny.npz", "weights_lora.npz"
# What numpy and zipfile raise of a file that is cut, changed, or something else.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
BASE, PEFT_BASE = "pretrained_model.", "pretrained_model.base_model.model."


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
    except _DAMAGED as error:
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
      UserError: as `hf_config.read`, or no such file.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: no such file")
    return hf_config.read(folder / CONFIG)


def read_pad_id(folder: pathlib.Path) -> int | None:
    """The cases' padding token, whose embedding transformers does not train."""
    value = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("pad_token_id")
    return value if isinstance(value, int) else None


def need(path: pathlib.Path, arrays: Arrays, name: str, prefix: str = "") -> np.ndarray:
    """An array that a case cannot do without; `prefix` is only for the message.

    Raises:
      UserError: it is not there.
    """
    if name not in arrays:
        raise UserError(f"{path}: array {prefix}{name} is missing; fetch the file again")
    return arrays[name]


def check_shapes(path: pathlib.Path, arrays: Arrays, names: Sequence[str], prefix: str) -> None:
    """Refuses a case whose arrays are not of one shape; `prefix` is only for the message.

    Raises:
      UserError: one is not there, or of another shape than the first.
    """
    first = need(path, arrays, names[0], prefix).shape
    for name in names[1:]:
        if need(path, arrays, name, prefix).shape != first:
            raise UserError(
                f"{path}: {prefix}{name} has shape {arrays[name].shape}, {names[0]} has {first}"
            )


def setting(path: pathlib.Path, settings: Mapping[str, Any], name: str) -> Any:
    """A setting that a case's .json must state.

    Raises:
      UserError: it does not.
    """
    if name not in settings:
        raise UserError(f"{path.with_suffix('.json')}: {name} is missing; fetch the file again")
    return settings[name]


def part(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def read_decoder(config: ModelConfig, file: pathlib.Path, named: Arrays, prefix: str) -> Params:
    """The decoder whose tensors lie below `prefix` among the named arrays of a file.

    Raises:
      UserError: a tensor is missing or of another shape.
    """
    try:
        return huggingface.from_named(config, part(named, prefix))
    except UserError as error:
        raise UserError(f"{file}: {error} (below {prefix})") from error
