"""A PPO update beside the same passes in transformers and PyTorch, in one process.

    python -m experiments.bench ppo

The model is the one that these inputs were timed with: hidden 256, 4 layers, vocabulary 8,192,
7.1 million parameters, float32, random weights that both sides share.  --parts chooses among

    step        the inputs' 8 rows of 512 tokens, minibatches of 4, Adam; full fine-tuning and LoRA.
                A step has three passes over the rows: log-probabilities with values, those of the
                reference, and the update.  Ours needs one forward pass where the policy that played
                is the reference, as in the first round: log-probabilities are recorded.
    ragged      16 episodes of 300 to 2,000 tokens, one update: ours packs rows, PyTorch takes
                minibatches of 4, padded to the longest of the 16, as trl's PPOTrainer pads (and so
                the released code), or to their own; --trajectories takes recorded episodes instead
    scoring     16 trajectories of 494 tokens on average under the estimator: ours packs rows,
                PyTorch reads one after the other, without padding
    quickstart  16 episodes of the quickstart's size under --policy (ours alone)

Calls take turns, so that what slows the machine slows all of them; a time is the median of the
rounds, a ratio the median of their ratios.  "plain" PyTorch has the logits of every token, as a
transformers model gives them; "policy tokens only" projects the vocabulary where it is read.  The
first gradient's norm must be the same on both sides, or the subject stops.  --rehearsal is a
rehearsal: its figures mean nothing.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import flags

from experiments.bench import floor, peers, ppo_peer, ppo_sides, updates
from spa_jax import store
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, transformer
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.kernels import choice
from spa_jax.parity import files
from spa_jax.stage_config import PpoConfig
from spa_jax.training import partition, ppo_data, ppo_update, scoring
from spa_jax.trajectory import Trajectory

# The shape that the released code was timed with.
TIMED = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=688,
    tie_embeddings=False,
)
_SMALL = dataclasses.replace(
    TIMED, vocab_size=512, hidden_size=64, num_layers=2, head_dim=8, intermediate_size=128
)
_OBSERVATION, _RESPONSE = 44, 20  # tokens of a step
_ROUNDS = 5  # unless --rounds says otherwise
# As long as ALFWorld's episodes are: most are short, a few take all of their steps.
_RAGGED = (300, 345, 390, 440, 490, 545, 605, 670, 740, 820, 910, 1010, 1130, 1290, 1560, 2000)
_SCORED = tuple(range(254, 735, 32))  # 494 on average


def run() -> None:
    """Prints the figures and a last RESULT line."""
    parts = {"step": _step, "ragged": _ragged, "scoring": _scoring, "quickstart": _quickstart}
    if unknown := set(flags.FLAGS.parts) - set(parts):
        raise UserError(f"--parts={','.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    if set(flags.FLAGS.parts) != {"quickstart"}:
        if jax.default_backend() != "cpu":
            raise UserError(
                "ppo compares in float32 on a CPU: JAX_PLATFORMS=cpu, or --parts=quickstart, which "
                "compares with nothing"
            )
        for name in ("torch", "transformers", "peft"):
            peers.require(name)
    rates = floor.measure()
    print(rates)
    found: dict[str, float] = {"matmul_gflops": rates.matmul / 1e9}
    for part in flags.FLAGS.parts:
        found |= parts[part](rates.matmul)
    updates.show_result(found)


# --- Work ---------------------------------------------------------------------------------------


def _model() -> tuple[ModelConfig, Params]:
    """The timed model, or the rehearsal's."""
    config = choice.resolve(_SMALL if flags.FLAGS.rehearsal else TIMED)
    return config, transformer.init(config, jax.random.key(0))


def timing_inputs(path: pathlib.Path, vocab_size: int) -> list[Trajectory]:
    """The episodes of a file of timing inputs.

    Raises:
      UserError: it is not there, or holds something else.
    """
    arrays = files.read_arrays(path)
    ids, mask, scores = (files.need(path, arrays, n) for n in ("ids", "frag_mask", "scores"))
    inside = mask.astype(int)
    number = np.cumsum(np.diff(inside, prepend=0) == 1) - 1
    step_id = np.where(inside > 0, number, -1)
    if ids.ndim != 2 or mask.shape != ids.shape[1:] or scores.shape != (len(ids), number[-1] + 1):
        raise UserError(f"{path}: ids, frag_mask and scores do not fit each other")
    return [
        updates.episode(f"t{i}", row % vocab_size, step_id, rewards)
        for i, (row, rewards) in enumerate(zip(ids, scores, strict=True))
    ]


