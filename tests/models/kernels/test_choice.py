"""How a model is computed changes its numbers by rounding only: dtypes, --remat, --attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax.config import ComputeConfig, RowsConfig, fit_attention
from spa_jax.errors import UserError
from spa_jax.models import lora, transformer, tree
from spa_jax.models.kernels import choice, fused, native, products, xla
from spa_jax.training import memory
from tests import tiny

CONFIG = tiny.tiny_config()
PARAMS = tiny.tiny_params(CONFIG)
SIZES = (50, 61, 17)  # of the trajectories in a row of 128


def _computed(config=CONFIG, **settings):
    compute = ComputeConfig(**{"compute_dtype": "float32"} | settings)
    return dataclasses.replace(config, compute=compute)


def _rows(sizes=SIZES, length=128):
    """One packed row, and the same trajectories in rows of their own; 0 is padding."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 384, n) for n in sizes]
    packed = np.zeros((3, 1, length), np.int32)
    apart = np.zeros((3, len(sizes), length), np.int32)
    start = 0
    for i, (n, ids) in enumerate(zip(sizes, tokens, strict=True)):
        at = slice(start, start + n)
        packed[:, 0, at] = ids, np.arange(n), np.full(n, i + 1)
        apart[:, i, :n] = ids, np.arange(n), np.ones(n)
        start += n
    return packed, apart


def _loss(config, params, rows, weight):
    """(a number that depends on every token, hidden states)."""
    hidden = transformer.hidden_states(config, params, *rows)
    return jnp.sum(
        jnp.where(rows[2][..., None] > 0, hidden.astype(jnp.float32) * weight, 0)
    ), hidden


def _gradient(config, rows, weight):
    made = functools.partial(_loss, config, rows=rows, weight=weight)
    (_, hidden), gradient = jax.jit(jax.value_and_grad(made, has_aux=True))(PARAMS)
    return np.asarray(hidden, np.float32), gradient


def _close(ours, wanted, tolerance):
    """Each array to `tolerance` of its norm."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(wanted), strict=True
    ):
        error = np.linalg.norm(np.asarray(a, np.float32) - np.asarray(b, np.float32))
        assert error <= tolerance * np.linalg.norm(np.asarray(b, np.float32)), (path, error)


# --- attention ----------------------------------------------------------------------------------


def _runs_here(attention):
    """Splash is interpreted where there is no TPU; cuDNN is not."""
    only = {"cudnn": "gpu", "native": "cpu"}.get(attention, jax.default_backend())
    absent = only != jax.default_backend()
    return pytest.param(attention, marks=pytest.mark.skipif(absent, reason=f"needs a {only}"))


@pytest.mark.parametrize(
    "attention", [_runs_here(name) for name in ("xla", "native", "cudnn", "splash")]
)
def test_packed_rows_are_separate_rows(attention):
    """Hidden states, and the gradient of a sum over all of them."""
    dtype, tolerance = ("bfloat16", 2e-2) if attention == "cudnn" else ("float32", 1e-5)
    config = _computed(attention=attention, compute_dtype=dtype)
    packed, apart = _rows()
    weight = np.random.default_rng(1).normal(size=(1, 128, CONFIG.hidden_size))
    weight_apart = np.zeros((len(SIZES), 128, CONFIG.hidden_size))
    starts = np.cumsum([0, *SIZES])
    for i, n in enumerate(SIZES):
        weight_apart[i, :n] = weight[0, starts[i] : starts[i] + n]
    together, gradient = _gradient(config, packed, weight)
    alone, wanted = _gradient(config, apart, weight_apart)
    for i, n in enumerate(SIZES):
        _close(together[0, starts[i] : starts[i] + n], alone[i, :n], tolerance)
    _close(gradient, wanted, tolerance)


@pytest.mark.parametrize("attention", [_runs_here(name) for name in ("native", "cudnn", "splash")])
def test_a_kernel_computes_what_xla_does(attention):
    dtype, tolerance = ("bfloat16", 2e-2) if attention == "cudnn" else ("float32", 1e-5)
    packed, _ = _rows()
    weight = np.random.default_rng(1).normal(size=(1, 128, CONFIG.hidden_size))
    ours = _gradient(_computed(attention=attention, compute_dtype=dtype), packed, weight)
    wanted = _gradient(_computed(compute_dtype=dtype), packed, weight)
    real = packed[2] > 0
    _close(ours[0][real], wanted[0][real], tolerance)
    _close(ours[1], wanted[1], tolerance)


def test_cudnn_is_given_what_it_takes():
    """The arrays' layout and the mask, with a shared prefix, through JAX's own implementation."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 40, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.repeat([[-1, 1, 2, 0]], [5, 15, 12, 8], axis=1).repeat(2, 0))
    mask = transformer.packed_mask(segments)
    ours = fused.cudnn(q, k, v, mask, "xla")
    grouped = q.reshape(2, 40, 2, 2, 8).transpose(0, 2, 3, 1, 4)
    wanted = xla.attend(grouped, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)
    wanted = wanted.transpose(0, 3, 1, 2, 4).reshape(ours.shape)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "dtype", "platform", "words"),
    [
        ("cudnn", "bfloat16", "cpu", "--attention=cudnn runs on gpus.*cpu: use --attention=xla$"),
        ("splash", "float32", "gpu", "--attention=splash runs on tpus.*=xla or cudnn$"),
        ("cudnn", "bfloat16", "tpu", "runs on gpus.*=xla or splash$"),
        ("cudnn", "float32", "gpu", "takes bfloat16.*--compute_dtype=bfloat16 or --attention=xla"),
    ],
)
def test_a_kernel_that_does_not_run_here_is_refused(attention, dtype, platform, words):
    with pytest.raises(UserError, match=words):
        fused.check(attention, dtype, 64, platform)


