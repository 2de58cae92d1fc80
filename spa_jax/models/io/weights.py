"""The tensors of a Hugging Face folder: found, named as the model names them, and checked.

Nothing but headers is read here, so that a folder that does not fit is refused before any memory is
taken for it.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spa_jax import schema
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import hf_config
from spa_jax.models.io.tensors import READ, open_safetensors, read_json, read_tensor
from spa_jax.models.names import Shape
from spa_jax.schema import Schema, Text

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# What torch.compile, DistributedDataParallel and FSDP put around a module they wrap.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_MODULE = "module."
_BARE = re.compile(r"(?:embed_tokens|layers\.\d+|norm)\.")  # of a model that was saved without head
# Beside or in place of a weight: what GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors and others
# keep.
_QUANTISED = re.compile(
    r"\.(?:qweight|qzeros|scales|g_idx|SCB|weight_format|weight_packed|weight_shape|weight_scale|"
    r"weight_scale_2|weight_scale_inv|weight_zero_point|weight_g_idx|input_scale|output_scale|"
    r"weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))$"
)
_ROWS_AT_ONCE = 1024


class _Index(Schema):
    """The index of a model in several files."""

    weight_map: dict[Text, Text]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of an open file.

    Attributes:
      path: the file.
      file: the same, open.
      name: of the tensor in it.
    """

    path: pathlib.Path
    file: Any
    name: str

    @property
    def shape(self) -> Shape:
        """By the file's header."""
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def is_plain(self) -> bool:
        """Whether it is of a dtype that is read."""
        return self.file.get_slice(self.name).get_dtype() in READ

    def read(self) -> np.ndarray:
        """The tensor; see `tensors.read_tensor`."""
        return read_tensor(self.path, self.file, self.name)

    def rows(self, start: int, end: int) -> np.ndarray:
        """Some rows of it, float32."""
        end = min(end, self.shape[0])
        return self.file.get_slice(self.name)[start:end].astype(np.float32)


def open_folder(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Hugging Face's name -> tensor, of one file or of shards.

    As transformers does, a model.safetensors goes before an index that lies beside it.

    Raises:
      UserError: no weights, pickled ones, a missing or damaged file, or two tensors of one name.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif index.is_file():
        files = sorted(set(schema.check(_Index, read_json(index), index).weight_map.values()))
    else:
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise UserError(pickle_message(pickles[0]))
        raise UserError(f"{folder / WEIGHTS}: no such file, and no {INDEX}; fetch the model again")
    found: list[Stored] = []
    for name in files:
        path = folder / name
        if pathlib.PurePath(name).name != name or path.suffix != ".safetensors":
            raise UserError(f"{index}: weight_map names {name!r}, which is no safetensors file")
        if not path.is_file():
            raise UserError(f"{path}: this shard of {index} is missing; fetch it")
        file = open_safetensors(path, stack)
        found += [Stored(path, file, tensor) for tensor in file.keys()]
    return _named(found)


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers put before it, and with "model." in any case.

    Such a prefix is how a tensor was saved and not what it is.
    """
    name = _WRAPPERS.sub("", name)
    while name.startswith(_MODULE):
        name = _WRAPPERS.sub("", name.removeprefix(_MODULE))
    return f"model.{name}" if _BARE.match(name) else name


def _named(found: Iterable[Stored]) -> dict[str, Stored]:
    """Tensors by the names that the model has for them."""
    named: dict[str, Stored] = {}
    for stored in found:
        name = plain_name(stored.name)
        if name in named:
            raise UserError(
                f"{stored.path}: tensor {stored.name} is there twice, also as {named[name].name} "
                f"in {named[name].path.name}; remove one"
            )
        named[name] = stored
    return named


def check(
    folder: pathlib.Path,
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Stored],
    config: ModelConfig,
) -> None:
    """Refuses a folder that lacks a tensor, or has one of another shape or that would be left out.

    Args:
      folder: for the messages.
      shapes: Hugging Face's name -> shape of all that the model has.
      stored: of `open_folder`.
      config: the model's shape.

    Raises:
      UserError: names the file and the tensor.
    """
    where = folder / (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    for name, tensor in stored.items():
        if _QUANTISED.search(name):
            raise UserError(
                hf_config.quantised_message(tensor.path, f"it holds tensor {tensor.name}")
            )
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(f"{where}: tensor {name} is missing; fetch the model again")
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].path}: tensor {stored[name].name} has shape "
                f"{list(stored[name].shape)}, {folder / 'config.json'} asks for {list(shape)}"
            )
    for name in sorted(set(stored) - set(shapes)):
        # Old checkpoints store the rotary table; a tied output layer may be stored twice.
        known = name.endswith("rotary_emb.inv_freq") or (
            config.tie_embeddings and name in (EMBEDDING, OUTPUT)
        )
        if not known:
            raise UserError(
                f"{where}: tensor {stored[name].name} is not part of the {config.model_type} "
                f"architecture that {folder / 'config.json'} names"
            )


def is_tied(stored: Mapping[str, Stored]) -> bool:
    """Whether the output layer of a model that says so is its embedding: absent, or the same."""
    if EMBEDDING not in stored or OUTPUT not in stored:
        return True
    embedding, output = stored[EMBEDDING], stored[OUTPUT]
    if not (embedding.is_plain and output.is_plain):
        return True  # and refused when they are read
    if embedding.shape != output.shape:
        return False
    starts = range(0, embedding.shape[0], _ROWS_AT_ONCE)
    return all(
        np.array_equal(
            embedding.rows(start, start + _ROWS_AT_ONCE), output.rows(start, start + _ROWS_AT_ONCE)
        )
        for start in starts
    )


def pickle_message(path: pathlib.Path) -> str:
    """What to say of pickled weights."""
    return (
        f"{path}: pickled weights are not read, because opening a pickle can run any code; "
        "fetch the safetensors version of the model, or convert the file where you trust it"
    )
