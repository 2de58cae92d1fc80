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
import re
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.config import LoraConfig, Target

Params = Any  # a pytree of arrays

# Ours -> Hugging Face's name in a layer.
MODULES: dict[Target, str] = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_PEFT = re.compile(r"model\.layers\.(\d+)\.(.+)\.lora_([AB])\.(?:default\.)?weight")


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
      A tree that shares every leaf of `params`; `transformer.Linear` reads lora_a and lora_b,
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


def from_peft(tensors: Mapping[str, np.ndarray]) -> Params:
    """An adapter from PEFT's tensors; names that are not of an adapter are passed over.

    Args:
      tensors: "...model.layers.0.self_attn.q_proj.lora_A.default.weight" -> [r, in],
        "...lora_B.default.weight" -> [out, r].

    Raises:
      ValueError: a module that is none of `MODULES`, or layers that are not 0, 1, 2, ...
    """
    ours = {hugging_face: name for name, hugging_face in MODULES.items()}
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for tensor, array in tensors.items():
        match = _PEFT.search(tensor)
        if not match:
            continue
        layer, module, letter = match.groups()
        if module not in ours:
            raise ValueError(f"{tensor}: an adapter of {module} is not supported")
        leaves = found.setdefault(ours[module], {"a": {}, "b": {}})
        leaves[letter.lower()][int(layer)] = array.T
    for name, leaves in found.items():
        for leaf, layers in leaves.items():
            if sorted(layers) != list(range(len(leaves["a"]))):
                raise ValueError(f"the adapter of {name} lacks {leaf} of some layer")
    return {
        "layers": {
            name: {
                leaf: np.stack([layers[i] for i in range(len(layers))])
                for leaf, layers in found[name].items()
            }
            for name in MODULES
            if name in found
        }
    }


def to_peft(adapter: Params) -> dict[str, np.ndarray]:
    """PEFT's tensors of an adapter: "model.layers.0.self_attn.q_proj.lora_A.default.weight"."""
    tensors = {}
    for name, leaves in adapter["layers"].items():
        for leaf, stacked in leaves.items():
            for i, array in enumerate(np.asarray(stacked)):
                key = f"model.layers.{i}.{MODULES[name]}.lora_{leaf.upper()}.default.weight"
                tensors[key] = array.T
    return tensors


def targets_of(modules: Sequence[str]) -> tuple[Target, ...]:
    """Our names of PEFT's `target_modules`, such as "q_proj".

    Raises:
      ValueError: a module that is none of `MODULES`.
    """
    ours = {hugging_face.split(".")[-1]: name for name, hugging_face in MODULES.items()}
    unknown = sorted(set(modules) - set(ours))
    if unknown:
        raise ValueError(f"an adapter of {unknown[0]} is not supported ({', '.join(ours)} are)")
    return tuple(ours[module] for module in modules)


def modules_of(targets: Sequence[Target]) -> list[str]:
    """PEFT's names of our `targets`, as `targets_of` reads them."""
    return [MODULES[name].split(".")[-1] for name in targets]
