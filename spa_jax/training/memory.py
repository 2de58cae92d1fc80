"""What a stage needs of each device's memory, worked out without any weights.

    need = parameters + gradients + optimizer + reference + gathered + activations + logits + cache

What the backward pass keeps is not a formula: the forward pass is traced on shapes, as training
runs it, and the arrays that JAX would keep are added up.  So --remat, --attention, dtypes and
adapters count as they are.  What XLA makes beside them, inside a layer, it frees and reuses; a
tenth more or less than its own analysis is to be expected (tests/training/test_memory.py), and an
allocator wants some room too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from spa_jax.config import LoraConfig, RowsConfig, SamplingConfig
from spa_jax.models import lora as lora_lib
from spa_jax.models import transformer, tree
from spa_jax.models.config import ModelConfig, Params
from spa_jax.training import forward as forward_lib
from spa_jax.training import partition

_FLOAT32 = 4  # bytes
_MOMENTS = 2  # of AdamW
# Arrays of [slots, vocabulary] float32 that live at once where log-probabilities are made.
_LOGITS_UPDATE, _LOGITS_FORWARD = 3, 2
_NO_LORA = LoraConfig()


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes a device, by what they are for.

    Attributes:
      parameters: the weights, trained and frozen.
      gradients: of an update, as they are added up, and of one microbatch.
      optimizer: AdamW's moments, and the average of the weights.
      reference: a second set of weights for the reference policy. There is none: its
        log-probabilities are on the episodes (`annotate`), and adapters can be left out.
      gathered: weights that a mesh has brought together for use, and their gradient.
      activations: what the backward pass reads, or a forward pass has in a layer, or an engine
        has at its start only.
      logits: over the vocabulary.
      cache: keys and values of the conversations being played.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    reference: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(dataclasses.astuple(self)))


def update(
    config: ModelConfig,
    rows: RowsConfig,
    lora: LoraConfig,
    *,
    train_layers: int = 0,
    fsdp: int = 1,
    averaged: bool = False,
) -> Need:
    """An update of SFT, of PPO, or of an estimator with adapters.

    Args:
      config: the model, as it is computed.
      rows: the static shape of a microbatch.
      lora: adapters; rank 0: none.
      train_layers: as in `tree.split`; 0: all.
      fsdp: how many devices share each parameter (1 under pmap).
      averaged: whether the weights' average is kept too (`state.averaged`).

    Raises:
      UserError: the model has no layer left to freeze.
    """
    trained, frozen = split(config, lora, train_layers)
    compute = config.compute
    param, accum = (jnp.dtype(d).itemsize for d in (compute.param_dtype, compute.accum_dtype))
    if lora.rank:
        param = _FLOAT32  # adapters are small
    kept = kept_bytes(config, rows, lora, train_layers)
    # What is not kept is made again, one layer's at a time.
    kept += layer_bytes(config, rows, "none") - layer_bytes(config, rows, compute.remat)
    chunk = forward_lib.projected_at_once(compute.logits_chunk, rows.slots)
    count = functools.partial(_elements, fsdp=fsdp)
    return Need(
        parameters=count(trained) * param + count(frozen) * _width(config),
        gradients=count(trained) * (accum + param),
        optimizer=count(trained) * (_MOMENTS + averaged) * _FLOAT32,
        gathered=_gathered(config, trained, lora) if fsdp > 1 else 0.0,
        activations=kept,
        logits=_LOGITS_UPDATE * chunk * config.vocab_size * _FLOAT32,
    )


def forward(config: ModelConfig, rows: RowsConfig) -> Need:
    """The pass over episodes that the estimator, annotation and the critic read; whole weights."""
    chunk = forward_lib.projected_at_once(config.compute.logits_chunk, rows.slots)
    return Need(
        parameters=_elements(shapes(config)) * _FLOAT32,
        activations=layer_bytes(config, rows),
        logits=_LOGITS_FORWARD * chunk * config.vocab_size * _FLOAT32,
    )


def exploration(config: ModelConfig, sampling: SamplingConfig) -> Need:
    """The generation engine: its weights come as float32, and are cast before anything is played.

    What those need beyond cache and logits is told under `activations`.
    """
    weights = _elements(shapes(config)) * _width(config)
    cache = jax.eval_shape(
        lambda: transformer.empty_cache(config, sampling.slots, sampling.context_length)
    )
    logits = _LOGITS_FORWARD * sampling.slots * config.vocab_size * _FLOAT32
    came = _elements(shapes(config)) * _FLOAT32
    return Need(
        parameters=weights,
        activations=max(0.0, came - logits - _bytes(cache)),
        logits=logits,
        cache=_bytes(cache),
    )


@functools.cache  # stages, and tables of several devices, ask for the same
def kept_bytes(
    config: ModelConfig, rows: RowsConfig, lora: LoraConfig = _NO_LORA, train_layers: int = 0
) -> float:
    """What the forward pass of a microbatch keeps for the backward pass."""
    trained, frozen = split(config, lora, train_layers)

    def forwards(trained: Params, frozen: Params, ids: jax.Array) -> Any:
        def hidden(trained: Params) -> jax.Array:
            if lora.rank:
                policy = lora_lib.attach(lora, frozen, trained)
                return transformer.hidden_states(config, policy, ids, ids, ids)
            if frozen:
                below = jnp.zeros((*ids.shape, config.hidden_size), config.dtype)
                return transformer.hidden_states(config, trained, ids, ids, ids, below=below)
            return transformer.hidden_states(config, trained, ids, ids, ids)

        return jax.vjp(hidden, trained)[1]

    # Weights are kept too, as they are: two rows less one row is what a row adds.
    one, two = (
        _bytes(jax.eval_shape(forwards, trained, frozen, _ids(count, rows.row_length)))
        for count in (1, 2)
    )
    return float(two - one) * rows.rows_per_device


def layer_bytes(config: ModelConfig, rows: RowsConfig, remat: str = "none") -> float:
    """What one layer keeps; with --remat=none, about what it has in memory at once."""
    compute = dataclasses.replace(config.compute, remat=remat)
    one = dataclasses.replace(config, num_layers=1, compute=compute)
    return kept_bytes(one, rows)


def split(config: ModelConfig, lora: LoraConfig, train_layers: int) -> tuple[Params, Params]:
    """(trained, frozen) shapes, as `training.parts` cuts a model."""
    every = shapes(config)
    if lora.rank:
        make = functools.partial(lora_lib.init, lora)
        return jax.eval_shape(make, every, jax.random.key(0)), every
    split = functools.partial(tree.split, config, train_layers=train_layers)
    return jax.eval_shape(split, every)


def shapes(config: ModelConfig) -> Params:
    """The parameters' shapes; nothing is allocated."""
    return jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))


def _ids(rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)


def _elements(tree: Params, fsdp: int = 1) -> float:
    """Numbers a device of a tree that `fsdp` devices share as `partition.Mesh` cuts it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return float(sum(
        leaf.size / (1 if partition.cut_axis(path, leaf.shape, fsdp) is None else fsdp)
        for path, leaf in leaves
    ))  # fmt: skip


def _bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _width(config: ModelConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(config.dtype).itemsize


def _gathered(config: ModelConfig, trained: Params, lora: LoraConfig) -> float:
    """A layer's weights and the embedding, whole, as a mesh uses them, with their gradients."""
    every = shapes(config)
    layer = _elements(every["layers"]) / config.num_layers
    outside = _elements(every) - _elements(every["layers"])
    return (layer + outside) * (_width(config) + (0 if lora.rank else _FLOAT32))
