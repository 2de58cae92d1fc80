"""Tokens a second of the generation engine: prefill and decode, each against its floor.

16 conversations are prefilled to the length of an episode's middle (256 tokens) and then write
20 tokens a turn: what the quickstart's exploration does.
"""

import statistics
import time

import jax
import numpy as np

from experiments.bench import floor
from spa_jax.models.config import ModelConfig, Params
from spa_jax.sampling.engine import Engine
from spa_jax.trajectory import Sampling

_SLOTS, _CONTEXT, _PROMPT, _NEW, _TURNS = 16, 768, 256, 20, 5


def make_engine(config: ModelConfig, params: Params) -> Engine:
    """An engine of the sizes above; no token ends a turn, so every turn has exactly its 20."""
    return Engine(
        config,
        params,
        slots=_SLOTS,
        context_length=_CONTEXT,
        sampling=Sampling(max_new_tokens=_NEW),
        end_of_turn=(-1,),
        seed=0,
    )


def measure(engine: Engine, prompts: np.ndarray) -> tuple[float, float, int]:
    """(seconds of prefilling all slots, median seconds of a turn, tokens of a turn).

    Raises:
      AssertionError: if the caches held a part of the prompts, so that not all was read.
    """
    before = engine.usage.reused
    for slot in range(_SLOTS):
        engine.open(slot, slot)
        engine.submit(slot, prompts[slot].tolist())
    start = time.perf_counter()
    engine._read()
    _wait(engine)
    prefill = time.perf_counter() - start
    if engine.usage.reused != before:
        raise AssertionError("the caches held a part of these prompts")
    turns = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        while engine.busy:
            engine._write()  # returns tokens on the host: nothing is left running
        turns.append(time.perf_counter() - start)
        for slot in range(_SLOTS):
            engine.submit(slot, [])  # feeds each turn's last token
        engine._read()
        _wait(engine)
    return prefill, statistics.median(turns), _SLOTS * _NEW


def _wait(engine: Engine) -> None:
    """Until the device has done what it was told: the engine itself waits only for tokens."""
    jax.block_until_ready(engine._state)


def run() -> None:
    """Prints the figures and a last RESULT line."""
    config, params, name = floor.model()
    engine = make_engine(config, params)
    # Others than those that compile it, or the engine would find them in its cache.
    warm, prompts = np.random.default_rng(0).integers(0, config.vocab_size, (2, _SLOTS, _PROMPT))
    measure(engine, warm)
    prefill, turn, tokens = measure(engine, prompts)
    rates = floor.measure(config.dtype)

    layers, vocabulary = floor.layer_parameters(params), floor.vocabulary_parameters(config)
    prefill_floor = 2.0 * layers * _SLOTS * _PROMPT / rates.matmul
    # A decoded token of every slot reads all weights once, and does their products.
    products = 2.0 * (layers + vocabulary) * _SLOTS / rates.matmul
    traffic = floor.weight_bytes(config) * (layers + vocabulary) / rates.read
    turn_floor = _NEW * max(products, traffic)

    print(f"model: {name}; {_SLOTS} slots, context {_CONTEXT}, {_NEW} tokens a turn")
    print(rates)
    print(f"{'':10}{'tokens/s':>10}{'floor':>10}{'share':>8}")
    for what, count, took, least in (
        ("prefill", _SLOTS * _PROMPT, prefill, prefill_floor),
        ("decode", tokens, turn, turn_floor),
    ):
        print(f"{what:10}{count / took:10.0f}{count / least:10.0f}{least / took:8.0%}")
    print(
        f"floor of a decoded token of all slots: products {products * 1e3:.1f} ms, reading the "
        f"weights {traffic * 1e3:.1f} ms; it takes {turn / _NEW * 1e3:.1f} ms"
    )
    print(
        f"RESULT decode_tokens_per_second={tokens / turn:.1f} "
        f"prefill_tokens_per_second={_SLOTS * _PROMPT / prefill:.1f} "
        f"decode_share_of_floor={turn_floor / turn:.3f} "
        f"prefill_share_of_floor={prefill_floor / prefill:.3f}"
    )
