"""Which kernels compute a model on this machine: decided once, before anything is compiled."""

import dataclasses

import jax

from spa_jax.config import DEFAULT_COMPUTE, ComputeConfig
from spa_jax.models.config import ModelConfig
from spa_jax.models.kernels import fused, native


def without_auto(compute: ComputeConfig) -> ComputeConfig:
    """What `auto` is on an accelerator: attention by XLA, and products in --compute_dtype."""
    attention = "xla" if compute.attention == "auto" else compute.attention
    dtype = "compute" if compute.matmul_dtype == "auto" else compute.matmul_dtype
    return dataclasses.replace(compute, attention=attention, matmul_dtype=dtype)


def resolve(config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE) -> ModelConfig:
    """The model as it is computed on this machine.

    Args:
      config: the model's shape; how it says that it is computed is passed over.
      compute: what was asked for, `auto` among it.

    Returns:
      `config` with a `compute` that says no `auto`.

    Raises:
      UserError: the attention asked for does not run here.
    """
    platform = jax.default_backend()
    compute = compute.resolved(platform)
    kind = (compute.compute_dtype, config.head_dim, platform)
    if compute.attention == "auto":
        compute = dataclasses.replace(compute, attention="native" if native.runs(*kind) else "xla")
    elif compute.attention == "native":
        native.check(*kind)
    else:
        fused.check(compute.attention, *kind)
    if compute.matmul_dtype == "auto":
        compute = dataclasses.replace(
            compute, matmul_dtype="bfloat16" if native.multiplies_bfloat16() else "compute"
        )
    return dataclasses.replace(config, compute=compute)