def test_a_kernel_that_runs_here_is_not():
    fused.check("xla", "float32", 7, "cpu")
    fused.check("cudnn", "bfloat16", 64, "gpu")
    fused.check("splash", "float32", 64, "tpu")
    with pytest.raises(UserError, match="heads of 192"):
        fused.check("cudnn", "bfloat16", 192, "gpu")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"share_prefix": True}, "--share_prefix with --attention=splash.*--noshare_prefix"),
        ({"row_length": 1088}, "--row_length=1088 with --attention=splash.*128"),
        (
            {"partition": "mesh", "mesh": "fsdp:2,tensor:4"},
            "--mesh=fsdp:2,tensor:4 with --attention=splash",
        ),
    ],
)
def test_rows_that_splash_cannot_take_are_refused(rows, words):
    fit = RowsConfig(share_prefix=False)
    fit_attention(ComputeConfig(attention="splash"), fit)
    with pytest.raises(UserError, match=words):
        fit_attention(ComputeConfig(attention="splash"), dataclasses.replace(fit, **rows))
    fit_attention(ComputeConfig(attention="xla"), RowsConfig(**rows))


def test_heads_that_are_cut_take_xla():
    """XLA would compute all heads on every device, in a function that it cannot cut."""
    cut = RowsConfig(partition="mesh", mesh="tensor:2")
    assert fit_attention(ComputeConfig(), cut).attention == "xla"
    with pytest.raises(UserError, match="--mesh=tensor:2 with --attention=native"):
        fit_attention(ComputeConfig(attention="native"), cut)
    for whole in (RowsConfig(), RowsConfig(partition="mesh", mesh="fsdp:2")):
        assert fit_attention(ComputeConfig(), whole).attention == "auto"
        assert fit_attention(ComputeConfig(attention="native"), whole).attention == "native"


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["dots", "attention", "layer"])
def test_what_is_computed_again_is_the_same(remat):
    packed, _ = _rows()
    weight = np.random.default_rng(1).normal(size=(1, 128, CONFIG.hidden_size))
    ours = _gradient(_computed(remat=remat), packed, weight)
    wanted = _gradient(_computed(), packed, weight)
    _close(ours[0], wanted[0], 1e-6)
    _close(ours[1], wanted[1], 1e-5)


