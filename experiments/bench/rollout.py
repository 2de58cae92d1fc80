"""Rollouts of many turns against transformers' PyTorch model, in the same run.

There is no environment; what it would answer is scripted.  Every episode is

    prompt | observation | written | observation | written | ...        --turns times

Ours is the generation engine, which encodes each token once and the prompt, which episodes open
with, once for all.  Theirs is `generate` over all episodes at once, given the whole conversation
in every turn (its own cache lasts for the turn).  Both sample every token and end no turn before
its length.  Plain decoding is timed by itself: as many conversations, --decode tokens each.

Each of theirs is timed between two of ours, on other tokens each time: what else the machine does
hurts both alike, and nothing is left in a cache that could be used again.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.bench import floor, peers
from spa_jax.models.config import ModelConfig, Params
from spa_jax.sampling.engine import Engine, Usage
from spa_jax.trajectory import Sampling

# Nats: more than rounding explains in the log-probability of a token, by what is computed in.
_SAME = {"float32": 1e-3, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Load:
    """What is played, in tokens.

    Attributes:
      episodes: played at once.
      turns: of an episode.
      prompt: opens an episode.
      shared: of these, what all episodes have in common.
      observation: comes before each turn.
      response: the policy writes in a turn.
      decode: written in the plain decoding.
    """

    episodes: int
    turns: int
    prompt: int
    shared: int
    observation: int
    response: int
    decode: int

    @property
    def context(self) -> int:
        """Tokens that a slot must hold."""
        played = self.prompt + self.turns * (self.observation + self.response)
        return max(played, self.prompt + self.decode + 1)

    def script(self, vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompts [episodes, prompt], observations [turns, episodes, observation]), random."""
        rng = np.random.default_rng(seed)
        prompts = rng.integers(0, vocabulary, (self.episodes, self.prompt))
        prompts[:, : self.shared] = prompts[0, : self.shared]
        observed = (self.turns, self.episodes, self.observation)
        return prompts, rng.integers(0, vocabulary, observed)


class Ours:
    """The engine."""

    def __init__(self, config: ModelConfig, params: Params, load: Load) -> None:
        self._load = load
        self._engine = Engine(
            config,
            params,
            slots=load.episodes,
            context_length=load.context,
            sampling=Sampling(max_new_tokens=load.response),
            end_of_turn=(-1,),
            seed=0,
        )
        self._engine.warm_up()
        self._vocabulary = config.vocab_size
        self.compiled = self._engine.compiled

    def play(self, seed: int) -> tuple[float, Usage]:
        """(seconds of all turns of all episodes, what the engine did)."""
        prompts, observations = self._load.script(self._vocabulary, seed)
        self._set(self._load.response)
        before, started = dataclasses.replace(self._engine.usage), time.perf_counter()
        for slot, prompt in enumerate(prompts):
            self._engine.open(slot, slot)
            self._engine.submit(slot, [*prompt.tolist(), *observations[0, slot].tolist()])
        turn = np.zeros(len(prompts), int)
        while self._engine.busy:
            for slot in self._engine.advance():
                turn[slot] += 1
                if turn[slot] < self._load.turns:
                    self._engine.submit(slot, observations[turn[slot], slot].tolist())
        seconds = time.perf_counter() - started
        assert self._engine.compiled == self.compiled
        return seconds, self._engine.usage.since(before)

    def decode(self, seed: int) -> tuple[float, list[tuple[list[int], list[float]]]]:
        """(tokens a second of plain decoding, each conversation's ids and log-probs)."""
        prompts, _ = self._load.script(self._vocabulary, seed)
        self._set(self._load.decode)
        before = dataclasses.replace(self._engine.usage)
        for slot, prompt in enumerate(prompts):
            self._engine.open(slot, slot)
            self._engine.submit(slot, prompt.tolist())
        written: dict[int, tuple[list[int], list[float]]] = {}
        while self._engine.busy:
            for slot, response in self._engine.advance().items():
                written[slot] = (response.ids, response.log_probs)
        used = self._engine.usage.since(before)
        return used.generated / used.decode_s, [written[slot] for slot in range(len(prompts))]

    def _set(self, tokens: int) -> None:
        self._engine.sampling = dataclasses.replace(self._engine.sampling, max_new_tokens=tokens)


class Theirs:
    """transformers' model, in PyTorch."""

    def __init__(self, config: ModelConfig, params: Params, load: Load) -> None:
        self._torch = peers.torch()
        self._model = peers.model(config, jax.device_get(params), config.dtype).eval()
        self._load = load
        self._vocabulary = config.vocab_size
        self._generate(np.zeros((load.episodes, 8), int), 2)  # warms up

    def play(self, seed: int) -> float:
        """Seconds of all turns of all episodes."""
        conversation, observations = self._load.script(self._vocabulary, seed)
        started = time.perf_counter()
        for observation in observations:
            conversation = np.concatenate([conversation, observation], 1)
            conversation = self._generate(conversation, self._load.response)
        return time.perf_counter() - started

    def decode(self, seed: int) -> float:
        """Tokens a second: those after the first, which costs the prompt's encoding."""
        prompts, _ = self._load.script(self._vocabulary, seed)
        seconds = []
        for tokens in (1, 1 + self._load.decode):
            started = time.perf_counter()
            self._generate(prompts, tokens)
            seconds.append(time.perf_counter() - started)
        return self._load.episodes * self._load.decode / (seconds[1] - seconds[0])

    def log_probs(self, conversation: np.ndarray, last: int) -> np.ndarray:
        """[B, last] log-probabilities of the last tokens of conversations [B, T]."""
        ids = peers.tensor(conversation)
        with self._torch.inference_mode():
            logits = self._model(input_ids=ids, logits_to_keep=last + 1).logits[:, :-1]
            log_probs = self._torch.log_softmax(logits.float(), -1)
            return log_probs.gather(-1, ids[:, -last:, None])[..., 0].cpu().numpy()

    def _generate(self, conversation: np.ndarray, tokens: int) -> np.ndarray:
        ids = peers.tensor(conversation)
        with self._torch.inference_mode():
            made = self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                pad_token_id=0,
            )
        assert made.shape[1] == conversation.shape[1] + tokens
        return made.cpu().numpy()


