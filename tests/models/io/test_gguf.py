"""GGUF files to Hugging Face folders: architectures, kinds of tensors, and what is refused."""

import dataclasses
import json
import math

import gguf
import jax
import numpy as np
import pytest
import transformers

from spa_jax import chat, chat_template, tokenizer
from spa_jax.errors import UserError
from spa_jax.models.config import RopeScaling
from spa_jax.models.io import gguf as gguf_io
from spa_jax.models.io import huggingface
from tests import tiny
from tests.tiny import CONFIG, UNTIED, assert_same, random_params

QWEN2 = dataclasses.replace(CONFIG, model_type="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(UNTIED, model_type="qwen3", qk_norm=True)
# K-quants come in blocks of 256.
WIDE = dataclasses.replace(CONFIG, hidden_size=256, head_dim=64, intermediate_size=256)
LLAMA3_2 = dataclasses.replace(
    CONFIG,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
)
KINDS = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def interleave(weight, heads):
    """Rows from Hugging Face's rotary order to GGUF's, as llama.cpp's converter does it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def rope_factors(config):
    """What frequencies are divided by, frequency by frequency, as llama.cpp's converter has it."""
    scaling, factors = config.rope_scaling, []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < scaling.original_max_position / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_max_position / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def quantized(array, kind):
    """The array in a kind of tensor; blocks of plausible bytes where gguf cannot quantise."""
    try:
        return gguf.quantize(np.ascontiguousarray(array), kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(array.shape, kind)
        # Bytes below 0x3c make float16 scales below 1, and no infinities.
        return np.random.default_rng(array.size).integers(0, 0x3C, shape).astype(np.uint8)


def write_gguf(
    path,
    config,
    params,
    tokenizer_folder,
    *,
    architecture=None,
    pre="smollm",
    skip="",
    types=None,
    claims=None,
    factors=None,
    extra=None,
):
    """A GGUF file of `params`; returns the parameters that its quantised tensors stand for.

    `claims` is what the metadata say, if not `config`; `extra` writes more of them.
    """
    claimed = claims or config
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_block_count(claimed.num_layers)
    writer.add_context_length(claimed.max_position)
    writer.add_embedding_length(claimed.hidden_size)
    writer.add_feed_forward_length(claimed.intermediate_size)
    writer.add_head_count(claimed.num_heads)
    writer.add_head_count_kv(claimed.num_kv_heads)
    writer.add_key_length(claimed.head_dim)
    writer.add_layer_norm_rms_eps(claimed.rms_norm_eps)
    writer.add_rope_freq_base(claimed.rope_theta)
    _write_tokenizer(writer, tokenizer_folder, pre)
    if extra:
        extra(writer)
    if config.rope_scaling:
        factors = rope_factors(config) if factors is None else factors
        writer.add_tensor("rope_freqs.weight", factors)
    expected = jax.tree.map(np.array, params)

    def add(name, array, put, heads=0):
        if name == skip:
            return
        kind = (types or {}).get(name.split(".")[-2], KINDS.F32) if array.ndim > 1 else KINDS.F32
        data = quantized(interleave(array, heads) if heads else array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        back = gguf.dequantize(data, kind)
        if heads:  # Independently of the code under test: find each row where it went.
            order = interleave(np.arange(len(array))[:, None], heads)[:, 0]
            back = back[np.argsort(order)]
        put(back)

    def into(leaf, index=...):
        def put(back):
            leaf[index] = back.T if leaf[index].ndim == 2 and leaf is not embedding else back

        return put

    embedding = expected["embed"]["embedding"]
    add("token_embd.weight", params["embed"]["embedding"], into(embedding))
    add("output_norm.weight", params["norm"]["scale"], into(expected["norm"]["scale"]))
    if not config.tie_embeddings:
        add("output.weight", params["unembed"]["kernel"].T, into(expected["unembed"]["kernel"]))
    names = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "attn_norm": "attn_norm",
        "mlp_norm": "ffn_norm",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    }
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    for i in range(config.num_layers):
        for ours, leaves in params["layers"].items():
            for leaf, stacked in leaves.items():
                kind = "bias" if leaf == "bias" else "weight"
                rotated = leaf == "kernel" and config.model_type == "llama"
                add(
                    f"blk.{i}.{names[ours]}.{kind}",
                    stacked[i].T,
                    into(expected["layers"][ours][leaf], i),
                    heads.get(ours, 0) if rotated else 0,
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_tokenizer(writer, folder, pre):
    """The tokenizer of a folder, as llama.cpp's converter writes it."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    added = {token["content"]: token["special"] for token in stored["added_tokens"]}
    kinds = {
        None: gguf.TokenType.NORMAL,
        True: gguf.TokenType.CONTROL,
        False: gguf.TokenType.USER_DEFINED,
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_token_types([kinds[added.get(token)] for token in tokens])
    for role in ("bos", "eos", "pad", "unk"):
        if f"{role}_token" in settings:
            getattr(writer, f"add_{role}_token_id")(vocab[settings[f"{role}_token"]])
    writer.add_add_bos_token(stored["post_processor"] is not None)
    writer.add_chat_template(settings["chat_template"])


MIXED = {
    "attn_q": KINDS.Q4_1,
    "attn_k": KINDS.Q4_0,
    "attn_v": KINDS.F16,
    "ffn_down": KINDS.Q4_1,
    "ffn_up": KINDS.BF16,
    "token_embd": KINDS.Q8_0,
    "output": KINDS.Q8_0,
}
K_QUANTS = {
    "attn_q": KINDS.Q4_K,
    "attn_k": KINDS.Q2_K,
    "attn_v": KINDS.Q6_K,
    "attn_output": KINDS.Q3_K,
    "ffn_gate": KINDS.Q4_K,
    "ffn_down": KINDS.Q5_K,
    "token_embd": KINDS.Q6_K,
}


@pytest.mark.parametrize(
    ("config", "types"),
    [
        (CONFIG, {}),
        (CONFIG, MIXED),
        (UNTIED, {}),
        (UNTIED, MIXED),
        (WIDE, K_QUANTS),
        (QWEN2, {}),
        (QWEN2, MIXED),
        (QWEN3, {}),
        (QWEN3, MIXED),
        (LLAMA3_2, {}),
    ],
    ids=[
        "float32",
        "quantised",
        "untied",
        "untied-quantised",
        "k-quants",
        "qwen2",
        "qwen2-quantised",
        "qwen3",
        "qwen3-quantised",
        "llama3.2",
    ],
)
def test_gguf_becomes_a_folder_with_the_same_weights(tmp_path, tokenizer_folder, config, types):
    params = random_params(config)
    expected = write_gguf(tmp_path / "m.gguf", config, params, tokenizer_folder, types=types)
    gguf_io.import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    found_config, found = huggingface.load_pretrained(tmp_path / "m")
    assert found_config == config
    assert_same(found, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    if not types:
        assert_same(found, params)


def test_its_tokenizer_comes_along(tmp_path, tokenizer_folder):
    write_gguf(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), tokenizer_folder)
    gguf_io.import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    original, imported = tokenizer.load(tokenizer_folder), tokenizer.load(tmp_path / "m")
    text = "put mug 12 in/on shelf\n\n caf\u00e9 \U0001f375<|im_end|>"
    assert imported.encode(text) == original.encode(text)
    assert imported.chat_template == tiny.CHATML
    assert (imported.bos_token, imported.eos_token_id, imported.unk_token_id) == (
        "<|im_start|>",
        2,
        0,
    )
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert json.loads((tmp_path / "m/config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("family", [tiny.LLAMA3, tiny.QWEN], ids=["llama3", "qwen"])
def test_the_families_tokenizers_come_along(tmp_path, family):
    name = "llama3" if family is tiny.LLAMA3 else "chatml"
    folder = tiny.family_tokenizer(tmp_path / "t", family, chat_template.TEMPLATES[name])
    write_gguf(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), folder, pre=family.split)
    gguf_io.import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    original, imported = tokenizer.load(folder), tokenizer.load(tmp_path / "m")
    special = "".join(family.special)
    for text in ("Go12345 we'll\n\n [see].\n", "<think>\nx</think>e\u0301", special):
        assert imported.encode(text) == original.encode(text)
    assert chat.ChatFormat.from_tokenizer(imported) == chat.ChatFormat.from_tokenizer(original)
    assert (tmp_path / "m/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_sentencepiece_tokenizer_comes_along(tmp_path, tokenizer_folder):
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell", "\u2581hell"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    tokens += [f"[PAD{i}]" for i in range(384 - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(pieces)
    kinds += [gguf.TokenType.UNUSED] * (384 - len(kinds))

    def sentencepiece(writer):
        for key in ("model", "pre", "tokens", "merges", "token_type"):
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(384)])
        writer.add_token_types(kinds)

    path = tmp_path / "m.gguf"
    params = random_params(CONFIG)
    write_gguf(path, CONFIG, params, tokenizer_folder, extra=sentencepiece)
    gguf_io.import_gguf(path, tmp_path / "m")
    loaded = tokenizer.load(tmp_path / "m")
    ids = loaded.encode("hello\n")
    assert loaded.convert_ids_to_tokens(ids) == ["\u2581hell", "o", "<0x0A>"]
    assert loaded.decode(ids) == "hello\n"


def refuse(path, out, message):
    with pytest.raises(UserError, match=message):
        gguf_io.import_gguf(path, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma3"}, "m.gguf: architecture 'gemma3' is not supported"),
        ({"architecture": "qwen2"}, "m.gguf: tensor blk.0.attn_q.bias is missing"),
        ({"pre": "tekken"}, "m.gguf: tokenizer 'gpt2' with pre-tokenizer 'tekken'"),
        ({"skip": "blk.1.ffn_up.weight"}, "m.gguf: tensor blk.1.ffn_up.weight is missing"),
        ({"claims": dataclasses.replace(CONFIG, num_layers=1)}, "tensor blk.1.attn_k.weight is"),
        ({"claims": dataclasses.replace(CONFIG, num_layers=3)}, "tensor blk.2.attn_norm.weight is"),
        (
            {"claims": dataclasses.replace(CONFIG, intermediate_size=128)},
            r"m.gguf: tensor blk.0.ffn_gate.weight has shape \[96, 64\].*\[128, 64\]",
        ),
        ({"types": {"attn_v": KINDS.TQ2_0}}, "tensor blk.0.attn_v.weight is of kind TQ2_0"),
        ({"extra": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "by 'yarn'"),
        ({"extra": lambda w: w.add_uint16("split.count", 3)}, "one of 3 parts .*--merge"),
        ({"factors": np.linspace(1, 8, 8, dtype=np.float32)}, "rope_freqs.weight is not the scal"),
    ],
)
def test_gguf_files_that_are_refused(tmp_path, tokenizer_folder, options, message):
    config = LLAMA3_2 if "factors" in options else WIDE if "types" in options else CONFIG
    path = tmp_path / "m.gguf"
    write_gguf(path, config, random_params(config), tokenizer_folder, **options)
    refuse(path, tmp_path / "m", message)


def test_a_tokenizer_that_disagrees_with_the_embedding(tmp_path, tokenizer_folder):
    path = tmp_path / "m.gguf"
    small = dataclasses.replace(CONFIG, vocab_size=380)
    write_gguf(path, small, random_params(small), tokenizer_folder)
    refuse(path, tmp_path / "m", r"tensor token_embd.weight has shape \[380, 64\].*\[384, 64\]")
    params = random_params(CONFIG)

    def replaced(key, value):
        def change(writer):
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value = value

        return change

    write_gguf(path, CONFIG, params, tokenizer_folder, extra=replaced("eos_token_id", 384))
    refuse(path, tmp_path / "m", "tokenizer.ggml.eos_token_id is 384, .* 384 tokens")
    twice = replaced("tokens", ["a"] * 384)
    write_gguf(path, CONFIG, params, tokenizer_folder, extra=twice)
    refuse(path, tmp_path / "m", "tokenizer.ggml.tokens holds 'a' 384 times")
    unknown = replaced("merges", ["a nowhere"])
    write_gguf(path, CONFIG, params, tokenizer_folder, extra=unknown)
    refuse(path, tmp_path / "m", "m.gguf: tokenizer.ggml makes no tokenizer .*nowhere")
    write_gguf(path, CONFIG, params, tokenizer_folder, extra=replaced("token_type", [1]))
    refuse(path, tmp_path / "m", "m.gguf: tokenizer.ggml makes no tokenizer")


def test_no_file(tmp_path):
    refuse(tmp_path / "none.gguf", tmp_path / "m", "none.gguf: no such file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_truncated_gguf_is_refused(tmp_path, tokenizer_folder, share):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_params(CONFIG), tokenizer_folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    message = "m.gguf: not a GGUF file, or a truncated one"
    if share >= 0.5:  # the cut is behind the list of tensors
        message += r" \(tensor blk.\d.\w+.weight ends at byte \d+ of \d+\)"
    refuse(path, tmp_path / "m", message)


def test_a_gguf_file_is_believed_no_number_before_it_fits(tmp_path, tokenizer_folder):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_params(CONFIG), tokenizer_folder)
    whole = path.read_bytes()
    reader = gguf.GGUFReader(path)
    norm = next(t for t in reader.tensors if t.name == "output_norm.weight")
    offset, dims = norm.field.offset + 8 + len(norm.name) + 4 + 8 + 4, norm.field.offset
    dims += 8 + len(norm.name) + 4
    tokens = reader.get_field("tokenizer.ggml.tokens").offset + 8 + len("tokenizer.ggml.tokens")
    for at, number, message in (
        (8, 2**40, "1099511627776 tensors"),
        (16, 2**40, "1099511627776 entries of metadata"),
        (tokens + 8, 2**40, "a list at byte .* has 1099511627776 items of kind 8"),
        (tokens + 8, 10**6, r"something at byte \d+ ends at \d+ of"),
        (dims, 2**62, "tensor output_norm.weight ends at byte"),
        (dims, 0, r"tensor output_norm.weight has shape \[0\]"),
        (offset, 0, "tensor token_embd.weight begins at byte .*, within tensor output_norm"),
        (offset, 8, "tensor output_norm.weight is not aligned to 32 bytes"),
    ):
        changed = bytearray(whole)
        changed[at : at + 8] = number.to_bytes(8, "little")
        path.write_bytes(changed)
        refuse(path, tmp_path / "m", f"m.gguf: not a GGUF file, or a truncated one .{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("llama.block_count", "add_string", "two"), "llama: block_count='two': it must be a"),
        (("llama.embedding_length", "add_uint32", 0), "llama: embedding_length=0: it must be gr"),
        (("llama.attention.head_count_kv", "add_uint32", 3), "num_key_value_heads=3 does not div"),
        (("llama.rope.freq_base", "add_float32", math.nan), "rope.freq_base=nan: it must be a fin"),
        (("llama.rope.dimension_count", "add_uint32", 8), "rope.dimension_count=8 is another size"),
        (("tokenizer.ggml.eos_token_id", "add_string", "2"), "eos_token_id: '2': it must be a val"),
        (("tokenizer.ggml.merges", "add_string", "a b"), "tokenizer.ggml.merges: 'a b': it must"),
    ],
)
def test_metadata_are_of_their_types(tmp_path, tokenizer_folder, change, message):
    key, put, value = change

    def extra(writer):
        writer.kv_data[0].pop(key, None)
        getattr(writer, put)(key, value)

    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_params(CONFIG), tokenizer_folder, extra=extra)
    refuse(path, tmp_path / "m", f"m.gguf: .*{message}")


def test_values_that_are_not_finite_are_named(tmp_path, tokenizer_folder):
    params = random_params(CONFIG)
    params["layers"]["up"]["kernel"][1, 3, 4] = np.inf
    write_gguf(tmp_path / "m.gguf", CONFIG, params, tokenizer_folder)
    refuse(tmp_path / "m.gguf", tmp_path / "m", "tensor blk.1.ffn_up.weight holds NaN or an infin")
