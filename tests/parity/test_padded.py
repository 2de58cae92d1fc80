"""Padded rows: the same hidden states as packed ones, and what padding sees."""

import jax
import numpy as np

from spa_jax.models import transformer
from spa_jax.models.kernels import xla
from spa_jax.parity import padded
from tests import tiny

CONFIG = tiny.tiny_config(tied=False)
PARAMS = transformer.init(CONFIG, jax.random.key(0))
ROWS = np.random.default_rng(0).integers(3, 384, (2, 9))


def _packed(tokens):
    positions = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
    return transformer.hidden_states(CONFIG, PARAMS, tokens, positions, np.ones_like(tokens))


def test_tokens_have_the_hidden_states_of_packed_rows():
    attention = np.ones_like(ROWS)
    attention[1, 6:] = 0
    hidden = padded.hidden_states(CONFIG, PARAMS, ROWS, attention)
    np.testing.assert_allclose(hidden[:1], _packed(ROWS[:1]), atol=1e-5)
    np.testing.assert_allclose(hidden[1:, :6], _packed(ROWS[1:, :6]), atol=1e-5)
    # Positions turn with the row, so what lies on the left changes nothing either.
    left = padded.hidden_states(CONFIG, PARAMS, ROWS, attention[:, ::-1])
    np.testing.assert_allclose(left[1:, 3:], _packed(ROWS[1:, 3:]), atol=1e-4)


def test_padding_sees_the_tokens_before_it_and_no_padding():
    """Neither itself, so its token only enters where it stands; nor the padding before it."""
    attention = np.ones_like(ROWS)
    attention[:, 6:] = 0
    changed = ROWS.copy()
    changed[:, 6:8] = 5
    a, b = (padded.hidden_states(CONFIG, PARAMS, x, attention) for x in (ROWS, changed))
    np.testing.assert_array_equal(a[:, [0, 1, 2, 3, 4, 5, 8]], b[:, [0, 1, 2, 3, 4, 5, 8]])
    assert np.any(np.asarray(a[:, 6]) != np.asarray(b[:, 6]))


def test_logits_are_finite_where_nothing_is_seen():
    attention = np.ones_like(ROWS)
    attention[:, :4] = 0
    logits = padded.logits(CONFIG, PARAMS, ROWS, attention)
    assert logits.shape == (2, 9, CONFIG.vocab_size)
    assert np.all(np.isfinite(logits))


def test_the_padding_token_is_not_trained():
    attention = np.ones_like(ROWS)
    rows = np.where(np.arange(9) % 4 == 1, 7, ROWS)

    def total(params, pad_id):
        return padded.hidden_states(CONFIG, params, rows, attention, pad_id).sum()

    plain, padding = (jax.grad(total)(PARAMS, pad_id)["embed"]["embedding"] for pad_id in (None, 7))
    assert np.any(plain[7] != 0) and np.all(np.asarray(padding[7]) == 0)
    others = np.arange(CONFIG.vocab_size) != 7
    np.testing.assert_allclose(padding[others], plain[others], atol=1e-5)


def _attention(seen):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(1, 2, 2, 3, 4)).astype(np.float32)
    k = rng.normal(size=(1, 2, 4, 3)).astype(np.float32)
    v = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    g = rng.normal(size=q.shape).astype(np.float32)

    def gradient(attend):
        out, back = jax.vjp(lambda *x: attend(*x, np.array(seen)[None]), q, k, v)
        return out, back(g)

    return gradient(padded.attend), gradient(xla.attend), (q, k, v, g)


def test_queries_that_see_something_attend_as_everywhere():
    ours, theirs, _ = _attention(np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_query_that_sees_nothing_weighs_every_column_by_one_on_the_way_back():
    """By hand: forward it is the mean, backward each of the three weights is 1, not 1/3."""
    (out, (dq, dk, dv)), _, (q, k, v, g) = _attention(np.zeros((3, 3), bool))
    mean = np.broadcast_to(v.mean(2)[:, :, None, None], out.shape)
    np.testing.assert_allclose(out, mean, atol=1e-6)
    np.testing.assert_allclose(dv, np.broadcast_to(g.sum((2, 3))[:, :, None], v.shape), atol=1e-5)
    dp = np.einsum("bgrtk,bgck->bgrtc", g, v - v.mean(2, keepdims=True))
    np.testing.assert_allclose(dq, np.einsum("bgrtc,bgkc->bgrtk", dp, k) / 2, atol=1e-5)
    np.testing.assert_allclose(dk, np.einsum("bgrtc,bgrtk->bgkc", dp, q) / 2, atol=1e-5)
