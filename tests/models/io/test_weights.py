"""Folders as others leave them: what is read as transformers reads it, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from spa_jax.errors import UserError
from spa_jax.models import transformer
from spa_jax.models.io import hf_config, huggingface, tensors, weights
from spa_jax.models.io.weights import EMBEDDING, OUTPUT, WEIGHTS
from tests import tiny

CONFIG = tiny.CONFIG
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tied model's config.json and tensors."""
    folder = tmp_path_factory.mktemp("original")
    words = tiny.tiny_tokenizer(folder / "words")
    huggingface.save_pretrained(folder / "m", CONFIG, tiny.random_params(CONFIG), words)
    about = json.loads((folder / "m" / "config.json").read_text())
    return about, safetensors.numpy.load_file(folder / "m" / WEIGHTS)


@pytest.fixture
def write(original, tmp_path):
    """(changes of config.json, tensors) -> their folder."""

    def make(stored=None, **changes):
        about, found = original
        (tmp_path / "config.json").write_text(json.dumps(about | changes))
        safetensors.numpy.save_file(found if stored is None else stored, tmp_path / WEIGHTS)
        return tmp_path

    return make


def _theirs(folder, ids):
    """The logits that transformers computes."""
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def _ours(folder, ids):
    config, params = huggingface.load_pretrained(folder)
    at = np.arange(len(ids))[None]
    hidden = transformer.hidden_states(config, params, np.array([ids]), at, np.ones_like(at))
    return np.asarray(transformer.logits(params, hidden))[0]


def test_an_output_layer_of_its_own_goes_before_what_the_config_says(original, write):
    rng = np.random.default_rng(1)
    own = (0.3 * rng.standard_normal((384, 64))).astype(np.float32)
    small = {n: (0.1 * a).astype(np.float32) for n, a in original[1].items()} | {OUTPUT: own}
    folder = write(small)
    config, params = huggingface.load_pretrained(folder)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["unembed"]["kernel"], own.T)
    ids = [5, 9, 300, 2]
    np.testing.assert_allclose(_ours(folder, ids), _theirs(folder, ids), atol=2e-4)


def test_a_tied_output_layer_that_is_stored_instead_of_the_embedding(original, write):
    stored = {OUTPUT if n == EMBEDDING else n: a for n, a in original[1].items()}
    config, params = huggingface.load_pretrained(write(stored))
    assert config == CONFIG
    tiny.assert_same(params, tiny.random_params(CONFIG))


def test_one_file_goes_before_an_index_that_lies_beside_it(write):
    folder = write()
    stale = {"weight_map": {Q: "model-00001-of-00009.safetensors"}}
    (folder / weights.INDEX).write_text(json.dumps(stale))
    tiny.assert_same(huggingface.load_pretrained(folder)[1], tiny.random_params(CONFIG))


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda n: n.removeprefix("model."),
    ],
    ids=["ddp", "compiled", "both", "within", "no_head"],
)
def test_names_with_what_wrappers_put_before_them(original, write, rename):
    folder = write({rename(name): array for name, array in original[1].items()})
    tiny.assert_same(huggingface.load_pretrained(folder)[1], tiny.random_params(CONFIG))