def of_length(name: str, length: int, vocab_size: int) -> Trajectory:
    """An episode of 64 random tokens or more: context, then steps as in the timing inputs."""
    rng = np.random.default_rng(length)
    steps = length // (_OBSERVATION + _RESPONSE)
    step_id = [k for k in range(steps) for k in [-1] * _OBSERVATION + [k] * _RESPONSE]
    step_id = [-1] * (length - len(step_id)) + step_id
    return updates.episode(
        name, rng.integers(0, vocab_size, length), step_id, rng.normal(size=steps)
    )


def _recorded(path: pathlib.Path, vocab_size: int) -> list[Trajectory]:
    """16 of a file's episodes, evenly over their lengths."""
    played = [t for t in store.read(path) if max(t.step_id, default=-1) >= 0]
    played.sort(key=lambda t: len(t.token_ids))
    if not played:
        raise UserError(f"--trajectories={path}: holds no encoded episode")
    chosen = np.linspace(0, len(played) - 1, min(16, len(played))).round().astype(int)
    made = []
    for i in sorted(set(chosen.tolist())):
        used = sorted({k for k in played[i].step_id if k >= 0})
        step_id = [used.index(k) if k >= 0 else -1 for k in played[i].step_id]
        ids = np.asarray(played[i].token_ids) % vocab_size
        made.append(updates.episode(f"t{i}", ids, step_id, [0.1] * len(used)))
    return made


