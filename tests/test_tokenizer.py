"""Loading a tokenizer, and making one from a vocabulary and merges."""

import json

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st

from spa_jax import tokenizer
from spa_jax.errors import UserError
from tests import tiny


def vocabulary(folder):
    """(tokens by id, merges) of the tokenizer in a folder, as a GGUF file holds them."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(the trained tokenizer, the one that was written from its vocabulary and merges)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.tiny_tokenizer(folder / "trained")
    tokens, merges = vocabulary(folder / "trained")
    (folder / "written").mkdir()
    tokenizer.write_byte_level_bpe(
        folder / "written",
        tokens=tokens,
        merges=merges,
        special=tiny.SPECIAL,
        roles={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        chat_template=tiny.CHATML,
        max_length=128,
    )
    return tokenizer.load(folder / "trained"), tokenizer.load(folder / "written")


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.text(max_size=60))
def test_written_from_vocabulary_and_merges_it_gives_the_same_ids(pair, text):
    trained, written = pair
    assert written.encode(text) == trained.encode(text)
    assert written.decode(written.encode(text)) == text


def test_special_tokens_are_single_ids_and_numbers_are_digits(pair):
    _, written = pair
    for i, name in enumerate(tiny.SPECIAL):
        assert written.encode(name) == [i]
        assert written.encode(f"a{name}b")[1] == i
    assert written.convert_ids_to_tokens(written.encode("12345")) == list("12345")
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (1, 2, 2)
    assert written.model_max_length == 128


def test_transformers_own_loader_takes_the_folder(pair):
    trained, written = pair
    auto = transformers.AutoTokenizer.from_pretrained(written.name_or_path)
    text = "put mug 12 in/on desk 1\n\n caf\u00e9"
    assert auto.encode(text) == written.encode(text) == trained.encode(text)
    assert auto.chat_template == tiny.CHATML


def test_a_byte_that_the_vocabulary_lacks_is_dropped_not_special(tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    tokens, merges = vocabulary(tmp_path)
    byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\x12")
    (missing,) = [token for token, _ in byte]
    lacking = [token for token in tokens if token != missing]
    merges = [merge for merge in merges if missing not in merge]
    roles = {"unk_token": "<|endoftext|>"}
    tokenizer.write_byte_level_bpe(
        tmp_path, tokens=lacking, merges=merges, special=tiny.SPECIAL, roles=roles,
        chat_template=None, max_length=128,
    )  # fmt: skip
    loaded = tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("a\x12b")) == "ab"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_or_broken_file_is_named(tmp_path, name):
    tiny.tiny_tokenizer(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        tokenizer.load(tmp_path)