def test_two_tensors_of_one_name_are_refused(original, write):
    folder = write(original[1] | {f"module.{Q}.weight": original[1][f"{Q}.weight"]})
    with pytest.raises(UserError, match=f"{Q}.weight is there twice, also as m"):
        huggingface.load_pretrained(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(original, write, tmp_path, dtype, value):
    stored = {name: array.astype(dtype) for name, array in original[1].items()}
    stored[f"{Q}.weight"][3, 5] = value
    with pytest.raises(UserError, match=f"model.safetensors: tensor {Q}.weight holds NaN or"):
        huggingface.load_pretrained(write(stored))
    array = stored[f"{Q}.weight"]
    with pytest.raises(UserError, match="not written: parameter q/kernel holds NaN"):
        tensors.save_heads(tmp_path, {"q": {"kernel": array}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_the_largest_numbers_are_finite():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        most = ml_dtypes.finfo(dtype).max
        assert tensors.is_finite(np.array([most, -most, 0, 1], dtype))
        assert not tensors.is_finite(np.array([[0, np.inf], [0, 0]], dtype)[:, 1])


def _gptq(name, array):
    return {f"{name}.qweight": np.zeros((8, 8), np.int32), f"{name}.scales": array[:1]}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (_gptq, f"quantised .it holds tensor {Q}.qweight"),
        (lambda n, a: {f"{n}.weight": np.zeros(9, np.uint8), f"{n}.weight.absmax": a[0]}, "absmax"),
        (lambda n, a: {f"{n}.weight": a, f"{n}.weight_scale_inv": a[:1]}, "quantised .*_scale_inv"),
        (lambda n, a: {f"{n}.weight_packed": np.zeros((9, 1), np.int32)}, "quantised .*_packed"),
        (lambda n, a: {f"{n}.weight": a.astype(np.int8)}, f"{Q}.weight is I8.*quantised"),
        (lambda n, a: {f"{n}.weight": a.astype(ml_dtypes.float8_e4m3fn)}, "is F8_E4M3.*quantised"),
    ],
    ids=["gptq", "bitsandbytes", "fp8", "compressed", "int8", "fp8_alone"],
)
def test_quantised_weights_are_said_to_be(original, write, kept, message):
    stored = dict(original[1])
    array = stored.pop(f"{Q}.weight")
    with pytest.raises(UserError, match=message):
        huggingface.load_pretrained(write(stored | kept(Q, array)))


def test_a_config_that_says_how_they_are_quantised_is_enough(write):
    folder = write(quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UserError, match=r"config.json: the weights are quantised \(awq\).*dequant"):
        huggingface.load_pretrained(folder)
    assert huggingface.load_pretrained(write(quantization_config=None))[0] == CONFIG


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "proportional"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scalings_that_are_not_computed_are_refused(write, key, kind):
    for name in ("type", "rope_type"):
        folder = write(**{key: {name: kind, "factor": 2.0}})
        with pytest.raises(UserError, match=f"config.json: {key} of type '{kind}' is not computed"):
            hf_config.read(folder / "config.json")


def test_rotary_settings_are_read_as_transformers_reads_them(write):
    plain = {"rope_type": "default", "rope_theta": 1e6}
    for changes in (
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": plain},
        {"rope_parameters": plain | {"partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "default"}, "rope_parameters": plain},
    ):
        folder = write(**changes)
        theirs = transformers.AutoConfig.from_pretrained(folder).rope_parameters
        ours = hf_config.read(folder / "config.json")
        assert (ours.rope_theta, ours.rope_scaling) == (theirs["rope_theta"], None), changes
    by_layer = {"full_attention": plain, "sliding_attention": plain}
    with pytest.raises(UserError, match=r"rope_parameters differs by layer \(full_att.*, sliding"):
        hf_config.read(write(rope_parameters=by_layer) / "config.json")


def test_mistrals_window_without_a_word_is_transformers_own(write):
    folder = write(model_type="mistral")
    assert hf_config.read(folder / "config.json").sliding_window == 4096
    assert transformers.AutoConfig.from_pretrained(folder).sliding_window == 4096
    write(model_type="mistral", sliding_window=None)
    assert hf_config.read(folder / "config.json").sliding_window == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: it must be less than or eq"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2: it must be greater than or equal to 1"),
        ({"num_hidden_layers": 9}, r"tensor model.layers.2.input_layernorm.weight is missing"),
        ({"vocab_size": True}, "vocab_size=True: it must be a valid integer"),
        ({"vocab_size": "384"}, "vocab_size='384': it must be a valid integer"),
        ({"vocab_size": 10**8}, r"embed_tokens.weight has shape .*asks for \[100000000, 64\]"),
        ({"hidden_size": 0}, "hidden_size=0: it must be greater"),
        ({"head_dim": 15}, "a head of size 15 .* must be even"),
        ({"head_dim": None, "num_attention_heads": 7}, "num_attention_heads=7 does not divide"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: it must be greater than 0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: it must be a finite number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': it must be a valid number"),
        ({"max_position_embeddings": 2.5}, "max_position_embeddings=2.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': it must be a valid bool"),
        ({"rope_scaling": [1]}, "rope_scaling="),
        ({"model_type": ["llama"]}, "model_type .'llama'. is not supported"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types="),
    ],
)
def test_a_config_is_not_believed_before_its_tensors(write, changes, message):
    with pytest.raises(UserError, match=message):
        huggingface.load_pretrained(write(**changes))


def test_a_config_that_nests_without_end_is_not_json(write):
    folder = write()
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="config.json: not JSON"):
        hf_config.read(folder / "config.json")
