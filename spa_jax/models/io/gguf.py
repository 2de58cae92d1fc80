"""GGUF files to Hugging Face folders: llama.cpp's format, quantised or not.

    llama   Llama, SmolLM2, Mistral: the rows of q and k are in another order, which is undone
    qwen2   Qwen2, Qwen2.5: biases
    qwen3   Qwen3: norms of queries and keys

Tensors are dequantised by the package `gguf` and written one at a time.
"""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import gguf
import jax
import numpy as np
import pydantic

from spa_jax import schema
from spa_jax import tokenizer as tokenizer_lib
from spa_jax.errors import UserError
from spa_jax.models import names
from spa_jax.models.config import ModelConfig, RopeScaling
from spa_jax.models.io import hf_config, huggingface
from spa_jax.models.io.tensors import Lazy, is_finite
from spa_jax.models.layers import rope_frequencies

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"
_TOKENS = "tokenizer.ggml.tokens"
_ABSENT = object()
_LONGEST_LIST = 2_000_000  # ten times the largest vocabularies
_MOST_NAMES = 100_000
_KINDS = frozenset(
    getattr(gguf.GGMLQuantizationType, name)
    for name in "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
)


_GGUF_NAMES = {
    "vocab_size": "tokens",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}


class _Metadata(hf_config.Shape):
    """The numbers of a decoder, under GGUF's names."""

    model_config = pydantic.ConfigDict(alias_generator=_GGUF_NAMES.__getitem__)


def import_gguf(gguf_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Turns a GGUF file into a Hugging Face folder, float32.

    Tokenizer, chat template and special tokens come from the same file. GGUF pairs neighbouring
    rows of a Llama's query and key weights for the rotary embedding, Hugging Face the two halves
    of a head: the order is undone.

    Args:
      gguf_path: the file.
      folder: where to write; as `huggingface.save_pretrained`.

    Raises:
      UserError: a missing or damaged file, an architecture, kind of tensor or tokenizer that is
        not supported, a missing tensor, or a tensor of another shape.
    """
    path = pathlib.Path(gguf_path)
    reader = _open(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, reader, stored)
    tensors = _tensors(path, config, stored)
    tokenizer = _Tokenizer(path, reader, config)
    huggingface.write_folder(folder, config, tensors, tokenizer.write)


class _Reader(gguf.GGUFReader):
    """`GGUFReader` that believes no number of the file before it fits into the file.

    The library's own would read beyond the end, or count to 2**60.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"something at byte {int(offset)} ends at {end} of {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind = int(self._get(orig_offs, np.uint32)[0])
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == gguf.GGUFValueType.ARRAY or length > _LONGEST_LIST:
                raise ValueError(f"a list at byte {orig_offs} has {length} items of kind {kind}")
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_fields(self, offs: int, count: int) -> int:
        if count > _MOST_NAMES:
            raise ValueError(f"{count} entries of metadata")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list]:
        if count > _MOST_NAMES:
            raise ValueError(f"{count} tensors")
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list) -> None:
        places = []
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            tensor = f"tensor {bytes(name).decode()}"
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            sizes = [int(n) for n in dims]
            if not 1 <= len(sizes) <= 4 or 0 in sizes or sizes[0] % block:
                raise ValueError(f"{tensor} has shape {sizes[::-1][:4]} in blocks of {block}")
            start = start_offs + int(offset[0])
            end = start + math.prod(sizes) // block * size
            if end > len(self.data):
                raise ValueError(f"{tensor} ends at byte {end} of {len(self.data)}")
            if int(offset[0]) % self.alignment:
                raise ValueError(f"{tensor} is not aligned to {self.alignment} bytes")
            places.append((start, end, tensor))
        places.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(places):
            if start < end:
                raise ValueError(f"{second} begins at byte {start}, within {first}")
        super()._build_tensors(start_offs, fields)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        reader = _Reader(path)
    except Exception as error:  # numpy's IndexError, ValueError, ... of a short memory map
        raise UserError(
            f"{path}: not a GGUF file, or a truncated one ({error}); fetch it again"
        ) from error
    if reader.byte_order != "I":
        raise UserError(f"{path}: the bytes are in the other order; use gguf-convert-endian on it")
    parts = schema.check(schema.Count, _value(path, reader, "split.count", 0), path)
    if parts > 1:
        raise UserError(
            f"{path}: one of {parts} parts of a model; put them together with "
            "llama.cpp's llama-gguf-split --merge"
        )
    return reader


