"""Files of tensors and the folders that hold them: safetensors, JSON, and heads beside a model.

Only plain arrays with a header are read.  Tensors are moved one at a time, so that the peak of host
memory is the model and its largest tensor.
"""

import contextlib
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

from spa_jax import schema
from spa_jax.errors import UserError
from spa_jax.models.config import Params
from spa_jax.models.names import Shape

# A tensor that is made when it is written: its shape, its dtype, and how to get it.
Lazy = tuple[Shape, np.dtype, Callable[[], np.ndarray]]
HEADS = "heads.safetensors"
_OWN = "heads"  # their folder beside a model's weights
_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
READ = frozenset(_DTYPES.values())
# A number is not finite if all bits of its exponent are set.
_EXPONENTS = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_AT_ONCE = 1 << 20  # numbers that are looked at together, so that no second tensor is made


def heads_file(folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """Where the heads of a folder are; None if there are none."""
    here = pathlib.Path(folder)
    # Policies of before have them beside the weights.
    return next((p for p in (here / _OWN / HEADS, here / HEADS) if p.is_file()), None)


def load_heads(folder: str | os.PathLike[str]) -> dict[str, Params]:
    """Reads the value and progress heads beside a model; {} if there are none.

    Returns:
      {"value": tree, "progress": tree}, those that were saved, in their dtype.

    Raises:
      UserError: the file is damaged, holds something else, or NaN.
    """
    path = heads_file(folder)
    if path is None:
        return {}
    heads: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        file = open_safetensors(path, stack)
        for name in file.keys():
            *parents, leaf = name.split("/")
            node = heads
            for parent in parents:
                node = node.setdefault(parent, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict) or not parents or leaf in node:
                raise UserError(f"{path}: tensor {name} is no part of a head; train the head again")
            node[leaf] = read_tensor(path, file, name)
    return heads


def save_heads(folder: str | os.PathLike[str], heads: Mapping[str, Params]) -> None:
    """Writes heads as `heads.safetensors` with names such as "value/kernel".

    Those of a model get a folder of their own, heads/: other programs take every safetensors file
    beside a model for its weights.

    Args:
      folder: an existing folder.
      heads: name -> tree of nested dicts of arrays.
    """
    path = pathlib.Path(folder) / HEADS
    if any((path.parent / name).exists() for name in ("config.json", "adapter_config.json")):
        path.unlink(missing_ok=True)  # of before
        path = path.parent / _OWN / HEADS
    flat = jax.tree_util.tree_flatten_with_path(dict(heads))[0]
    tensors = {}
    for keys, leaf in flat:
        array = np.asarray(leaf)
        name = "/".join(str(key.key) for key in keys)
        tensors[name] = (array.shape, array.dtype, lambda array=array: array)
    temporary = pathlib.Path(folder) / f".{HEADS}.{uuid.uuid4().hex}.tmp"
    try:
        write_safetensors(temporary, tensors)
        path.parent.mkdir(exist_ok=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """An open safetensors file, which `stack` closes.

    Raises:
      UserError: it is none, or a truncated one.
    """
    try:
        return stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except Exception as error:  # SafetensorError: header too large, incomplete buffer, ...
        raise UserError(
            f"{path}: not a safetensors file, or a truncated one ({error}); fetch it again"
        ) from error


def read_tensor(path: pathlib.Path, file: Any, name: str) -> np.ndarray:
    """A tensor of an open file.

    Raises:
      UserError: it is of a dtype that is not read, or holds NaN or an infinity.
    """
    dtype = file.get_slice(name).get_dtype()
    if dtype not in READ:
        raise UserError(
            f"{path}: tensor {name} is {dtype}, which is not read (F32, F16 and BF16 are; integers "
            "and eight bits are a quantised model's); fetch the model in one of them"
        )
    array = file.get_tensor(name)
    if not is_finite(array):
        raise UserError(
            f"{path}: tensor {name} holds NaN or an infinity: the training that wrote it diverged, "
            "or the file is damaged; use another checkpoint"
        )
    return array


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array of a dtype that is saved are finite."""
    kind, bits = _EXPONENTS[_DTYPES[array.dtype]]
    flat = np.ascontiguousarray(array).reshape(-1).view(kind)
    parts = (flat[i : i + _AT_ONCE] for i in range(0, flat.size, _AT_ONCE))
    return not any(np.any((part & bits) == bits) for part in parts)


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, Lazy]) -> None:
    """Writes tensors one at a time (the library's own writer copies all of them first).

    The format: 8 bytes little-endian header length, a JSON header padded with spaces to 8 bytes,
    the arrays in C order. https://github.com/huggingface/safetensors#format

    Raises:
      UserError: a parameter is of a dtype that is not saved, or holds NaN or an infinity; no file
        is left then.
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
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, (_, dtype, get) in tensors.items():
                array = np.ascontiguousarray(get(), dtype=dtype)
                if not is_finite(array):
                    raise UserError(
                        f"{path}: not written: parameter {name} holds NaN or an infinity, so the "
                        "training diverged; lower the learning rate, or look into its metrics.jsonl"
                    )
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
      UserError: it cannot be read, is not JSON, or is no object.
    """
    value = schema.read(Any, path, remedy="fetch the file again")  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return value


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
