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
import math
from typing import Any

import jax
import jax.numpy as jnp

from spa_jax.config import LoraConfig, Remat, RowsConfig, SamplingConfig
from spa_jax.models import axes, transformer, tree
from spa_jax.models import lora as lora_lib
from spa_jax.models.config import ModelConfig, Params
from spa_jax.stage_config import ProgressConfig
from spa_jax.training import forward as forward_lib

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
    tensor: int = 1,
    averaged: bool = False,
) -> Need:
    """An update of SFT, of PPO, or of an estimator with adapters.

    Args:
      config: the model, as it is computed.
      rows: the static shape of a microbatch.
      lora: adapters; rank 0: none.
      train_layers: as in `tree.split`; 0: all.
      fsdp: how many devices share rows and each parameter (1 under pmap).
      tensor: how many share a row's work and each parameter.
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
    again = layer_bytes(config, rows, "none") - layer_bytes(config, rows, compute.remat)
    chunk = forward_lib.projected_at_once(compute.logits_chunk, rows.slots)
    logits = float(_LOGITS_UPDATE * chunk * config.vocab_size * _FLOAT32)
    count = functools.partial(_elements, fsdp=fsdp, tensor=tensor)
    gathered = 0.0
    if fsdp > 1:
        # With its gradient, if it has one.  The logits are done when the layers are computed again.
        layer, table = (size * (1 if lora.rank else 2) for size in _gathered(config, tensor))
        gathered, logits = layer, max(0.0, logits + table - again)
    return Need(
        parameters=count(trained) * param + count(frozen) * _width(config),
        # On a mesh a microbatch's come in the dtype that they travelled in.
        gradients=count(trained) * (_FLOAT32 + (param if fsdp == 1 else _width(config))),
        optimizer=count(trained) * (_MOMENTS + averaged) * _FLOAT32,
        gathered=gathered,
        activations=saved + again,
        logits=logits,
    )


def forward(config: ModelConfig, rows: RowsConfig, *, fsdp: int = 1, tensor: int = 1) -> Need:
    """The pass over episodes that the estimator, annotation and the critic read.

    Args:
      config: the model, as it is computed.
      rows: the static shape of a batch.
      fsdp: as in `update`.
      tensor: as in `update`.
    """
    saved, layer, table = layer_bytes(config, rows), 0.0, 0.0
    chunk = forward_lib.projected_at_once(config.compute.logits_chunk, rows.slots)
    logits = chunk * config.vocab_size * _FLOAT32
    if fsdp > 1:
        layer, table = _gathered(config, tensor)
    else:
        logits *= _LOGITS_FORWARD
    return Need(
        parameters=_elements(shapes(config), fsdp=fsdp, tensor=tensor) * _width(config),
        gathered=layer,
        activations=saved,
        logits=max(0.0, table + logits - saved),  # the layers are done when they are made
    )


def exploration(config: ModelConfig, sampling: SamplingConfig, prefill_tokens: int = 0) -> Need:
    """The generation engine.

    Its weights are cast layer by layer before the cache is allocated and anything is played
    (`sampling.weights`).  Where one float32 layer is larger than cache and logits, the difference
    is counted under `activations`: it is what the engine needs at its start only.  So is what the
    scores of the largest prefill call need beyond the logits; the two are never there at once.

    Args:
      config: the model, as it is computed.
      sampling: the slots of an engine, their context and their cache; --sampling_tensor devices
        share them.
      prefill_tokens: of the largest call that reads; 0 leaves its scores out.
    """
    tensor = sampling.sampling_tensor
    weights = _elements(shapes(config), tensor=tensor) * _width(config)
    sizes, dtype = (sampling.slots, sampling.context_length), sampling.cache_dtype or None
    whole = jax.eval_shape(lambda: transformer.empty_cache(config, *sizes, dtype))
    cache = _bytes(whole) / tensor
    logits = _LOGITS_FORWARD * sampling.slots * config.vocab_size * _FLOAT32
    layer = _elements(shapes(config)["layers"], tensor=tensor) / config.num_layers * _FLOAT32
    # Scores and their softmax, over the whole context.
    heads = config.num_heads / tensor
    scores = 2 * prefill_tokens * heads * sampling.context_length * _FLOAT32
    return Need(
        parameters=weights,
        activations=max(0.0, layer - logits - cache, scores - logits),
        logits=logits,
        cache=cache,
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
    # Kernels take only rows of their own lengths, and the shapes do not depend on them.
    compute = dataclasses.replace(config.compute, attention="xla")
    plain = dataclasses.replace(config, compute=compute)
    return jax.eval_shape(functools.partial(transformer.init, plain), jax.random.key(0))


def _ids(rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)


def estimator(config: ModelConfig, progress: ProgressConfig, *, steps: int, episodes: int) -> Need:
    """An update of heads on hidden states that were computed before; all is float32.

    Args:
      config: the model.
      progress: the heads.
      steps: of an episode.
      episodes: a device's of an update.
    """
    heads_of = {"paper": 1, "value": 1, "answer": 2}[progress.estimator]
    members = 1 if progress.estimator == "paper" else progress.heads
    units = config.hidden_size * (progress.width + 2)
    parameters = float(_FLOAT32 * heads_of * members * units)
    states = _FLOAT32 * episodes * (steps + 1) * config.hidden_size
    return Need(
        parameters=parameters,
        gradients=2 * parameters,
        optimizer=_MOMENTS * parameters,
        # Each head standardises them, and keeps that for its gradient.
        activations=float(states * (1 + 2 * heads_of * members)),
    )


def layer_matrices(config: ModelConfig) -> int:
    """Numbers in the matrices of all layers: a token's products, but for the logits."""
    layers = jax.tree.leaves(shapes(config)["layers"])
    return sum(leaf.size for leaf in layers if leaf.ndim == 3)


def device_bytes(tree: Params, *, fsdp: int = 1, tensor: int = 1) -> float:
    """Bytes a device of a tree of shapes, cut as in `update`."""
    sizes = {axes.FSDP: fsdp, axes.TENSOR: tensor}
    return sum(
        leaf.size * leaf.dtype.itemsize / _shares(path, leaf, sizes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


def _shares(path: tuple, leaf: Any, sizes: dict[str, int]) -> int:
    """How many devices share a weight."""
    return math.prod(sizes[axis] for axis in axes.even(path, leaf.shape, sizes) if axis)


def _elements(tree: Params, fsdp: int = 1, tensor: int = 1) -> float:
    """Numbers a device of a tree, of as many devices a mesh's axis that cuts weights."""
    sizes = {axes.FSDP: fsdp, axes.TENSOR: tensor}
    return sum(
        leaf.size / _shares(path, leaf, sizes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    )


def _bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _width(config: ModelConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(config.dtype).itemsize


def _gathered(config: ModelConfig, tensor: int) -> tuple[float, float]:
    """(a layer's weights, the larger table of the vocabulary's) as a mesh brings them together."""
    every, width = shapes(config), _width(config)
    layer = _elements(every["layers"], tensor=tensor) / config.num_layers
    tables = (_elements({name: every[name]}, tensor=tensor) for name in every if "embed" in name)
    return layer * width, max(tables) * width
