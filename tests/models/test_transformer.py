"""The decoder: its tree, its rotation, and that its two ways in are one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.models import layers, transformer, tree
from spa_jax.models.io import huggingface
from spa_jax.models.kernels import products, xla
from tests import tiny

CONFIG = tiny.tiny_config()
PARAMS = tiny.tiny_params(CONFIG)
LENGTH, CACHE = 40, 48

_hidden = jax.jit(functools.partial(transformer.hidden_states, CONFIG))
_cached = jax.jit(functools.partial(transformer.cached_hidden_states, CONFIG))


def _tokens(rows: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 384, (rows, length)).astype(np.int32)


def _whole(tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(_hidden(PARAMS, tokens, positions, np.ones_like(tokens)))


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_tree_is_the_documented_one(tied):
    c = tiny.tiny_config(tied)
    n, d, f, h, g, k, v = 2, 32, 64, 4, 2, 8, 384
    wanted = {
        "embed": {"embedding": (v, d)},
        "layers": {
            "attn_norm": {"scale": (n, d)},
            "q": {"kernel": (n, d, h * k)},
            "k": {"kernel": (n, d, g * k)},
            "v": {"kernel": (n, d, g * k)},
            "o": {"kernel": (n, h * k, d)},
            "mlp_norm": {"scale": (n, d)},
            "gate": {"kernel": (n, d, f)},
            "up": {"kernel": (n, d, f)},
            "down": {"kernel": (n, f, d)},
        },
        "norm": {"scale": (d,)},
    } | ({} if tied else {"unembed": {"kernel": (d, v)}})
    params = jax.eval_shape(lambda: transformer.init(c, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, params) == wanted


def test_tied_and_untied_logits():
    hidden = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    table = np.asarray(PARAMS["embed"]["embedding"])
    np.testing.assert_allclose(transformer.logits(PARAMS, hidden), hidden @ table.T, atol=1e-4)
    untied = PARAMS | {"unembed": {"kernel": -2 * table.T}}
    np.testing.assert_allclose(transformer.logits(untied, hidden), -2 * hidden @ table.T, atol=1e-4)


# --- rotation and attention --------------------------------------------------------------------


def test_rotation_by_hand():
    """K = 4, frequencies 1 and 0.1: pairs (0, 2) by the position, (1, 3) by a tenth of it."""
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    for position in (0, 1, 7):
        a, b = position * 1.0, position * 0.1
        wanted = [
            1 * np.cos(a) - 3 * np.sin(a),
            2 * np.cos(b) - 4 * np.sin(b),
            3 * np.cos(a) + 1 * np.sin(a),
            4 * np.cos(b) + 2 * np.sin(b),
        ]
        out = layers.rotate(x, jnp.array([[position]]), jnp.array([1.0, 0.1]))
        np.testing.assert_allclose(out.reshape(4), wanted, atol=1e-5)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = (layers.rotate(x, jnp.array([[p]]), 1e4) for x, p in ((q, at_q), (k, at_k)))
        return float(jnp.vdot(*turned))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 6), abs=1e-2)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_attention_in_blocks_is_attention(length):
    rng = np.random.default_rng(length)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 2, 2, length, 8), (2, 2, 8, length), (2, 2, length, 8))
    )
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, length))))
    mask = transformer.packed_mask(segments)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def with_gradient(attend):
        out, back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
        return out, back(d_out)

    ours, theirs = (
        jax.jit(with_gradient, static_argnums=0)(attend)
        for attend in (xla.attend_causally, xla.attend)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_attention_by_hand():
    """Two queries, K = 1: the first sees one key, the second two with weights 1/4 and 3/4."""
    q = jnp.ones((1, 1, 1, 2, 1))
    k = jnp.log(jnp.array([1.0, 3.0])).reshape(1, 1, 1, 2)
    v = jnp.array([8.0, 16.0]).reshape(1, 1, 2, 1)
    mask = jnp.tril(jnp.ones((1, 2, 2), bool))
    out = xla.attend(q, k, v, mask)
    np.testing.assert_allclose(out.reshape(2), [8.0, 14.0], rtol=1e-6)


# --- packing and the cache ---------------------------------------------------------------------


def test_packed_rows_are_separate_rows():
    tokens = _tokens(3)
    sizes = (7, 20, 13)
    packed = np.concatenate([row[:n] for row, n in zip(tokens, sizes, strict=True)])[None]
    positions = np.concatenate([np.arange(n) for n in sizes])[None].astype(np.int32)
    segments = np.repeat([1, 2, 3], sizes)[None].astype(np.int32)
    together = np.asarray(_hidden(PARAMS, packed, positions, segments))[0]
    alone = _whole(tokens)
    start = 0
    for row, n in enumerate(sizes):
        np.testing.assert_allclose(together[start : start + n], alone[row, :n], atol=1e-5)
        start += n


def test_no_token_sees_what_comes_after_it():
    tokens = _tokens(2)
    changed = tokens.copy()
    changed[:, 25:] = 3
    np.testing.assert_allclose(_whole(tokens)[:, :25], _whole(changed)[:, :25], atol=1e-5)
    assert np.abs(_whole(tokens) - _whole(changed))[:, 25:].max() > 0.1


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_the_cache_changes_nothing(chunk):
    """Rows of different lengths, in chunks that a row's end does not divide."""
    tokens, lengths = _tokens(3), np.array([LENGTH, 23, 5])
    wanted = _whole(tokens)
    layers = tree.unstack(PARAMS)
    cache = transformer.empty_cache(CONFIG, 3, CACHE)
    # What an earlier conversation left in the slots must not be seen.
    cache = jax.tree.map(lambda x: x + 100.0, cache)
    for start in range(0, LENGTH, chunk):
        columns = start + np.arange(chunk)
        real = columns < lengths[:, None]
        piece = np.where(real, tokens[:, np.minimum(columns, LENGTH - 1)], 0).astype(np.int32)
        positions = np.where(real, columns, CACHE).astype(np.int32)
        hidden, cache = _cached(layers, piece, positions, cache)
        np.testing.assert_allclose(
            np.asarray(hidden)[real], wanted[:, np.minimum(columns, LENGTH - 1)][real], atol=1e-4
        )
    keys, values = cache[0]
    assert (np.asarray(keys)[2, :, :, 5:] == 100).all(), "padding wrote into the cache"
    assert (np.asarray(values)[2, :, 5:] == 100).all()


def test_unstack_names_every_layer():
    layers = tree.unstack(PARAMS)["layers"]
    assert len(layers) == CONFIG.num_layers
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(
            layer["down"]["transposed"], PARAMS["layers"]["down"]["kernel"][i].T
        )


# --- against another implementation ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(tiny.tiny_config(tied), rope_theta=500.0)
    params = tiny.tiny_params(config)
    tokenizer = tiny.tiny_tokenizer(tmp_path / "tokenizer")
    huggingface.save_pretrained(tmp_path / "model", config, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", torch_dtype=torch.float32
    )
    tokens = _tokens(2)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    hidden = transformer.hidden_states(config, params, tokens, positions, np.ones_like(tokens))
    np.testing.assert_allclose(transformer.logits(params, hidden), wanted, atol=1e-3)


def test_the_gradient_of_matmul_is_that_of_a_plain_product():
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = ((2, 3, 4), (4, 5), (2, 3, 5))
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    ours = jax.grad(lambda x, w: jnp.sum(products.matmul(x, w) * g), (0, 1))(x, w)
    plain = jax.grad(lambda x, w: jnp.sum(jnp.einsum("btn,nm->btm", x, w) * g), (0, 1))(x, w)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