def test_adapters_can_be_computed_again():
    """Their matrices are put into the tree, not declared by the module."""
    settings = tiny_lora = lora.LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
    adapter = lora.init(settings, PARAMS, jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    packed, _ = _rows()

    def gradient(config):
        def loss(adapter):
            tree = lora.attach(tiny_lora, PARAMS, adapter)
            return jnp.sum(jnp.sin(transformer.hidden_states(config, tree, *packed)))

        return jax.jit(jax.grad(loss))(adapter)

    _close(gradient(_computed(remat="layer")), gradient(_computed()), 1e-5)


def test_each_choice_keeps_less_than_the_one_before():
    rows = RowsConfig(row_length=128, policy_slots=128, rows_per_device=2)
    kept = [
        memory.residual_bytes(_computed(remat=remat), rows)
        for remat in ("none", "dots", "attention", "layer")
    ]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    # The last keeps each layer's input, for 2 layers and 256 tokens, and some of what is outside.
    inputs = 2 * 256 * CONFIG.hidden_size * 4
    assert inputs <= kept[-1] <= 4 * inputs


# --- dtypes -------------------------------------------------------------------------------------


def test_auto_is_bfloat16_on_accelerators_only():
    assert ComputeConfig().resolved("cpu").compute_dtype == "float32"
    assert ComputeConfig().resolved("gpu").compute_dtype == "bfloat16"
    assert ComputeConfig().resolved("tpu").compute_dtype == "bfloat16"
    assert ComputeConfig(compute_dtype="float32").resolved("gpu").compute_dtype == "float32"


def test_bfloat16_rounds_and_no_more():
    """Three digits of hidden states; a float32 weight's gradient stays float32."""
    packed, _ = _rows()
    weight = np.random.default_rng(1).normal(size=(1, 128, CONFIG.hidden_size))
    hidden, gradient = _gradient(_computed(compute_dtype="bfloat16"), packed, weight)
    exact, wanted = _gradient(_computed(), packed, weight)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert np.abs(hidden - exact).max() > 1e-4, "nothing was rounded"
    _close(hidden, exact, 2e-2)
    _close(gradient, wanted, 6e-2)
    logits = transformer.logits(PARAMS, jnp.asarray(hidden, jnp.bfloat16))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_products_of_bfloat16_factors_round_them_and_nothing_else(remat):
    packed, _ = _rows()
    weight = np.random.default_rng(2).normal(size=(1, 128, CONFIG.hidden_size))
    config = _computed(matmul_dtype="bfloat16", remat=remat)
    hidden, gradient = _gradient(config, packed, weight)
    exact, wanted = _gradient(_computed(remat=remat), packed, weight)
    assert hidden.dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert np.abs(hidden - exact).max() > 1e-4, "nothing was rounded"
    _close(hidden, exact, 1e-2)
    _close(gradient, wanted, 3e-2)


def test_a_product_of_rounded_factors_is_that_of_rounded_arrays():
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = ((2, 3, 4), (4, 5), (2, 3, 5))
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    y, backward = jax.vjp(lambda x, w: products.matmul(x, w, "bfloat16"), x, w)
    x, w, rounded = (np.float32(np.asarray(a).astype(jnp.bfloat16)) for a in (x, w, g))
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    dx, dw = backward(g)
    np.testing.assert_allclose(dx, rounded @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("btn,btm->nm", x, rounded), rtol=1e-5, atol=1e-5)


def test_the_sampler_rounds_the_factors_that_the_trainer_rounds():
    config = _computed(matmul_dtype="bfloat16")
    layers = tree.unstack(PARAMS, config.dtype, config.matmul_dtype)
    kernels = [layer[k]["transposed"] for layer in layers["layers"] for k in ("q", "o", "down")]
    assert {x.dtype for x in kernels} == {jnp.dtype("bfloat16")}
    assert layers["embed"]["embedding"].dtype == jnp.float32
    tokens = np.random.default_rng(1).integers(0, 384, (2, 9)).astype(np.int32)
    at = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    cache = transformer.empty_cache(config, 2, 12)
    ours, _ = transformer.cached_hidden_states(config, layers, tokens, at, cache)
    wanted = transformer.hidden_states(config, PARAMS, tokens, at, np.ones_like(tokens))
    exact = transformer.hidden_states(_computed(), PARAMS, tokens, at, np.ones_like(tokens))
    # A sum in another order may round the next factor the other way, and that is all.
    assert np.abs(ours - wanted).max() < np.abs(exact - wanted).max()
    _close(ours, wanted, 1e-2)


def test_auto_rounds_factors_where_the_processor_has_products_of_them(monkeypatch):
    for has, wanted in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(native, "multiplies_bfloat16", lambda has=has: has)
        config = choice.resolve(CONFIG, ComputeConfig(matmul_dtype="auto"))
        assert (config.dtype, config.matmul_dtype) == ("float32", wanted)
    assert ComputeConfig(matmul_dtype="auto").resolved("gpu").matmul_dtype == "compute"


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_in_the_cache_too(tied):
    """The sampler's weights, cast once, and its cache give what packed rows give."""
    config = _computed(tiny.tiny_config(tied), compute_dtype="bfloat16")
    params = tiny.tiny_params(config)
    layers = tree.unstack(params, config.dtype)
    matrices = [x for x in jax.tree.leaves(layers) if x.ndim > 1]
    assert {x.dtype for x in matrices} == {jnp.dtype("bfloat16")}
    cache = transformer.empty_cache(config, 2, 12)
    assert cache[0][0].dtype == jnp.bfloat16
    tokens = np.random.default_rng(1).integers(0, 384, (2, 9)).astype(np.int32)
    at = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    ours, _ = transformer.cached_hidden_states(config, layers, tokens, at, cache)
    wanted = transformer.hidden_states(config, params, tokens, at, np.ones_like(tokens))
    assert ours.dtype == wanted.dtype == jnp.bfloat16
    _close(ours, wanted, 2e-2)
