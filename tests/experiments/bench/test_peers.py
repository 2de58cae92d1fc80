"""The PyTorch side of the comparisons: the same numbers, or an error that says what to install."""

import importlib
import types

import jax
import numpy as np
import pytest

from experiments.bench import peers
from spa_jax import batching
from spa_jax.errors import UserError
from spa_jax.training import forward
from tests import tiny


def test_a_missing_peer_is_an_error_that_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="needs torch, .*make setup-peers"):
        peers.torch()


def test_a_pytorch_without_cuda_is_refused_where_jax_computes_on_a_gpu(monkeypatch):
    cpu_only = types.SimpleNamespace(
        set_num_threads=lambda n: None, cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: cpu_only)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cpu"):
        peers.torch()


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_what_our_model_does_on_packed_rows(tied):
    """Several trajectories a row, with the prefix that they share once."""
    pytest.importorskip("torch")
    config = tiny.tiny_config(tied)
    params = jax.device_get(tiny.random_params(config))
    params = jax.tree.map(lambda x: 0.1 * x, params)
    rng = np.random.default_rng(0)
    played = [tiny.random_trajectory(rng, f"t{i}") for i in range(5)]
    rows = batching.pack(played, row_length=64, policy_slots=32, step_slots=16, share_prefix=True)
    ours = jax.jit(forward.score, static_argnums=0, static_argnames="temperature")(
        config, {"policy": params}, rows, temperature=0.7
    )["log_probs"]
    theirs = peers.log_probs(peers.model(config, params), rows, 0.7).detach().numpy()
    used = rows.token_mask > 0
    np.testing.assert_allclose(theirs[used], np.asarray(ours)[used], atol=2e-5)
