"""Weights on their way to a device: what arrives, and what lies there at once."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from spa_jax.config import ComputeConfig
from spa_jax.models import tree
from spa_jax.sampling import weights
from spa_jax.sampling.placement import Placement
from tests import tiny

PARAMS = tiny.random_params(tiny.UNTIED)


def _config(**compute):
    return dataclasses.replace(tiny.UNTIED, compute=ComputeConfig(**compute))


@pytest.mark.parametrize(
    "compute",
    [
        {"compute_dtype": "float32"},
        {"compute_dtype": "bfloat16"},
        {"compute_dtype": "float32", "matmul_dtype": "bfloat16"},
    ],
    ids=["float32", "bfloat16", "rounded factors"],
)
@pytest.mark.parametrize("where", ["host", "device"])
def test_they_are_those_of_one_cast(compute, where):
    config, params = _config(**compute), PARAMS
    if where == "device":
        params = jax.device_put(params, jax.local_devices()[1])
    placed = weights.place(config, params, Placement((jax.local_devices()[2],)))
    wanted = tree.unstack(jax.device_put(PARAMS), config.dtype, config.matmul_dtype)
    assert all(x.devices() == {jax.local_devices()[2]} for x in jax.tree.leaves(placed))
    assert jax.tree.map(lambda x: x.dtype, placed) == jax.tree.map(lambda x: x.dtype, wanted)
    tiny.assert_same(jax.device_get(placed), jax.device_get(wanted))


class _Watched(np.ndarray):
    """Looks, whenever a layer is cut off it, at the matrices that lie on a device."""

    device = jax.local_devices()[3]
    seen: list[set[str]] = []

    def __getitem__(self, index):
        gc.collect()
        live = [x for x in jax.live_arrays() if self.device in x.devices() and x.ndim > 1]
        self.seen.append({str(x.dtype) for x in live})
        return np.asarray(super().__getitem__(index))


def test_the_device_never_holds_the_weights_in_two_types():
    """At no layer do the matrices of an earlier one lie there as they came."""
    params = PARAMS | {"layers": jax.tree.map(lambda x: x.view(_Watched), PARAMS["layers"])}
    placed = weights.place(_config(compute_dtype="bfloat16"), params, Placement((_Watched.device,)))
    assert len(_Watched.seen) == 2 * len(jax.tree.leaves(PARAMS["layers"]))
    # Of the layer that is being cut nothing has been sent yet: only cast ones lie there.
    assert all(types == {"bfloat16"} for types in _Watched.seen)
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(placed) if x.ndim > 1)
