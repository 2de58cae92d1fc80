"""Every family of language models against transformers' PyTorch models.

The golden files hold the PyTorch side; where PyTorch is installed, slow tests ask it afresh.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spa_jax.errors import UserError
from spa_jax.models import limits, transformer, tree
from spa_jax.models.io import huggingface, weights
from tests import tiny
from tests.golden.models import make


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _golden(name: str) -> dict[str, np.ndarray]:
    with np.load(make.FOLDER / f"{name}.npz") as file:
        return dict(file)


def _part(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _write(folder: pathlib.Path, arrays) -> pathlib.Path:
    """A Hugging Face folder of the golden model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(str(arrays["config"]))
    safetensors.numpy.save_file(_part(arrays, "weight/"), folder / weights.WEIGHTS)
    return folder


def _compare(config, params, arrays, folder, packed=False):
    """Logits to 1e-4, the gradient of a masked loss to 1e-4 of its norm.

    `packed`: the two sequences lie in one row, behind each other.
    """
    tokens, positions = arrays["tokens"].astype(np.int32), arrays["positions"].astype(np.int32)
    segments = np.ones_like(tokens) + packed * np.arange(len(tokens), dtype=np.int32)[:, None]
    rows = [a.reshape(1, -1) if packed else a for a in (tokens, positions, segments)]

    def loss(params):
        hidden = transformer.hidden_states(config, params, *rows)
        logits = transformer.logits(params, hidden).reshape(*tokens.shape, -1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return -jnp.sum(chosen[..., 0] * arrays["mask"]) / arrays["mask"].sum(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)

    named = _part(arrays, "gradient/")
    (folder / "gradient").mkdir()
    (folder / "gradient" / "config.json").write_text((folder / "config.json").read_text())
    safetensors.numpy.save_file(named, folder / "gradient" / weights.WEIGHTS)
    _, wanted = huggingface.load_pretrained(folder / "gradient")
    assert jax.tree.structure(gradient) == jax.tree.structure(wanted)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True
    ):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error <= 1e-4, (path, error)


@pytest.mark.parametrize("name", make.FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    arrays = _golden(name)
    config, params = huggingface.load_pretrained(_write(tmp_path, arrays))
    assert config.model_type == make.FAMILIES[name][0]
    _compare(config, params, arrays, tmp_path)


@pytest.mark.parametrize("name", ["llama3.1", "mistral", "qwen2", "qwen3"])
def test_packed_rows_are_those_of_transformers_apart(name, tmp_path):
    arrays = _golden(name)
    config, params = huggingface.load_pretrained(_write(tmp_path, arrays))
    _compare(config, params, arrays, tmp_path, packed=True)


@pytest.mark.parametrize("name", make.FAMILIES)
def test_a_family_is_saved_as_it_was_read(name, tmp_path, tokenizer_folder):
    arrays = _golden(name)
    config, params = huggingface.load_pretrained(_write(tmp_path / "theirs", arrays))
    huggingface.save_pretrained(tmp_path / "ours", config, params, tokenizer_folder)
    again, back = huggingface.load_pretrained(tmp_path / "ours")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    theirs = json.loads(str(arrays["config"]))
    for key, value in json.loads((tmp_path / "ours" / "config.json").read_text()).items():
        if key in theirs and key not in ("architectures", "bos_token_id", "eos_token_id"):
            assert value == theirs[key], key
    saved = safetensors.numpy.load_file(tmp_path / "ours" / weights.WEIGHTS)
    stored = _part(arrays, "weight/")
    assert saved.keys() == stored.keys()
    for key, array in stored.items():
        np.testing.assert_array_equal(saved[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["llama3.2", "qwen2.5", "qwen3"])
def test_packed_rows_and_the_cache_change_nothing(name, tmp_path):
    """Biases, norms of queries and keys, and the stretched rotation, in both ways in."""
    config, params = huggingface.load_pretrained(_write(tmp_path, _golden(name)))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    at = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    apart = transformer.hidden_states(config, params, tokens, at, np.ones_like(tokens))
    packed = transformer.hidden_states(
        config,
        params,
        tokens.reshape(1, 18),
        at.reshape(1, 18),
        np.repeat([[1, 2]], 9, axis=1).astype(np.int32),
    )
    np.testing.assert_allclose(packed.reshape(apart.shape), apart, atol=2e-5)

    step = jax.jit(functools.partial(transformer.cached_hidden_states, config))
    cache, layers = transformer.empty_cache(config, 2, 12), tree.unstack(params)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        hidden, cache = step(layers, tokens[:, start:end], at[:, start:end], cache)
        np.testing.assert_allclose(hidden, apart[:, start:end], atol=2e-5)


def test_a_sequence_beyond_the_window_is_refused(tmp_path):
    config, _ = huggingface.load_pretrained(_write(tmp_path, _golden("mistral")))
    assert (config.sliding_window, config.max_position) == (32, 64)
    limits.check_length(config, 32, "--context_length")
    with pytest.raises(UserError, match="--context_length: 33 .* sliding_window, 32"):
        limits.check_length(config, 33, "--context_length")
    whole = dataclasses.replace(config, sliding_window=0)
    with pytest.raises(UserError, match="max_position_embeddings, 64"):
        limits.check_length(whole, 65, "--context_length")


@pytest.mark.slow
@pytest.mark.parametrize("name", make.FAMILIES)
def test_live_models_agree(name, tmp_path):
    pytest.importorskip("torch")
    model = make.build(name)
    model.save_pretrained(tmp_path)
    arrays = make.inputs() | make.compute(model, make.inputs())
    config, params = huggingface.load_pretrained(tmp_path)
    _compare(config, params, arrays, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", make.FAMILIES)
def test_transformers_reads_what_we_save(name, tmp_path, tokenizer_folder):
    torch = pytest.importorskip("torch")
    import transformers

    arrays = _golden(name)
    config, params = huggingface.load_pretrained(_write(tmp_path / "theirs", arrays))
    huggingface.save_pretrained(tmp_path / "ours", config, params, tokenizer_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(
            torch.tensor(arrays["tokens"]), position_ids=torch.tensor(arrays["positions"])
        ).logits
    np.testing.assert_allclose(logits.numpy(), arrays["logits"], rtol=0, atol=1e-5)
