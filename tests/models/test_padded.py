"""Padded rows: the same hidden states as packed ones, and what padding sees."""

import jax
import numpy as np

from spa_jax.models import padded, transformer
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
