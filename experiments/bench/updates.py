"""What the two training subjects share: episodes of the quickstart's size, and a timed update."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments.bench import floor
from spa_jax import batching
from spa_jax.batching import PackedRows
from spa_jax.config import RowsConfig
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.training import partition
from spa_jax.training import state as state_lib
from spa_jax.trajectory import Sampling, Status, Step, Trajectory

ROWS = RowsConfig(row_length=1024, policy_slots=256, step_slots=64, rows_per_device=1)
_FIRST, _OBSERVATION, _RESPONSE, _STEPS = 120, 22, 8, 8  # tokens, tokens, tokens, steps
_REPEATS = 3


def episodes(count: int, vocab_size: int) -> list[Trajectory]:
    """Episodes of random ids, as long as the quickstart's mostly are: 338 tokens, 8 steps."""
    step_id = [-1] * _FIRST
    for k in range(_STEPS):
        step_id += [-1] * (_OBSERVATION if k else 0) + [k] * _RESPONSE
    steps = tuple(Step("", "", "look", True, 0, 0.1, 0.1) for _ in range(_STEPS))
    random = np.random.default_rng(0)
    return [
        Trajectory(
            env="bench", task=str(i), split="bench", seed=0, attempt=0, policy="bench",
            status=Status.SUCCESS, final_reward=1.0, instruction="", steps=steps,
            sampling=Sampling(), step_id=tuple(step_id),
            token_ids=tuple(random.integers(0, vocab_size, len(step_id)).tolist()),
            log_probs=(-1.0,) * len(step_id), ref_log_probs=(-1.0,) * len(step_id),
        )
        for i in range(count)
    ]  # fmt: skip


def adamw(rate: float = 1e-5) -> optax.GradientTransformation:
    """The optimiser of both stages."""
    return state_lib.adamw(optax.constant_schedule(rate), clip_norm=1.0, weight_decay=0.0)


def time_update(
    trainer: partition.Pmap,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: Callable[[], Sequence[Any]],
    counts: Mapping[str, float],
) -> float:
    """Median seconds of an update, after one of a single microbatch that compiles.

    Args:
      trainer: compiled for the loss.
      optimizer: the trainer's.
      params: what is trained, not replicated.
      batches: makes the microbatches; their making is part of the time.
      counts: the update's global counts.
    """
    state = trainer.replicate(state_lib.create(params, optimizer))
    state, _ = trainer.update(state, batches()[:1], counts)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        state, _ = trainer.update(state, batches(), counts)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(
    config: ModelConfig, params: Params, name: str, packed: PackedRows, seconds: float
) -> None:
    """Prints figures, floor and the RESULT line of an update over `packed` rows.

    The floor counts 6 FLOP a parameter and token (2 forward, 4 backward): the layers' for
    every token, the vocabulary's for those that the policy wrote.  Attention scores, padding,
    the optimiser and what is computed twice to save memory are what a better program avoids.
    """
    matmul, read = floor.matmul_rate(), floor.copy_rate()
    tokens = float(batching.token_count(packed))
    written = float(packed.token_mask.sum())
    layers, vocabulary = floor.layer_parameters(params), floor.vocabulary_parameters(config)
    flops = 6.0 * (layers * tokens + vocabulary * written)
    least = flops / matmul
    count, length = packed.tokens.shape
    print(f"model: {name}; {count} rows of {length}, {tokens:.0f} tokens, {written:.0f} of them "
          "written by the policy")  # fmt: skip
    floor.show_rates(matmul, read)
    print(f"update {seconds:.2f} s, {tokens / seconds:.0f} tokens/s; floor {least:.2f} s, "
          f"{tokens / least:.0f} tokens/s ({flops / 1e12:.2f} TFLOP); share {least / seconds:.0%}"
          )  # fmt: skip
    print(f"RESULT tokens_per_second={tokens / seconds:.1f} floor={tokens / least:.1f} "
          f"share_of_floor={least / seconds:.3f}")  # fmt: skip
