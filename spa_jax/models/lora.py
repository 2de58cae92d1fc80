"""Low-rank adapters: W + (alpha / rank) B A, with W frozen (LoRA, arXiv 2106.09685).

An adapter is a tree of its own beside the decoder's, for the matrices that it changes:

    layers/q/a  [N, D, r]      layers/q/b  [N, r, H*K]      and so on for k, v, o, gate, up, down

so a and b are PEFT's A and B transposed, as kernels are [in, out].  Training computes
x W + (x A) (alpha / r) B, from `attach`: no derivative of W is made, nor a second W, and the
base weights are those of the reference policy.  `merge` adds the product to W once and for all:
sampling then costs what the base's does.

N layers, D hidden, r rank; the other sizes are those of `models.transformer`.
"""

import math

import chex
import jax
import jax.numpy as jnp

from spa_jax.config import LoraConfig
from spa_jax.models.config import Params


def init(config: LoraConfig, params: Params, key: chex.PRNGKey) -> Params:
    """A new adapter, which changes nothing: a is random, b is 0.

    a is uniform in +-1/sqrt(n) for n inputs, as PEFT makes it (Kaiming, a = sqrt(5)).

    Args:
      config: the adapter's shape.
      params: the decoder's tree, for the sizes.
      key: the random key.
    """
    layers = {}
    for name, one in zip(config.targets, jax.random.split(key, len(config.targets)), strict=True):
        count, inputs, units = params["layers"][name]["kernel"].shape
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(one, (count, inputs, config.rank), minval=-bound, maxval=bound)
        layers[name] = {"a": a, "b": jnp.zeros((count, config.rank, units), a.dtype)}
    return {"layers": layers}


def attach(config: LoraConfig, params: Params, adapter: Params) -> Params:
    """The decoder's tree with the adapter beside the kernels, for the forward pass.

    Args:
      config: the adapter's shape.
      params: the decoder's tree.
      adapter: of `init`; differentiable.

    Returns:
      A tree that shares every leaf of `params`; `layers.Linear` reads lora_a and lora_b,
      which is (alpha / r) b.
    """
    layers = dict(params["layers"])
    for name, pair in adapter["layers"].items():
        chex.assert_rank([pair["a"], pair["b"]], 3)
        beside = {"lora_a": pair["a"], "lora_b": config.scale * pair["b"]}
        layers[name] = {**layers[name], **beside}
    return {**params, "layers": layers}


def merge(config: LoraConfig, params: Params, adapter: Params) -> Params:
    """The decoder's tree with kernel + (alpha / r) a b for every matrix of the adapter.

    Args:
      config: the adapter's shape.
      params: the decoder's tree.
      adapter: of `init`; differentiable.

    Returns:
      A tree as `params`; what the adapter does not change is shared.
    """
    layers = dict(params["layers"])
    for name, pair in adapter["layers"].items():
        chex.assert_rank([pair["a"], pair["b"]], 3)
        kernel = layers[name]["kernel"]
        product = jnp.einsum("nir,nro->nio", pair["a"], pair["b"], precision="highest")
        changed = kernel + (config.scale * product).astype(kernel.dtype)
        layers[name] = {**layers[name], "kernel": changed}
    return {**params, "layers": layers}
