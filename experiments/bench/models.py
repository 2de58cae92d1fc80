"""A model's training update and forward pass against PyTorch's, and the memory of the vocabulary.

Both sides are timed in turns in one process, on the same weights and tokens: full fine-tuning of
float32 weights with AdamW, 15% of the tokens written by the policy, computed in float32 on a CPU
and in bfloat16 on a GPU (PyTorch's update by autocast).  transformers projects the vocabulary for
every token, as its users get it; "policy tokens only" is its model with our projection, which
shows how much of a difference that one thing makes.  Needs `make setup-peers`.

Memory is measured first: the process's peak only grows.
"""

import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.bench import floor, peers, updates
from spa_jax import batching
from spa_jax.batching import PackedRows
from spa_jax.config import DEFAULT_COMPUTE
from spa_jax.models import transformer
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.kernels import choice
from spa_jax.models.shapes import SMOLLM2_135M
from spa_jax.training import forward, partition, sft_update
from spa_jax.training import state as state_lib
from spa_jax.trajectory import Sampling, Status, Step, Trajectory

_SHARE, _STEPS = 0.15, 8  # of the tokens that the policy wrote; steps an episode
_RATE = 1e-5
_SAME = {"float32": 1e-3, "bfloat16": 0.05}  # what losses may differ by, by what is computed in


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      rows: rows of a batch, each one episode.
      length: tokens a row.
      small: of a rehearsal: a model of two narrow layers in place of --policy.
      vocabulary: of the model whose memory is measured; it has two layers.
      tokens: tokens of its one row, all of them the policy's.
      repeats: times that each side is timed.
    """

    rows: int = 4
    length: int = 512
    small: bool = False
    vocabulary: int = 128_256
    tokens: int = 4096
    repeats: int = 5


REHEARSAL = Sizes(rows=2, length=128, small=True, vocabulary=8192, tokens=2048, repeats=2)


def episodes(sizes: Sizes, share: float, vocab_size: int) -> list[Trajectory]:
    """One episode a row, as long as the row: in each of its steps the policy writes the end."""
    written = max(_STEPS, round(share * sizes.length))
    step_id: list[int] = []
    spans = np.array_split(np.arange(sizes.length), _STEPS)
    for k, (span, wrote) in enumerate(
        zip(spans, np.array_split(np.arange(written), _STEPS), strict=True)
    ):
        wrote = wrote[: len(span) - 1]  # something is read first
        step_id += [-1] * (len(span) - len(wrote)) + [k] * len(wrote)
    random = np.random.default_rng(0)
    return [
        Trajectory(
            env="bench",
            task=str(i),
            split="bench",
            seed=0,
            attempt=0,
            policy="bench",
            status=Status.SUCCESS,
            final_reward=1.0,
            instruction="",
            sampling=Sampling(),
            steps=(Step("", "", "look", True, 0),) * _STEPS,
            step_id=tuple(step_id),
            token_ids=tuple(random.integers(0, vocab_size, sizes.length).tolist()),
            log_probs=(0.0,) * sizes.length,
        )
        for i in range(sizes.rows)
    ]


def pack(sizes: Sizes, share: float, vocab_size: int) -> PackedRows:
    """The rows of `episodes`."""
    played = episodes(sizes, share, vocab_size)
    written = sum(k >= 0 for k in played[0].step_id)
    return batching.pack(played, row_length=sizes.length, policy_slots=written, step_slots=_STEPS)


# --- memory ---------------------------------------------------------------------------------------


def peak_gib() -> float:
    """The process's largest memory so far; Linux counts KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def projection_memory(sizes: Sizes) -> dict[str, tuple[float, float]]:
    """ "chunked", "whole" -> (GiB of an update's temporaries by XLA's analysis, the peak in GiB).

    The temporaries hold the weights' gradient too.
    """
    shape = dataclasses.replace(
        SMOLLM2_135M, num_layers=2, vocab_size=sizes.vocabulary, max_position=sizes.tokens
    )
    one = dataclasses.replace(sizes, rows=1, length=sizes.tokens)
    rows = pack(one, 1.0, sizes.vocabulary)
    params = transformer.init(shape, jax.random.key(0))
    found = {}
    for name, chunk in (("chunked", DEFAULT_COMPUTE.logits_chunk), ("whole", 0)):
        compute = dataclasses.replace(shape.compute, logits_chunk=chunk)
        loss = sft_update.make_loss(dataclasses.replace(shape, compute=compute))
        gradient = jax.jit(
            lambda params, rows, loss=loss: jax.grad(loss, has_aux=True)(
                {"policy": params}, {}, sft_update.SftBatch(rows), {"tokens": 1.0}
            )
        )
        compiled = gradient.lower(params, rows).compile()
        jax.block_until_ready(compiled(params, rows))
        analysis = compiled.memory_analysis()
        assert analysis is not None  # every backend of ours has one
        temporaries = analysis.temp_size_in_bytes / 2**30
        found[name] = (temporaries, peak_gib())
    return found


