"""Tokenizers in Hugging Face's folder format: loading, and making one from a vocabulary."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from spa_jax import schema
from spa_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# llama.cpp's name of a pre-tokenizer -> the pattern of the pieces of text that tokens stay within
# (the models' own, from their tokenizer.json); empty: GPT-2's, which is built in.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": "",
    "smollm": "",
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}


_Id = Annotated[schema.Count, Field(lt=10_000_000)]


class _Added(schema.Schema):
    """A token that is found whole in a text."""

    id: _Id
    content: schema.Text


class _Model(schema.Schema):
    """What all kinds of models hold."""

    vocab: dict[schema.Text, _Id] | list[tuple[schema.Text, schema.Number]]


class _File(schema.Schema):
    """What of a tokenizer.json is checked here."""

    model: _Model
    added_tokens: list[_Added] | None = None


def load(folder: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face folder, with its chat template.

    Args:
      folder: holds `tokenizer.json` and `tokenizer_config.json` (the chat template is in the
        latter or in `chat_template.jinja`).

    Raises:
      UserError: if a file is missing or cannot be read.
    """
    folder = pathlib.Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file; the folder must hold a Hugging Face tokenizer "
                "(python -m experiments.fetch_policy makes one for the quickstart)"
            )
    # The library counts up to the largest id, and fails in ways of its own where ids are none.
    schema.read(_File, folder / "tokenizer.json", remedy="fetch the file again")
    # transformers serves for its tokenizers only; without this it advises to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    with reading(folder):
        return PreTrainedTokenizerFast.from_pretrained(str(folder))


@contextlib.contextmanager
def reading(folder: object) -> Iterator[None]:
    """What a tokenizer's library says of a file that it cannot use, in one line.

    Raises:
      UserError: whatever is raised in the block.
    """
    try:
        yield
    except BaseException as error:
        # Rust raises a plain Exception, or a panic, which is not even that.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            said = " ".join(str(error).split())
            raise UserError(
                f"{folder}/tokenizer.json: cannot be read ({said}); fetch the file again"
            ) from error
        raise


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What tokenizers of every kind hold.

    Attributes:
      tokens: a token's id is its index.
      special: those of `tokens` that are control tokens, which never come out of plain text.
      added: those that are found whole in any text, such as "<think>".
      roles: such as {"bos_token": "<s>"}; a subset of bos, eos, pad and unk.
      add_bos: whether `encode` puts the bos token in front (a chat template brings its own).
      chat_template: Jinja source, or None.
      max_length: the model's context length, in tokens.
    """

    tokens: Sequence[str]
    special: Sequence[str]
    roles: Mapping[str, str]
    chat_template: str | None
    max_length: int
    added: Sequence[str] = ()
    add_bos: bool = False


def write_byte_level_bpe(
    folder: pathlib.Path, vocabulary: Vocabulary, merges: Sequence[str], split: str
) -> None:
    """Writes a byte-level BPE tokenizer: `tokenizer.json` and `tokenizer_config.json`.

    Args:
      folder: where to; must exist.
      vocabulary: bytes of its tokens are written as in GPT-2.
      merges: the merge rules, best first, each "left right".
      split: how text is cut before it is merged, one of `SPLITS`.
    """
    # No unk_token in the model itself: a byte that the vocabulary lacks (SmolLM has no token for
    # 21 bytes, which valid text hardly holds) is dropped, as llama.cpp and the original do,
    # instead of becoming a control token.
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    # Llama 3 looks a whole word up before it merges.
    model = models.BPE(vocab=ids, merges=pairs, ignore_merges=split == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if split == "smollm":
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    elif SPLITS[split]:
        cuts.append(pre_tokenizers.Split(tokenizers.Regex(SPLITS[split]), "isolated"))
    own = split in ("smollm", "gpt-2")  # GPT-2's own pattern
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    _write(folder, vocabulary, backend)


def write_sentencepiece_bpe(
    folder: pathlib.Path, vocabulary: Vocabulary, scores: Sequence[float], prefix: bool
) -> None:
    """Writes a BPE tokenizer of the SentencePiece kind (Llama 2, Mistral).

    SentencePiece merges the neighbours whose union has the best score; the merge rules that
    say the same are made of the scores, as transformers does it.

    Args:
      folder: as `write_byte_level_bpe`.
      vocabulary: blanks of its tokens are written as U+2581; "<0x00>" to "<0xFF>" are bytes.
      scores: of each token.
      prefix: whether a text begins as if a blank stood before it.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    # Text that spells the name of a control token, or "<0x0A>", must not become that token: no
    # merge rule makes one.
    unwritten = {*vocabulary.special, *vocabulary.added, *(f"<0x{i:02X}>" for i in range(256))}
    rules = []
    for token, score in zip(vocabulary.tokens, scores, strict=True):
        if token not in unwritten:
            halves = ((token[:i], token[i:]) for i in range(1, len(token)))
            found = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
            found.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            rules += [(score, pair) for pair in found]
    rules.sort(key=lambda rule: -rule[0])
    unknown = vocabulary.roles.get("unk_token")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for _, pair in rules],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # As in the tokenizer.json of Llama 2: the text is not cut at all.
    spelling = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spelling, normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    _write(folder, vocabulary, backend)


def _write(folder: pathlib.Path, vocabulary: Vocabulary, backend: tokenizers.Tokenizer) -> None:
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in vocabulary.special]
    )
    backend.add_tokens(
        [tokenizers.AddedToken(t, special=False, normalized=False) for t in vocabulary.added]
    )
    if vocabulary.add_bos:
        bos = vocabulary.roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary.tokens.index(bos))]
        )
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": vocabulary.max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **vocabulary.roles,
    }
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