def _check(ours: Ours, theirs: Theirs, load: Load, config: ModelConfig) -> float:
    """The largest difference of a written token's log-probability between the two.

    Raises:
      AssertionError: it is more than rounding: they do not compute the same.
    """
    prompts, _ = load.script(config.vocab_size, seed=99)
    _, written = ours.decode(seed=99)
    ids = np.array([ids for ids, _ in written])
    difference = theirs.log_probs(np.concatenate([prompts, ids], 1), load.decode) - np.array(
        [log_probs for _, log_probs in written]
    )
    found = float(np.abs(difference).max())
    assert found < _SAME[config.dtype], f"log-probabilities differ by {found} nats"
    return found


def _between(ours: Callable[[int], Any], theirs: Callable[[int], Any], rounds: int) -> tuple:
    """(our results, their results), each of theirs between two of ours."""
    mine, other = [ours(0)], []
    for i in range(rounds):
        other.append(theirs(2 * i + 1))
        mine.append(ours(2 * i + 2))
    return mine, other


def _load() -> tuple[ModelConfig, Params, str]:
    """The model of --policy, cut to --layers."""
    config, params, name = floor.model()
    layers = flags.FLAGS.layers
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
        params = params | {"layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
        name += f", its first {layers} layers"
    return config, params, name


def run() -> None:
    """Prints the figures and a last RESULT line."""
    peers.torch()  # an error before anything is done
    given = flags.FLAGS
    load = Load(
        episodes=given.episodes,
        turns=given.turns,
        prompt=given.prompt,
        shared=given.shared,
        observation=given.observation,
        response=given.response,
        decode=given.decode,
    )
    config, params, name = _load()
    theirs, ours = Theirs(config, params, load), Ours(config, params, load)
    print(f"model: {name}; {load}")
    same = _check(ours, theirs, load, config)
    print(f"largest difference of a token's log-probability: {same:.1e} nats", flush=True)
    rates = _between(lambda seed: ours.decode(seed)[0], theirs.decode, given.rounds or 1)
    played, their_seconds = _between(ours.play, theirs.play, given.rounds or 1)
    our_seconds = [seconds for seconds, _ in played]
    our_rate, their_rate = (float(np.mean(each)) for each in rates)
    our_time, their_time = float(np.mean(our_seconds)), float(np.mean(their_seconds))
    print(f"{'':28}{'ours':>10}{'transformers':>14}{'ratio':>8}   each time")
    print(
        f"{'all turns, s':28}{our_time:10.1f}{their_time:14.1f}{their_time / our_time:8.2f}   "
        f"{_list(our_seconds)}; {_list(their_seconds)}"
    )
    print(
        f"{'plain decoding, tokens/s':28}{our_rate:10.0f}{their_rate:14.0f}"
        f"{our_rate / their_rate:8.2f}   {_list(rates[0])}; {_list(rates[1])}"
    )
    _against_floor(config, params, load, used=played[-1][1], seconds=our_seconds[-1], rate=our_rate)
    print(
        f"RESULT multiturn_ratio={their_time / our_time:.2f} "
        f"decode_ratio={our_rate / their_rate:.2f}"
    )


def _list(numbers: list[float]) -> str:
    return ", ".join(f"{number:.1f}" for number in numbers)


def _against_floor(
    config: ModelConfig, params: Params, load: Load, *, used: Usage, seconds: float, rate: float
) -> None:
    """Prints what the machine allows, and our share of it.

    Every token that is read passes the layers; a step that writes a token in every slot passes
    the vocabulary too, or takes as long as to read all weights once.
    """
    rates = floor.measure(config.dtype)
    layers, vocabulary = floor.layer_parameters(params), floor.vocabulary_parameters(config)
    a_weight = max(2.0 * load.episodes / rates.matmul, floor.weight_bytes(config) / rates.read)
    step = (layers + vocabulary) * a_weight
    least = 2.0 * layers * used.prefilled / rates.matmul + step * load.turns * load.response
    most = load.episodes / step
    print(rates)
    print(
        f"ours: {used.prefilled} tokens read in {used.prefill_s:.1f} s, {used.reused} copied, "
        f"{used.generated} written in {used.decode_s:.1f} s, occupancy {used.occupancy:.0%}, "
        f"host {seconds - used.prefill_s - used.decode_s:.2f} s"
    )
    print(
        f"floor: all turns {least:.1f} s (share {least / seconds:.0%}), plain decoding "
        f"{most:.0f} tokens/s (share {rate / most:.0%})"
    )