# --- speed ----------------------------------------------------------------------------------------


def in_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, after one call that warms up; a call returns when it is done."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


class OurUpdate:
    """One SFT update of ours a call; returns the loss before it."""

    def __init__(
        self, config: ModelConfig, params: Params, rows: PackedRows, rate: float = _RATE
    ) -> None:
        optimizer = updates.adamw(rate)
        self._trainer = partition.Mesh(sft_update.make_loss(config), optimizer, (1, 1))
        self._state = self._trainer.replicate(state_lib.create({"policy": params}, optimizer))
        count = len(rows.tokens)
        self._batches = [sft_update.SftBatch(b) for b in batching.microbatches(rows, count, 1)]
        self._tokens = float(rows.token_mask.sum())

    def __call__(self) -> float:
        self._state, sums = self._trainer.update(
            self._state, self._batches, {"tokens": self._tokens}
        )
        jax.block_until_ready(self._state)
        return sums["nll"] / self._tokens


class TheirUpdate:
    """The same in PyTorch.

    Attributes:
      everywhere: transformers' own loss, with logits for every token; else for the policy's.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        rows: PackedRows,
        everywhere: bool,
        rate: float = _RATE,
    ) -> None:
        torch, model = peers.torch(), peers.model(config, params)
        self._config = config
        self._model, self._rows, self._torch = model, rows, torch
        self.everywhere = everywhere
        self._tokens = peers.tensor(rows.tokens, dtype=torch.long)
        labels = np.full(rows.tokens.shape, -100)
        np.put_along_axis(labels, rows.token_index + 1, rows.targets, 1)
        self._labels = peers.tensor(labels)
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, weight_decay=0.0, fused=True
        )

    def __call__(self) -> float:
        with peers.autocast(self._config):
            if self.everywhere:
                loss = self._model(input_ids=self._tokens, labels=self._labels).loss
            else:
                loss = -peers.log_probs(self._model, self._rows).mean()
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss)


def forward_sides(
    config: ModelConfig, params: Params, model: Any, rows: PackedRows
) -> dict[str, Callable[[], Any]]:
    """The forward passes that are compared."""
    torch = peers.torch()
    tokens = peers.tensor(rows.tokens, dtype=torch.long)
    here, given = jax.device_put(params), jax.device_put(rows)
    everywhere = jax.jit(
        lambda params, rows: transformer.logits(params, forward.rows_hidden(config, params, rows))
    )
    at_policy = jax.jit(functools.partial(forward.score, config, temperature=1.0))

    def theirs() -> Any:
        with torch.inference_mode():
            return peers.finished(model(input_ids=tokens).logits)

    def theirs_at_policy() -> Any:
        with torch.inference_mode():
            return peers.finished(peers.log_probs(model, rows))

    return {
        "ours": lambda: jax.block_until_ready(everywhere(here, given)),
        "theirs": theirs,
        "ours, policy tokens only": lambda: jax.block_until_ready(
            at_policy({"policy": here}, given)
        ),
        "theirs, policy tokens only": theirs_at_policy,
    }


def check_same(losses: Mapping[str, float], dtype: str = "float32") -> None:
    """That all sides compute the same, before any is timed.

    Raises:
      AssertionError: they do not.
    """
    if max(losses.values()) - min(losses.values()) > _SAME[dtype]:
        raise AssertionError(f"the sides compute different losses: {losses}")


def model(sizes: Sizes) -> tuple[ModelConfig, Params, str]:
    """As `floor.model`; a small one for a rehearsal."""
    if not sizes.small:
        return floor.model()
    config = dataclasses.replace(
        SMOLLM2_135M, num_layers=2, vocab_size=2048, hidden_size=192, num_heads=3, num_kv_heads=1
    )
    params = transformer.init(config, jax.random.key(0))
    return choice.resolve(config), params, "a small random model (rehearsal)"


def run() -> None:
    """Prints the figures and a last RESULT line."""
    peers.torch(), peers.require("transformers")  # before minutes are spent
    sizes = REHEARSAL if flags.FLAGS.rehearsal else Sizes()
    memory = projection_memory(sizes)
    config, params, name = model(sizes)
    params = jax.device_get(params)
    rows = pack(sizes, _SHARE, config.vocab_size)
    print(
        f"model: {name}, {config.num_layers} layers, {config.dtype}; {sizes.rows} rows of "
        f"{sizes.length} tokens, {rows.token_mask.mean():.0%} of their slots filled: "
        f"{rows.token_mask.sum() / rows.tokens.size:.1%} of the tokens are the policy's; "
        f"{peers.torch().get_num_threads()} threads"
    )
    trained: dict[str, Callable[[], float]] = {
        "ours": OurUpdate(config, params, rows),
        "theirs": TheirUpdate(config, params, rows, True),
        "theirs, policy tokens only": TheirUpdate(config, params, rows, False),
    }
    check_same({name: side() for name, side in trained.items()}, config.dtype)
    took = {"update": in_turns(trained, sizes.repeats)}
    del trained
    passes = forward_sides(config, params, peers.model(config, params, config.dtype), rows)
    took["forward"] = in_turns(passes, sizes.repeats)
    report(config, params, rows, took, memory)


def report(
    config: ModelConfig,
    params: Params,
    rows: PackedRows,
    took: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, tuple[float, float]],
) -> None:
    """Prints the table and the RESULT line; a floor counts 2 FLOP a parameter, token and pass."""
    rates = floor.measure(config.dtype)
    tokens, written = rows.tokens.size, float(rows.token_mask.sum())
    layers, vocabulary = floor.layer_parameters(params), floor.vocabulary_parameters(config)
    print(rates)
    print(f"{'':36}{'tokens/s':>10}{'floor':>10}{'share':>8}")
    for what, sides in took.items():
        for side, seconds in sides.items():
            few = "only" in side or (what == "update" and side == "ours")
            flops = 2.0 * (layers * tokens + vocabulary * (written if few else tokens))
            least = flops * (3 if what == "update" else 1) / rates.matmul
            print(
                f"{what + ', ' + side:36}{tokens / seconds:10.0f}{tokens / least:10.0f}"
                f"{least / seconds:8.0%}"
            )
    for name, (temporaries, peak) in memory.items():
        print(
            f"logits {name}: {temporaries:.2f} GiB of temporaries, process at most {peak:.2f} GiB"
        )
    update, passes = took["update"], took["forward"]
    ours = 6.0 * (layers * tokens + vocabulary * written) / rates.matmul / update["ours"]
    at_policy = passes["theirs"] / passes["ours, policy tokens only"]
    print(
        f"RESULT update_tokens_per_second={tokens / update['ours']:.1f} "
        f"peer_update_tokens_per_second={tokens / update['theirs']:.1f} "
        f"update_ratio={update['theirs'] / update['ours']:.3f} "
        f"update_ratio_policy_only={update['theirs, policy tokens only'] / update['ours']:.3f} "
        f"forward_ratio={passes['theirs'] / passes['ours']:.3f} "
        f"forward_policy_ratio={at_policy:.3f} share_of_floor={ours:.3f} "
        + " ".join(f"peak_gib_{name}={peak:.2f}" for name, (_, peak) in memory.items())
    )
