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
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    made = tokenizer.Vocabulary(tokens, tiny.SPECIAL, roles, tiny.CHATML, max_length=128)
    tokenizer.write_byte_level_bpe(folder / "written", made, merges, "smollm")
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
    made = tokenizer.Vocabulary(lacking, tiny.SPECIAL, roles, None, max_length=128)
    tokenizer.write_byte_level_bpe(tmp_path, made, merges, "smollm")
    loaded = tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("a\x12b")) == "ab"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_or_broken_file_is_named(tmp_path, name):
    tiny.tiny_tokenizer(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="cannot be read|not JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        tokenizer.load(tmp_path)


def test_families_cut_text_in_their_own_way(tmp_path):
    """Llama 3 takes digits three at a time, Qwen one; both take "'ll" and a word with its blank."""
    for family, digits in ((tiny.LLAMA3, ["123", "45"]), (tiny.QWEN, list("12345"))):
        folder = tiny.family_tokenizer(tmp_path / family.split, family, None)
        cut = tokenizer.load(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str
        text = "Go12345 we'll\n\n [see].\n"
        pieces = [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece, _ in cut(text)]
        assert pieces == ["Go", *digits, " we", "'ll", "\n\n", " [", "see", "].\n"]


def test_a_family_s_added_tokens_and_beginning(tmp_path):
    llama = tokenizer.load(tiny.family_tokenizer(tmp_path / "llama", tiny.LLAMA3, None))
    assert llama.encode("a")[0] == llama.bos_token_id == 0
    assert llama.encode("a", add_special_tokens=False) == llama.encode("a")[1:]
    qwen = tokenizer.load(tiny.family_tokenizer(tmp_path / "qwen", tiny.QWEN, None))
    assert qwen.bos_token is None
    assert qwen.encode("<think>") == [3]  # whole, and yet plain text:
    assert qwen.decode([3, *qwen.encode("x<|im_end|>")], skip_special_tokens=True) == "<think>x"
    # Qwen composes accents first.
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9") != llama.encode("e\u0301")


def test_sentencepiece_merges_the_best_score_first(tmp_path):
    pieces = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "lo", "\u2581w",
              "\u2581hell", "or", "\u2581wor", "ld", "\u2581world", "ello"]
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    roles = dict(zip(("unk_token", "bos_token", "eos_token"), control, strict=True))
    made = tokenizer.Vocabulary(tokens, control, roles, None, max_length=128, add_bos=True)
    tokenizer.write_sentencepiece_bpe(
        tmp_path, made, [0.0] * 259 + list(scores.values()), prefix=True
    )
    loaded = tokenizer.load(tmp_path)

    def expected(text):
        """SentencePiece's own algorithm; a character without a piece becomes bytes."""
        parts = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            unions = [
                (scores.get(a + b, -1e9), -i)
                for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            ]
            score, i = max(unions, default=(-1e9, 0))
            if score == -1e9:
                break
            parts[-i : 2 - i] = ["".join(parts[-i : 2 - i])]
        spelled = ([p] if p in scores else [f"<0x{b:02X}>" for b in p.encode()] for p in parts)
        return ["<s>", *(token for piece in spelled for token in piece)]

    for text in (
        "hello world",
        "hello",
        "world order",
        " hell",
        "held\nlower",
        "caf\u00e9",
        "<0x41>",
    ):
        ids = loaded.encode(text)
        assert loaded.convert_ids_to_tokens(ids) == expected(text)
        assert loaded.decode(ids, skip_special_tokens=True) == text
