"""Tokenizers in Hugging Face's folder format: loading, and making one from a vocabulary."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from spa_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    # Only tokenizers are used of transformers; without this it advises to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the Rust side raises plain Exception for a file it cannot parse
        raise UserError(f"{folder / 'tokenizer.json'}: cannot be read ({error})") from error


def write_byte_level_bpe(
    folder: pathlib.Path,
    *,
    tokens: Sequence[str],
    merges: Sequence[str],
    special: Sequence[str],
    roles: Mapping[str, str],
    chat_template: str | None,
    max_length: int,
) -> None:
    """Writes a byte-level BPE tokenizer that splits numbers into digits (SmolLM's).

    Args:
      folder: where `tokenizer.json` and `tokenizer_config.json` go; must exist.
      tokens: the vocabulary; a token's id is its index. Bytes are written as in GPT-2.
      merges: the merge rules, best first, each "left right".
      special: those of `tokens` that are control tokens, which never come out of plain text.
      roles: such as {"bos_token": "<s>"}; a subset of bos, eos, pad and unk.
      chat_template: Jinja source, or None.
      max_length: the model's context length, in tokens.
    """
    # No unk_token in the model itself: a byte that the vocabulary lacks (SmolLM has no token for
    # 21 bytes, which valid text hardly holds) is dropped, as llama.cpp and the original do,
    # instead of becoming a control token.
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **roles,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
