"""What the training subjects share: their work, timing in turns, and the floor of an update."""

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
from spa_jax.models.config import ModelConfig, Params
from spa_jax.training import partition
from spa_jax.training import state as state_lib
from spa_jax.trajectory import Sampling, Status, Step, Trajectory

ROWS = RowsConfig(row_length=1024, policy_slots=256, step_slots=64, rows_per_device=1)
_FIRST, _OBSERVATION, _RESPONSE, _STEPS = 120, 22, 8, 8  # tokens, tokens, tokens, steps
_REPEATS = 3


def episode(
    name: str,
    token_ids: np.ndarray,
    step_id: Sequence[int] | np.ndarray,
    rewards: Sequence[float] | np.ndarray,
) -> Trajectory:
    """An episode of these tokens; its recorded log-probabilities are -1 each.

    Args:
      name: its task's.
      token_ids: [T].
      step_id: [T] as in `Trajectory`.
      rewards: one a step.
    """
    return Trajectory(
        env="bench",
        task=name,
        split="bench",
        seed=0,
        attempt=0,
        policy="bench",
        status=Status.SUCCESS,
        final_reward=1.0,
        instruction="",
        sampling=Sampling(),
        steps=tuple(Step("", "", "look", True, contribution=0.1, reward=float(r)) for r in rewards),
        step_id=tuple(int(k) for k in step_id),
        token_ids=tuple(int(i) for i in token_ids),
        log_probs=(-1.0,) * len(step_id),
        ref_log_probs=(-1.0,) * len(step_id),
    )


def episodes(count: int, vocab_size: int) -> list[Trajectory]:
    """Episodes of random ids, as long as the quickstart's mostly are: 338 tokens, 8 steps."""
    step_id = [-1] * _FIRST
    for k in range(_STEPS):
        step_id += [-1] * (_OBSERVATION if k else 0) + [k] * _RESPONSE
    random = np.random.default_rng(0)
    return [
        episode(str(i), random.integers(0, vocab_size, len(step_id)), step_id, [0.1] * _STEPS)
        for i in range(count)
    ]


def adamw(rate: float = 1e-5) -> state_lib.Guarded:
    """The optimiser of both stages."""
    return state_lib.adamw(optax.constant_schedule(rate), clip_norm=1.0, weight_decay=0.0)


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, round by round; what slows the machine slows them all.

    Args:
      calls: by name; each returns when its work is done.
      rounds: how many; a round before them, in which programs are compiled, does not count.
    """
    names = list(calls)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times faster ours is: the median over the rounds."""
    return statistics.median(t / o for o, t in zip(ours, theirs, strict=True))


def forward_flops(
    config: ModelConfig, params: Params, lengths: Sequence[int], projected: float
) -> float:
    """FLOP of a forward pass over trajectories, each by itself.

    2 a parameter and token of the layers, 2 a parameter of the vocabulary and token whose logits
    are wanted, and attention's two products with the tokens up to each one.

    Args:
      config: the model's shape.
      params: its parameters.
      lengths: tokens of each trajectory.
      projected: tokens whose logits are wanted, of all trajectories.
    """
    tokens, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)
    products: float = floor.layer_parameters(params) * tokens
    products += floor.vocabulary_parameters(config) * projected
    products += 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2.0 * products


def update_flops(forward: float, *, lora: bool) -> float:
    """FLOP of a forward and a backward pass: three times the forward one's.

    With LoRA no derivative of a frozen weight is made, so it is twice (the adapters' own products
    are left out, a hundredth).
    """
    return (2.0 if lora else 3.0) * forward


def time_update(
    trainer: partition.Trainer,
    optimizer: state_lib.Guarded,
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
) -> dict[str, float]:
    """Prints figures and floor of an update over `packed` rows; returns those of its RESULT line.

    The floor counts 6 FLOP a parameter and token (2 forward, 4 backward): the layers' for
    every token, the vocabulary's for those that the policy wrote.  Attention scores, padding,
    the optimiser and what is computed twice to save memory are what a better program avoids.
    """
    rates = floor.measure(config.dtype)
    tokens = float(batching.token_count(packed))
    written = float(packed.token_mask.sum())
    layers, vocabulary = floor.layer_parameters(params), floor.vocabulary_parameters(config)
    flops = 6.0 * (layers * tokens + vocabulary * written)
    least = flops / rates.matmul
    count, length = packed.tokens.shape
    print(
        f"model: {name}; {count} rows of {length}, {tokens:.0f} tokens, {written:.0f} of them "
        "written by the policy"
    )
    print(rates)
    print(
        f"update {seconds:.2f} s, {tokens / seconds:.0f} tokens/s; floor {least:.2f} s, "
        f"{tokens / least:.0f} tokens/s ({flops / 1e12:.2f} TFLOP); share {least / seconds:.0%}"
    )
    return {
        "tokens_per_second": tokens / seconds,
        "floor": tokens / least,
        "share_of_floor": least / seconds,
    }


def show_result(figures: Mapping[str, float]) -> None:
    """Prints the last line of a subject."""
    print("RESULT " + " ".join(f"{name}={value:.3f}" for name, value in figures.items()))
