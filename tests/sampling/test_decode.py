"""Drawing tokens: the distribution, the edges, truncation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.sampling import decode


def _draw(uniform, probs) -> np.ndarray:
    uniform = jnp.asarray(uniform, jnp.float32)
    weights = jnp.broadcast_to(3 * jnp.asarray(probs, jnp.float32), (len(uniform), len(probs)))
    tokens, total = decode.inverse_cdf(uniform, weights)
    np.testing.assert_allclose(total, 3 * np.sum(probs), rtol=1e-5)
    return np.asarray(tokens)


@pytest.mark.parametrize("size", [2, 7, 256, 257, 384, 600])
def test_inverse_cdf_gives_every_token_its_share(size):
    """Of numbers that lie evenly in [0, 1), a token gets as many as its probability, to one."""
    probs = np.random.default_rng(size).dirichlet(np.ones(size) * 3)
    evenly = (np.arange(20_000) + 0.5) / 20_000
    counts = np.zeros(size)
    for part in np.split(evenly, 2):
        counts += np.bincount(_draw(part, probs), minlength=size)
    np.testing.assert_allclose(counts, probs * len(evenly), rtol=0, atol=1.05)  # float32 sums


def test_inverse_cdf_by_hand():
    probs = [0.25, 0.5, 0.0, 0.25]
    uniform = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999999]
    np.testing.assert_array_equal(_draw(uniform, probs), [0, 0, 1, 1, 3, 3])


NEARLY_ONE = np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize("size", [5, 256, 300, 512, 1000])
def test_the_edges_never_give_a_token_without_mass(size):
    """u = 0 and u just below 1, with mass in one place, or missing at both ends."""
    for only in {0, 1, size // 2, size - 2, size - 1}:
        probs = np.zeros(size)
        probs[only] = 1
        assert set(_draw([0.0, 0.5, NEARLY_ONE], probs)) == {only}
    probs = np.zeros(size)
    probs[size // 4 : size // 2] = 1 / (size // 2 - size // 4)
    first, last = _draw([0.0, NEARLY_ONE], probs)
    assert first == size // 4 and last == size // 2 - 1


def test_rounding_never_leaves_the_vocabulary():
    """Probabilities that sum to a little less or more than 1 in float32."""
    rng = np.random.default_rng(0)
    for size in (300, 49152):
        log_probs = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(8, size)) * 8, jnp.float32))
        tokens, _ = decode.inverse_cdf(jnp.full(8, NEARLY_ONE), jnp.exp(log_probs))
        tokens = np.asarray(tokens)
        assert (tokens < size).all()
        assert (np.asarray(log_probs)[np.arange(8), tokens] > -80).all()


def _kept(logits, top_k: int, top_p: float) -> list[int]:
    out = decode.truncate(jnp.asarray([logits], jnp.float32), top_k, top_p)[0]
    kept = np.flatnonzero(np.isfinite(out))
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(logits, np.float32)[kept])
    return kept.tolist()


def test_truncate_by_hand():
    logits = np.log([0.1, 0.4, 0.05, 0.3, 0.15])
    assert _kept(logits, 0, 1.0) == [0, 1, 2, 3, 4]
    assert _kept(logits, 1, 1.0) == [1]
    assert _kept(logits, 2, 1.0) == [1, 3]
    assert _kept(logits, 5, 1.0) == [0, 1, 2, 3, 4]
    # The smallest set of at least the mass: 0.4 alone is short of 0.5.
    assert _kept(logits, 0, 0.3) == [1]
    assert _kept(logits, 0, 0.5) == [1, 3]
    assert _kept(logits, 0, 0.69) == [1, 3]
    assert _kept(logits, 0, 0.8) == [1, 3, 4]
    assert _kept(logits, 0, 1e-6) == [1]
    # Both: top-k first, and top-p of what is left (4/7, 3/7).
    assert _kept(logits, 2, 0.5) == [1]
    assert _kept(logits, 2, 0.9) == [1, 3]


def test_draw_greedy_tempered_and_truncated():
    logits = jnp.asarray([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, log_probs = decode.draw(logits, keys, temperature=0, top_k=0, top_p=1.0)
    np.testing.assert_array_equal(tokens, [1, 2])
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits)[jnp.arange(2), tokens])
    many = jax.random.split(jax.random.key(1), 4000)
    logits = jnp.broadcast_to(logits[:1], (4000, 3))
    tokens, log_probs = decode.draw(logits, many, temperature=0.5, top_k=2, top_p=1.0)
    assert set(np.asarray(tokens)) == {1, 2}
    share = np.exp(6) / (np.exp(6) + np.exp(4))  # of the truncated distribution
    assert np.mean(np.asarray(tokens) == 1) == pytest.approx(share, abs=0.02)
    # Recorded is the policy's own log-probability, that of softmax(logits / temperature).
    policy = jax.nn.log_softmax(logits[0] / 0.5)
    np.testing.assert_allclose(log_probs, np.asarray(policy)[np.asarray(tokens)], rtol=1e-5)
