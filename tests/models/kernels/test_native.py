"""The C++ attention gives what `xla.attend` gives, whatever the shapes and masks."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.batching import SHARED
from spa_jax.config import ComputeConfig
from spa_jax.errors import UserError
from spa_jax.models import transformer, tree
from spa_jax.models.kernels import native, xla
from tests import tiny

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs a CPU")


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _packed_by_xla(q, k, v, segment_ids):
    batch, length, heads = k.shape[:3]
    grouped = q.reshape(batch, length, heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    mask = transformer.packed_mask(segment_ids)
    out = xla.attend(grouped, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def test_it_is_compiled_here():
    """Else every run here would take XLA's attention, and only a log line would say so."""
    assert native.why_not() is None


@pytest.mark.parametrize(
    "runs",
    [
        [(1, 1)],
        [(1, 7)],
        [(1, 33), (0, 15)],
        [(SHARED, 5), (1, 20), (2, 64), (3, 1), (0, 7)],
        [(SHARED, 17), (1, 100), (2, 31)],
        [(1, 31), (2, 32), (3, 33), (0, 40)],
        [(SHARED, 40)],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(4, 2, 16), (3, 1, 64), (2, 2, 80), (4, 1, 24), (2, 1, 8)]
)
def test_packed_rows(runs, heads, groups, size):
    """Outputs, padding's too, and all three gradients; two rows, the second one unpacked."""
    row = [segment for segment, count in runs for _ in range(count)]
    segment_ids = jnp.asarray([row, [1] * len(row)], jnp.int32)
    q = _normal(0, 2, len(row), heads, size)
    k, v = _normal(1, 2, len(row), groups, size), _normal(2, 2, len(row), groups, size)
    weight = _normal(3, *q.shape)

    def both(function):
        def weighed(q, k, v):
            out = function(q, k, v, segment_ids)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)

    (_, ours), gradients = both(native.packed)
    (_, wanted), wanted_gradients = both(_packed_by_xla)
    np.testing.assert_allclose(ours, wanted, atol=2e-6)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("places", [48, 37, 5])
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(4, 2, 16), (9, 3, 64), (4, 1, 24), (2, 1, 8)]
)
def test_cached(places, length, heads, groups, size):
    """Every slot at its own place, two rows of one slot, one of padding, positions of padding."""
    q = _normal(0, 4, length, heads, size)
    k, v = _normal(1, 6, groups, size, places), _normal(2, 6, groups, places, size)
    rows = jnp.asarray([5, 2, 2, 6], jnp.int32)
    starts = jnp.asarray([0, places // 2, 1, 0], jnp.int32)[:, None]
    positions = jnp.minimum(starts + jnp.arange(length), places)
    ours = jax.jit(native.cached)(q, k, v, positions, rows)
    grouped = q.reshape(4, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    seen = jnp.arange(places) <= positions[:, :, None]
    k, v = k.at[rows].get(mode="clip"), v.at[rows].get(mode="clip")
    wanted = xla.attend(grouped, k, v, seen).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    real = (positions < places) & (rows < 6)[:, None]
    np.testing.assert_allclose(ours, jnp.where(real[..., None, None], wanted, 0), atol=2e-6)


def test_large_scores_stay_finite():
    """Differences of 1e4 between scores: the largest takes all, and nothing overflows."""
    q, k, v = (100 * _normal(i, 1, 50, 2, 16) for i in range(3))
    segment_ids = jnp.ones((1, 50), jnp.int32)
    gradient = jax.grad(lambda q: jnp.sum(native.packed(q, k, v, segment_ids)))(q)
    np.testing.assert_allclose(
        native.packed(q, k, v, segment_ids), _packed_by_xla(q, k, v, segment_ids), rtol=1e-4
    )
    assert np.isfinite(gradient).all()


def test_what_is_not_seen_is_not_read():
    """NaN in keys and values of other segments and later places touches nothing."""
    segment_ids = jnp.asarray([[1] * 20 + [2] * 20], jnp.int32)
    q, k, v = (_normal(i, 1, 40, 2, 16) for i in range(3))
    broken = native.packed(q, k.at[:, 20:].set(jnp.nan), v.at[:, 20:].set(jnp.nan), segment_ids)
    np.testing.assert_array_equal(broken[:, :20], native.packed(q, k, v, segment_ids)[:, :20])


def test_a_row_does_not_depend_on_its_company():
    """Bit for bit: a result depends neither on the other rows nor on which thread made it."""
    q = _normal(0, 8, 1, 4, 16)
    k, v = _normal(1, 8, 2, 16, 64), _normal(2, 8, 2, 64, 16)
    positions = jnp.arange(8, dtype=jnp.int32)[:, None] * 7
    rows = jnp.arange(8, dtype=jnp.int32)
    together = native.cached(q, k, v, positions, rows)
    for i in range(8):
        alone = native.cached(q[i : i + 1], k, v, positions[i : i + 1], rows[i : i + 1])
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_the_decoder_is_the_same_by_both():
    """Training's rows and sampling's cache."""
    config = tiny.tiny_config()
    ours = dataclasses.replace(
        config,
        compute=ComputeConfig(compute_dtype="float32", attention="native"),
    )
    params = tiny.tiny_params(config)
    tokens = np.random.default_rng(0).integers(0, 384, (2, 30)).astype(np.int32)
    positions = np.broadcast_to(np.arange(30, dtype=np.int32), tokens.shape)
    row = (tokens, positions, np.ones_like(tokens))
    wanted = transformer.hidden_states(config, params, *row)
    np.testing.assert_allclose(transformer.hidden_states(ours, params, *row), wanted, atol=2e-5)
    layers = tree.unstack(params)
    cache, parts = transformer.empty_cache(ours, 2, 32), []
    for start, end in itertools.pairwise([0, 20, 29, 30]):
        at = slice(start, end)
        hidden, cache = transformer.cached_hidden_states(
            ours, layers, tokens[:, at], positions[:, at], cache
        )
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (("float32", 16, "gpu"), "computes on a gpu"),
        (("bfloat16", 16, "cpu"), "takes float32.*this is bfloat16"),
        (("float32", 20, "cpu"), "multiple of 8.*heads of 20"),
    ],
)
def test_what_it_cannot_compute_is_refused(kind, words):
    with pytest.raises(UserError, match=f"--attention=native: .*{words}.*--attention=auto"):
        native.check(*kind)
    assert not native.runs(*kind)
    native.check("float32", 64, "cpu")


@pytest.mark.parametrize(
    ("compiler", "words"), [("/bin/false", "was not compiled"), ("no-such-c++", "no-such-c")]
)
def test_without_a_compiler_xla_does_it(tmp_path, compiler, words):
    """A process of its own: which attention is found once."""
    program = (
        "from tests import tiny; from spa_jax.models.kernels import choice, native;"
        "print(choice.resolve(tiny.tiny_config()).compute.attention, native.why_not())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=pathlib.Path(__file__).parents[3],
        env={
            "PATH": "/usr/bin:/bin",
            "CXX": compiler,
            "XDG_CACHE_HOME": str(tmp_path),
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla native.cc was not compiled") and words in done.stdout
    assert "attention is XLA's" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