def _value(path: pathlib.Path, reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """A metadata value; an absent one is an error unless there is a default."""
    field = reader.get_field(key)
    if field is not None:
        try:
            return field.contents()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {key} is no text ({error}); fetch it again") from error
    if default is None:
        raise UserError(f"{path}: the metadata lack {key}; use another file of this model")
    return default


def _config(
    path: pathlib.Path, reader: gguf.GGUFReader, stored: dict[str, gguf.ReaderTensor]
) -> ModelConfig:
    architecture = _value(path, reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{path}: architecture {architecture!r} is not supported ({known} are)")

    def value(key: str, default: Any = None) -> Any:
        found = _value(path, reader, f"{architecture}.{key}", default)
        if isinstance(found, list):
            raise UserError(
                f"{path}: {architecture}.{key} differs by layer, which is not supported"
            )
        return found

    def real(key: str, default: float | None = None) -> Any:
        found = value(key, default)
        # The file holds a float32; 1e-05 is what was meant by 9.999999747378752e-06.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    for key, plain in (("rope.scaling.type", "none"), ("rope.scale_linear", 1.0)):
        if value(key, plain) != plain:
            raise UserError(
                f"{path}: rotary embeddings scaled by {value(key)!r} ({key}) are not supported"
            )
    raw = {
        "tokens": len(schema.check(list[schema.Text], _value(path, reader, _TOKENS), path)),
        "embedding_length": value("embedding_length"),
        "block_count": value("block_count"),
        "attention.head_count": value("attention.head_count"),
        "attention.head_count_kv": value("attention.head_count_kv", _ABSENT),
        "attention.key_length": value("attention.key_length", _ABSENT),
        "feed_forward_length": value("feed_forward_length"),
        "rope.freq_base": real("rope.freq_base", 10_000.0),
        "attention.layer_norm_rms_epsilon": real("attention.layer_norm_rms_epsilon"),
        "context_length": value("context_length"),
    }
    given = {name: found for name, found in raw.items() if found is not _ABSENT}
    shape = schema.check(_Metadata, given, f"{path}: {architecture}")
    for key in ("rope.dimension_count", "attention.value_length"):
        if value(key, shape.head) != shape.head:
            raise UserError(
                f"{path}: {architecture}.{key}={value(key)!r} is another size than a head's, "
                f"{shape.head}, which is not supported"
            )
    config = ModelConfig(
        **hf_config.numbers(path, shape),
        rope_theta=shape.rope_theta or 10_000.0,
        tie_embeddings="output.weight" not in stored,
        model_type=architecture,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
    )
    if _ROPE_FACTORS not in stored:
        return config
    factors = stored[_ROPE_FACTORS]
    if factors.tensor_type != gguf.GGMLQuantizationType.F32:
        raise UserError(f"{path}: tensor {_ROPE_FACTORS} is {factors.tensor_type.name}, not F32")
    return _with_rope_scaling(path, config, np.array(factors.data))


def _with_rope_scaling(path: pathlib.Path, config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """The config with the scaling that made the factors of a GGUF file.

    llama.cpp keeps what the frequencies were divided by, [K/2], and not the settings behind it.
    Those of Llama 3.1, 3.2 and 3.3 differ in the factor, which is the largest number, only.
    """
    scaling = RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = np.asarray(rope_frequencies(config) / rope_frequencies(scaled))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{path}: tensor {_ROPE_FACTORS} is not the scaling of Llama 3.1 to 3.3 (low 1, high "
            "4, 8192 tokens); use the model's Hugging Face folder"
        )
    return scaled


def _tensors(
    path: pathlib.Path, config: ModelConfig, stored: dict[str, gguf.ReaderTensor]
) -> dict[str, Lazy]:
    """Hugging Face's name -> tensor, to be dequantised when it is written; all are checked."""
    ours = {hf: ggml for _, hf, ggml in names.tensor_names(config)}
    extra = sorted(set(stored) - set(ours.values()) - {_ROPE_FACTORS})
    if extra:
        raise UserError(
            f"{path}: tensor {extra[0]} is not part of the {config.model_type} architecture"
        )
    tensors: dict[str, Lazy] = {}
    for hf_name, shape in names.hf_shapes(config).items():
        name = ours[hf_name]
        if name not in stored:
            raise UserError(f"{path}: tensor {name} is missing; fetch the file again")
        tensor = stored[name]
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(found)}, "
                f"the file's own metadata ask for {list(shape)}"
            )
        if tensor.tensor_type not in _KINDS:
            known = ", ".join(sorted(kind.name for kind in _KINDS))
            raise UserError(
                f"{path}: tensor {name} is of kind {tensor.tensor_type.name}, which is not read "
                f"({known} are); use another file of this model"
            )
        get = _getter(path, tensor, _rotary_heads(hf_name, config))
        tensors[hf_name] = (shape, np.dtype(np.float32), get)
    return tensors


def _rotary_heads(hf_name: str, config: ModelConfig) -> int:
    """How many heads of rows in GGUF's rotary order a weight holds; 0: none.

    Only a Llama's: llama.cpp rotates a Qwen's halves, as Hugging Face does.
    """
    if config.model_type != "llama":
        return 0
    if hf_name.endswith("q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if hf_name.endswith("k_proj.weight") else 0


def _getter(path: pathlib.Path, tensor: gguf.ReaderTensor, heads: int) -> Callable[[], np.ndarray]:
    def get() -> np.ndarray:
        with np.errstate(all="ignore"):  # what is not finite is told below
            array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if not is_finite(array):
            raise UserError(
                f"{path}: tensor {tensor.name} holds NaN or an infinity; fetch the file again"
            )
        return _uninterleave(array, heads) if heads else array

    return get


def _uninterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from GGUF's rotary order to Hugging Face's.

        GGUF           a0 b0 a1 b1 a2 b2     (a_i, b_i are rotated as a pair)
        Hugging Face   a0 a1 a2 b0 b1 b2

    Args:
      weight: [heads * K, D].
      heads: the number of heads.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


class _Tokenizer:
    """The tokenizer of a GGUF file, checked before anything is written."""

    def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader, config: ModelConfig) -> None:
        def value(key: str, kind: Any, default: Any = None) -> Any:
            where = f"{path}: tokenizer.ggml.{key}"
            return schema.check(kind, _value(path, reader, f"tokenizer.ggml.{key}", default), where)

        self._path = path
        self._kind, self._split = value("model", schema.Text), value("pre", schema.Text, "default")
        supported = {"gpt2": tokenizer_lib.SPLITS, "llama": ("default",)}
        if self._split not in supported.get(self._kind, ()):
            splits = ", ".join(tokenizer_lib.SPLITS)
            raise UserError(
                f"{path}: tokenizer {self._kind!r} with pre-tokenizer {self._split!r} is not "
                f"supported (llama is, and gpt2 with {splits}); use the model's Hugging Face folder"
            )
        self._tokens: list[str] = value("tokens", list[schema.Text])
        [(token, times)] = collections.Counter(self._tokens).most_common(1) or [("", 0)]
        if times > 1:
            raise UserError(f"{path}: tokenizer.ggml.tokens holds {token!r} {times} times")
        kinds = [int(gguf.TokenType.NORMAL)] * len(self._tokens)
        self._types = value("token_type", list[schema.Count], kinds)
        bpe = self._kind == "gpt2"
        self._merges = value("merges", list[schema.Text]) if bpe else []
        self._scores = [] if bpe else value("scores", list[schema.Number])
        # llama.cpp's own defaults where an old file is silent.
        self._add_bos = value("add_bos_token", schema.Flag, not bpe)
        self._prefix = value("add_space_prefix", schema.Flag, True)
        self._max_length = config.max_position
        template = _value(path, reader, "tokenizer.chat_template", _ABSENT)
        self._template = None
        if template is not _ABSENT:
            self._template = schema.check(schema.Text, template, f"{path}: tokenizer.chat_template")
        self._ids: dict[str, int] = {}
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            if reader.get_field(f"tokenizer.ggml.{key}_token_id") is not None:
                found = value(f"{key}_token_id", schema.Count)
                self._ids[role] = self._known(f"{key}_token_id", found)

    def write(self, folder: pathlib.Path) -> dict[str, int]:
        """Writes the tokenizer's files; returns the special ids under config.json's names."""
        try:
            self._write(folder)
        except Exception as error:  # a merge of unknown tokens: Rust raises a plain Exception
            raise UserError(
                f"{self._path}: tokenizer.ggml makes no tokenizer ({error}); use the model's "
                "Hugging Face folder"
            ) from error
        return {f"{role}_token_id": i for role, i in self._ids.items() if role != "unk"}

    def _write(self, folder: pathlib.Path) -> None:
        vocabulary = tokenizer_lib.Vocabulary(
            tokens=self._tokens,
            special=self._of_type(gguf.TokenType.CONTROL),
            added=self._of_type(gguf.TokenType.USER_DEFINED),
            roles={f"{role}_token": self._tokens[i] for role, i in self._ids.items()},
            add_bos=self._add_bos and "bos" in self._ids,
            chat_template=self._template,
            max_length=self._max_length,
        )
        if self._kind == "gpt2":
            tokenizer_lib.write_byte_level_bpe(folder, vocabulary, self._merges, self._split)
        else:
            tokenizer_lib.write_sentencepiece_bpe(folder, vocabulary, self._scores, self._prefix)

    def _known(self, key: str, token: int) -> int:
        if not 0 <= token < len(self._tokens):
            raise UserError(
                f"{self._path}: tokenizer.ggml.{key} is {token}, but the file has "
                f"{len(self._tokens)} tokens: they belong to different models"
            )
        return token

    def _of_type(self, kind: gguf.TokenType) -> list[str]:
        pairs: Iterable[tuple[str, int]] = zip(self._tokens, self._types, strict=True)
        return [token for token, n in pairs if n == kind]
