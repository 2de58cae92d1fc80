"""What a stage needs of each device's memory, worked out without any weights.

    need = parameters + gradients + optimizer + gathered + activations + logits + cache

What is saved for the backward pass (JAX's residuals) is not a formula: the forward pass is traced
on shapes, as training runs it, and the arrays that JAX would save are added up.  So --remat,
--attention, dtypes and adapters count as they are.  What XLA makes beside them, inside a layer, it
frees and reuses; a tenth more or less than its own analysis is to be expected
(tests/training/test_memory.py), and an allocator wants some room too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from spa_jax.config import LoraConfig, Remat, RowsConfig, SamplingConfig
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

    A reference policy needs none: its log-probabilities are on the episodes (`annotate`).

    Attributes:
      parameters: the weights, trained and frozen.
      gradients: of an update, as they are added up, and of one microbatch.
      optimizer: AdamW's moments, and the average of the weights.
      gathered: weights that a mesh has brought together for use, and their gradient.
      activations: what the backward pass reads, or a forward pass has in a layer, or an engine
        has at its start only.
      logits: over the vocabulary.
      cache: keys and values of the conversations being played.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
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
      averaged: whether there is an average of the weights too (`state.averaged`).

    Raises:
      UserError: the model has no layer left to freeze.
    """
    trained, frozen = split(config, lora, train_layers)
    compute = config.compute
    param = jnp.dtype(compute.param_dtype).itemsize
    if lora.rank:
        param = _FLOAT32  # adapters are small
    saved = residual_bytes(config, rows, lora, train_layers)
    # What is not saved is made again, one layer's at a time.
    saved += layer_bytes(config, rows, "none") - layer_bytes(config, rows, compute.remat)
    chunk = forward_lib.projected_at_once(compute.logits_chunk, rows.slots)
    count = functools.partial(_elements, fsdp=fsdp)
    return Need(
        parameters=count(trained) * param + count(frozen) * _width(config),
        gradients=count(trained) * (_FLOAT32 + param),
        optimizer=count(trained) * (_MOMENTS + averaged) * _FLOAT32,
        gathered=_gathered(config, trained, lora) if fsdp > 1 else 0.0,
        activations=saved,
        logits=_LOGITS_UPDATE * chunk * config.vocab_size * _FLOAT32,
    )


def forward(config: ModelConfig, rows: RowsConfig) -> Need:
    """The pass over episodes that the estimator, annotation and the critic read; all weights."""
    chunk = forward_lib.projected_at_once(config.compute.logits_chunk, rows.slots)
    return Need(
        parameters=_elements(shapes(config)) * _FLOAT32,
        activations=layer_bytes(config, rows),
        logits=_LOGITS_FORWARD * chunk * config.vocab_size * _FLOAT32,
    )


def exploration(config: ModelConfig, sampling: SamplingConfig, prefill_tokens: int = 0) -> Need:
    """The generation engine.

    Its weights are cast layer by layer before the cache is allocated and anything is played
    (`sampling.weights`).  Where one float32 layer is larger than cache and logits, the difference
    is counted under `activations`: it is what the engine needs at its start only.  So is what the
    scores of the largest prefill call need beyond the logits; the two are never there at once.

    Args:
      config: the model, as it is computed.
      sampling: the slots of a device, their context and their cache.
      prefill_tokens: of the largest call that reads; 0 leaves its scores out.
    """
    weights = _elements(shapes(config)) * _width(config)
    sizes, dtype = (sampling.slots, sampling.context_length), sampling.cache_dtype or None
    cache = jax.eval_shape(lambda: transformer.empty_cache(config, *sizes, dtype))
    logits = _LOGITS_FORWARD * sampling.slots * config.vocab_size * _FLOAT32
    layer = _elements(shapes(config)["layers"]) / config.num_layers * _FLOAT32
    # Scores and their softmax, over the whole context.
    scores = 2 * prefill_tokens * config.num_heads * sampling.context_length * _FLOAT32
    return Need(
        parameters=weights,
        activations=max(0.0, layer - logits - _bytes(cache), scores - logits),
        logits=logits,
        cache=_bytes(cache),
    )


@functools.cache  # the stages, and the tables of several devices, ask for the same numbers
def residual_bytes(
    config: ModelConfig, rows: RowsConfig, lora: LoraConfig = _NO_LORA, train_layers: int = 0
) -> float:
    """What the forward pass of a microbatch saves for the backward pass."""
    trained, frozen = split(config, lora, train_layers)

    def forwards(trained: Params, frozen: Params, ids: jax.Array) -> Any:
        def hidden(trained: Params) -> jax.Array:
            if lora.rank:
                policy = lora_lib.attach(lora, frozen, trained)
                return transformer.hidden_states(config, policy, ids, ids, ids)
            if frozen:
                lower = jnp.zeros((*ids.shape, config.hidden_size), config.dtype)
                return transformer.hidden_states(config, trained, ids, ids, ids, lower_states=lower)
            return transformer.hidden_states(config, trained, ids, ids, ids)

        return jax.vjp(hidden, trained)[1]

    # The weights are among the residuals, once for any number of rows: the difference of two rows
    # and one row is what a row adds.
    one, two = (
        _bytes(jax.eval_shape(forwards, trained, frozen, _ids(count, rows.row_length)))
        for count in (1, 2)
    )
    return float(two - one) * rows.rows_per_device


def layer_bytes(config: ModelConfig, rows: RowsConfig, remat: Remat = "none") -> float:
    """What one layer saves; with --remat=none, about what it has in memory at once."""
    compute = dataclasses.replace(config.compute, remat=remat)
    one = dataclasses.replace(config, num_layers=1, compute=compute)
    return residual_bytes(one, rows)


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
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_cut = partition.cut_axis(path, leaf.shape, fsdp) is not None
        total += leaf.size / (fsdp if is_cut else 1)
    return total


def _bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _width(config: ModelConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(config.dtype).itemsize


def _gathered(config: ModelConfig, trained: Params, lora: LoraConfig) -> float:
    """A layer's weights and the embedding, all of them, as a mesh uses them, with gradients."""
    every = shapes(config)
    layer = _elements(every["layers"]) / config.num_layers
    outside = _elements(every) - _elements(every["layers"])
    return (layer + outside) * (_width(config) + (0 if lora.rank else _FLOAT32))