def _rows_for(episodes: Sequence[Trajectory], row_length: int, rows_per_device: int) -> RowsConfig:
    """Rows that hold the longest episode, with room for as many policy tokens as fill them."""
    longest = max(len(t.token_ids) for t in episodes)
    length = max(row_length, -(-longest // 128) * 128)
    share = max(sum(k >= 0 for k in t.step_id) / len(t.token_ids) for t in episodes)
    steps = max(len(t.steps) / len(t.token_ids) for t in episodes)
    slots = int(np.ceil(share * length / 32)) * 32
    return RowsConfig(
        row_length=length,
        policy_slots=slots,
        rows_per_device=rows_per_device,
        step_slots=int(np.ceil(steps * length / 8)) * 8,
    )


def _written(episodes: Sequence[Trajectory]) -> int:
    return sum(sum(k >= 0 for k in t.step_id) for t in episodes)


# --- Parts --------------------------------------------------------------------------------------


def _step(rate: float) -> dict[str, float]:
    """The work of the timing inputs, with all weights and with LoRA."""
    config, params = _model()
    episodes = timing_inputs(pathlib.Path(flags.FLAGS.timing_inputs), config.vocab_size)
    if flags.FLAGS.rehearsal:
        episodes = episodes[: ppo_sides.MINIBATCH]
    found: dict[str, float] = {}
    for name, lora in (("full", False), ("lora", True)):
        rows = _rows_for(episodes, 512, max(1, ppo_sides.MINIBATCH // jax.device_count()))
        sides = ppo_sides.make(
            episodes, rows, group=ppo_sides.MINIBATCH, config=config, params=params, lora=lora
        )
        found |= _compare_step(name, sides, rate)
    return found


def _compare_step(name: str, sides: ppo_sides.Sides, rate: float) -> dict[str, float]:
    """One kind of step: its passes on both sides, and what is made of them."""
    ours, theirs = ppo_sides.Ours(sides), ppo_sides.Theirs(sides)
    lengths = [len(t.token_ids) for t in sides.episodes]
    print(
        f"step, {'LoRA' if name == 'lora' else 'all weights'}: {len(lengths)} rows of "
        f"{lengths[0]}, {_written(sides.episodes)} tokens of the policy's, "
        f"{len(sides.groups)} optimiser steps"
    )
    ppo_sides.check_same(ours.update(), theirs.update(everywhere=False))
    times = updates.take_turns(
        {
            "ours forward": ours.forward,
            "ours update": ours.update,
            "plain forward": lambda: theirs.forward(everywhere=True),
            "plain update": lambda: theirs.update(everywhere=True),
            "tokens only forward": lambda: theirs.forward(everywhere=False),
            "tokens only update": lambda: theirs.update(everywhere=False),
        },
        flags.FLAGS.rounds or _ROUNDS,
    )
    forward = updates.forward_flops(sides.config, sides.params, lengths, _written(sides.episodes))
    update = updates.update_flops(forward, lora=sides.adapter is not None)
    for who in ("ours", "plain", "tokens only"):
        # Two forward passes, of the policy and of the reference, and the update.
        times[f"{who} step"] = _added(times, (f"{who} forward", 2), (f"{who} update", 1))
    # As training does it in the first round: log-probabilities are those of sampling.
    times["ours step, recorded"] = _added(times, ("ours forward", 1), ("ours update", 1))
    flops = {"forward": forward, "update": update, "step": 2 * forward + update}
    flops["step, recorded"] = forward + update
    _show(times, {key: flops[_pass(key)] for key in times}, rate)
    pairs = {
        "forward": ("ours forward", "plain forward"),
        "update": ("ours update", "plain update"),
        "step": ("ours step", "plain step"),
        "step_recorded": ("ours step, recorded", "plain step"),
        "step_tokens_only": ("ours step", "tokens only step"),
    }
    found = {f"{name}_{key}": updates.ratio(times[a], times[b]) for key, (a, b) in pairs.items()}
    took = statistics.median(times["ours step"])
    return found | {f"{name}_share_of_floor": flops["step"] / rate / took}


def _pass(key: str) -> str:
    """ "plain forward" -> "forward": which pass a line is of."""
    for who in ("ours ", "plain ", "tokens only "):
        key = key.removeprefix(who)
    return key


def _added(times: Mapping[str, list[float]], *what: tuple[str, int]) -> list[float]:
    """Round by round, the sum of some times, each so many times."""
    return [
        sum(times[name][i] * count for name, count in what) for i in range(len(times[what[0][0]]))
    ]


def _ragged(rate: float) -> dict[str, float]:
    """One update of episodes of very different lengths."""
    config, params = _model()
    path, small = flags.FLAGS.trajectories, flags.FLAGS.rehearsal
    lengths = [n // 4 for n in _RAGGED[1::2]] if small else list(_RAGGED)
    episodes = (
        _recorded(pathlib.Path(path), config.vocab_size)
        if path
        else [of_length(f"t{i}", n, config.vocab_size) for i, n in enumerate(lengths)]
    )
    lengths = [len(t.token_ids) for t in episodes]
    rows = _rows_for(episodes, 512, 1)
    sides = ppo_sides.make(
        episodes, rows, group=len(episodes), config=config, params=params, lora=False
    )
    ours, padded, theirs = (
        ppo_sides.Ours(sides),
        ppo_sides.Theirs(sides, pad_to_batch=True),
        ppo_sides.Theirs(sides),
    )
    print(
        f"ragged: {len(lengths)} episodes of {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(lengths)} in all, {_written(episodes)} of the policy's; padded to the batch's "
        f"longest row {padded.padded}, to each minibatch's {theirs.padded}"
    )
    norm = ours.update()
    ppo_sides.check_same(norm, padded.update(everywhere=False))
    ppo_sides.check_same(norm, theirs.update(everywhere=False))
    times = updates.take_turns(
        {
            "ours update": ours.update,
            "plain update, whole": lambda: padded.update(everywhere=True),
            "plain update": lambda: theirs.update(everywhere=True),
            "tokens only update": lambda: theirs.update(everywhere=False),
        },
        flags.FLAGS.rounds or _ROUNDS,
    )
    forward = updates.forward_flops(config, params, lengths, _written(episodes))
    _show(
        times, dict.fromkeys(times, updates.update_flops(forward, lora=False)), rate, sum(lengths)
    )
    return {
        "ragged": updates.ratio(times["ours update"], times["plain update, whole"]),
        "ragged_minibatches": updates.ratio(times["ours update"], times["plain update"]),
        "ragged_tokens_only": updates.ratio(times["ours update"], times["tokens only update"]),
        "ragged_tokens_per_second": sum(lengths) / statistics.median(times["ours update"]),
    }


def _scoring(rate: float) -> dict[str, float]:
    """Contributions of trajectories, with the reference's log-probabilities on our side."""
    config, params = _model()
    lengths = _SCORED[::4] if flags.FLAGS.rehearsal else _SCORED
    episodes = [of_length(f"t{i}", n, config.vocab_size) for i, n in enumerate(lengths)]
    head = ppo_sides.random_head(heads.Head, config.hidden_size)
    rows = _rows_for(episodes, 768, 1)

    def ours() -> np.ndarray:
        scores = scoring.score(
            config, {"policy": params}, episodes, rows, temperature=1.0, title=""
        )
        return np.asarray(heads.read(head, scores.end_hidden)) * scores.step_mask

    one_by_one = _one_by_one(config, params, head, episodes)
    print(
        f"scoring: {len(lengths)} trajectories of {np.mean(lengths):.0f} tokens on average; "
        f"PyTorch reads one after the other, without padding"
    )
    wanted, got = ours(), one_by_one(False)
    for row, values in zip(wanted, got, strict=True):
        np.testing.assert_allclose(values, row[: len(values)], atol=1e-3)
    times = updates.take_turns(
        {
            "ours": ours,
            "plain": lambda: one_by_one(True),
            "tokens only": lambda: one_by_one(False),
        },
        flags.FLAGS.rounds or _ROUNDS,
    )
    flops = updates.forward_flops(config, params, lengths, 0)
    _show(times, dict.fromkeys(times, flops), rate, sum(lengths))
    took = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "scoring_time_of_plain": 1 / updates.ratio(times["ours"], times["plain"]),
        "scoring_time_of_trunk_only": 1 / updates.ratio(times["ours"], times["tokens only"]),
        "scoring_seconds_a_trajectory": took["ours"] / len(lengths),
    }


def _one_by_one(
    config: ModelConfig, params: Params, head: Params, episodes: Sequence[Trajectory]
) -> Callable[[bool], list[np.ndarray]]:
    """(whether logits are made, as the released head reads them) -> contributions in PyTorch."""
    torch = peers.torch()
    model = peers.model(config, jax.device_get(params)).eval()
    reads = ppo_peer.head(jax.device_get(head))
    tokens = [torch.tensor([t.token_ids]) for t in episodes]
    ends = []
    for t in episodes:
        last = {k: at for at, k in enumerate(t.step_id) if k >= 0}
        ends.append(torch.tensor([last[k] for k in sorted(last)]))

    def run(logits: bool) -> list[np.ndarray]:
        found = []
        with torch.no_grad():
            for row, at in zip(tokens, ends, strict=True):
                hidden = model.model(input_ids=row).last_hidden_state[0]
                if logits:
                    model.lm_head(hidden)
                found.append(reads(hidden[at])[:, 0].numpy())
        return found

    return run


def _show(
    times: Mapping[str, Sequence[float]],
    flops: Mapping[str, float],
    rate: float,
    tokens: int | None = None,
) -> None:
    """A line for each time, with its floor and the share of it that is reached."""
    print(
        f"  {'':22}{'seconds':>10}{'GFLOP':>8}{'floor':>8}{'share':>7}"
        + (f"{'tokens/s':>10}" if tokens else "")
    )
    for name, seconds in times.items():
        took, least = statistics.median(seconds), flops[name] / rate
        line = f"  {name:22}{took:10.3f}{flops[name] / 1e9:8.1f}{least:8.3f}{least / took:7.0%}"
        print(line + (f"{tokens / took:10.0f}" if tokens else ""))


def _quickstart(rate: float) -> dict[str, float]:
    """16 episodes of the quickstart's size in rows of 1,024 tokens, our side alone."""
    del rate  # is measured again, right behind the update
    batch = 16
    config, params, name = floor.model()
    optimizer, ppo = updates.adamw(), PpoConfig()
    trainer = partition.make(updates.ROWS, ppo_update.make_loss(config, ppo, 1.0), optimizer)
    value = ppo_sides.random_head(heads.Head, config.hidden_size)
    played = updates.episodes(batch, config.vocab_size)
    steps = len(played[0].steps)
    noise = np.random.default_rng(0).normal(size=(4, batch, steps)).astype(np.float32)
    mask = np.ones((batch, steps), np.float32)
    table = ppo_data.Table(
        rewards=noise[0],
        values=noise[1],
        advantages=noise[2],
        returns=noise[3],
        mask=mask,
        ends=mask,
    )
    made = ppo_data.make_update(
        played, table, np.arange(batch), updates.ROWS, ppo, devices=trainer.devices
    )
    seconds = updates.time_update(
        trainer, optimizer, {"policy": params, "value": value}, lambda: made.batches, made.counts
    )
    return updates.report(config, params, name, made.packed, seconds)
