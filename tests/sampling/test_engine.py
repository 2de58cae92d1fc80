"""The engine against plain decoding that encodes the whole conversation anew for every token."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax import batching
from spa_jax.models import transformer
from spa_jax.sampling import decode
from spa_jax.sampling.engine import Engine, Response
from spa_jax.training import forward
from spa_jax.trajectory import Sampling, Status, Step, Trajectory
from tests import tiny

CONFIG = tiny.tiny_config()
PARAMS = tiny.tiny_params(CONFIG)
EOT, SEED, CONTEXT = 2, 5, 192
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)
DRAWN = Sampling(temperature=0.8, max_new_tokens=6)


@dataclasses.dataclass
class Episode:
    """A conversation whose context turns are given, and what the policy wrote in it."""

    number: int
    contexts: list[list[int]]
    ids: list[int] = dataclasses.field(default_factory=list)
    step_id: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    turn: int = 0

    def read(self) -> list[int]:
        context = self.contexts[self.turn]
        self.ids += context
        self.step_id += [-1] * len(context)
        self.log_probs += [0.0] * len(context)
        return context

    def write(self, ids: list[int], log_probs: list[float]) -> None:
        self.ids += ids
        self.step_id += [self.turn] * len(ids)
        self.log_probs += log_probs
        self.turn += 1


def _episodes(seed: int = 0, count: int = 7) -> list[Episode]:
    """Openings of 1 to 70 tokens (below, at and above the chunks), later turns of 1 to 20."""
    rng = np.random.default_rng(seed)
    lengths = [1, 8, 9, 32, 33, 64, 70]
    return [
        Episode(
            number=2**32 - 1 - i,
            contexts=[
                rng.integers(3, 384, n).tolist()
                for n in (lengths[i % 7], *rng.integers(1, 21, int(rng.integers(1, 4))))
            ],
        )
        for i in range(count)
    ]


def _engine(slots: int, sampling: Sampling, context_length: int = CONTEXT, params=PARAMS) -> Engine:
    return Engine(
        CONFIG, params, slots=slots, context_length=context_length, sampling=sampling,
        end_of_turn=EOT, seed=SEED,
    )  # fmt: skip


@functools.cache
def _shared_engine(slots: int, sampling: Sampling) -> Engine:
    """Compiled once; every test opens its slots anew."""
    return _engine(slots, sampling)


def _play(engine: Engine, episodes: list[Episode], seed: int) -> list[Episode]:
    """Plays them in a random order of slots, episodes, and of who is ready in a round."""
    rng = random.Random(seed)
    waiting, slots, busy = list(episodes), {}, set()
    rng.shuffle(waiting)
    while waiting or slots:
        free = [s for s in range(engine.slots) if s not in slots]
        rng.shuffle(free)
        for slot in free[: rng.randint(1, engine.slots)]:
            if waiting:
                slots[slot] = waiting.pop()
                engine.open(slot, slots[slot].number)
        idle = sorted(set(slots) - busy)
        for slot in rng.sample(idle, rng.randint(0 if busy else 1, len(idle))):
            engine.submit(slot, slots[slot].read())
            busy.add(slot)
        for slot, response in engine.advance().items():
            busy.remove(slot)
            episode = slots[slot]
            episode.write(response.ids, response.log_probs)
            if episode.turn == len(episode.contexts):
                del slots[slot]
        assert engine.busy == bool(busy)
    return sorted(episodes, key=lambda e: e.number)


def _turn(engine: Engine, contexts: dict[int, list[int]]) -> dict[int, Response]:
    """One turn in each of the slots."""
    for slot, ids in contexts.items():
        engine.submit(slot, ids)
    responses = {}
    while engine.busy:
        responses |= engine.advance()
    assert responses.keys() == contexts.keys()
    return responses


@functools.partial(jax.jit, static_argnums=2)
def _next(ids, length, sampling: Sampling, number):
    """The next token of a conversation, from all of it."""
    positions = jnp.arange(ids.shape[1])[None]
    hidden = transformer.hidden_states(CONFIG, PARAMS, ids, positions, jnp.ones_like(ids))
    logits = transformer.logits(PARAMS, hidden[:, length - 1])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), number), length)
    return decode.draw(
        logits, key[None], temperature=sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p,
    )  # fmt: skip


def _plain(episode: Episode, sampling: Sampling) -> Episode:
    """The same conversation without an engine, a cache or a batch."""
    out = Episode(episode.number, episode.contexts)
    for _ in episode.contexts:
        out.read()
        ids, log_probs = [], []
        while len(ids) < sampling.max_new_tokens and EOT not in ids:
            padded = np.zeros((1, CONTEXT), np.int32)
            sofar = out.ids + ids
            padded[0, : len(sofar)] = sofar
            token, log_prob = _next(padded, len(sofar), sampling, np.uint32(episode.number))
            ids, log_probs = [*ids, int(token[0])], [*log_probs, float(log_prob[0])]
        out.write(ids, log_probs)
    return out


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_engine_writes_what_plain_decoding_writes(sampling):
    wanted = [_plain(e, sampling) for e in sorted(_episodes(), key=lambda e: e.number)]
    if sampling is DRAWN:
        ends = {len(e.ids) for e in wanted}
        assert len(ends) > 3, "all episodes are alike"
    for slots, seed in ((4, 0), (4, 1), (4, 2), (1, 3)):
        played = _play(_shared_engine(slots, sampling), _episodes(), seed)
        for ours, theirs in zip(played, wanted, strict=True):
            assert ours.ids == theirs.ids and ours.step_id == theirs.step_id
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)


def test_another_episode_or_seed_gives_other_tokens():
    ours = _episodes(count=1)[0]
    other = dataclasses.replace(_episodes(count=1)[0], number=7)
    engine = _shared_engine(4, DRAWN)
    _play(engine, [ours], 0), _play(engine, [other], 0)
    assert ours.ids != other.ids


def test_recorded_log_probs_are_those_of_the_training_forward():
    episodes = _play(_shared_engine(4, DRAWN), _episodes(seed=1), 0)
    trajectories = [
        Trajectory(
            env="alfworld", task=str(e.number), split="train", seed=0, attempt=0, policy="tiny",
            status=Status.MAX_STEPS, final_reward=0.0, instruction="", sampling=DRAWN,
            steps=(Step("", "", "", True),) * e.turn, token_ids=tuple(e.ids),
            step_id=tuple(e.step_id), log_probs=tuple(e.log_probs),
        )
        for e in episodes
    ]  # fmt: skip
    rows = batching.pack(trajectories, row_length=256, policy_slots=96, step_slots=16)
    assert len(rows.tokens) < len(episodes), "nothing is packed together"
    score = jax.jit(functools.partial(forward.score, CONFIG, temperature=DRAWN.temperature))
    scored = score({"policy": PARAMS}, rows)["log_probs"]
    mask = rows.token_mask > 0
    assert mask.sum() == sum(s >= 0 for e in episodes for s in e.step_id)
    np.testing.assert_allclose(np.asarray(scored)[mask], rows.log_probs[mask], atol=1e-4)


def test_nothing_is_encoded_twice():
    engine = _shared_engine(4, DRAWN)
    before, written = engine.prefilled_tokens, engine.generated_tokens
    episodes = _play(engine, _episodes(), 4)
    context = sum(len(c) for e in episodes for c in e.contexts)
    turns = sum(e.turn - 1 for e in episodes)  # the last token of a turn opens the next chunk
    assert engine.prefilled_tokens - before == context + turns
    wrote = sum(s >= 0 for e in episodes for s in e.step_id)
    assert engine.generated_tokens - written == wrote


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_what_episodes_open_with_is_encoded_once(sampling):
    opening = np.random.default_rng(9).integers(3, 384, 40).tolist()

    def episodes():
        made = _episodes(seed=2)
        for i, e in enumerate(made):
            e.contexts[0] = opening[: 40 - i] + e.contexts[0]
        return made

    wanted = [_plain(e, sampling) for e in sorted(episodes(), key=lambda e: e.number)]
    for seed in (0, 1):
        engine = _engine(4, sampling)
        played = _play(engine, episodes(), seed)
        for ours, theirs in zip(played, wanted, strict=True):
            assert ours.ids == theirs.ids
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
        context = sum(len(c) for e in played for c in e.contexts)
        turns = sum(e.turn - 1 for e in played)
        assert engine.prefilled_tokens + engine.reused_tokens == context + turns
        assert engine.reused_tokens >= 34 * 6  # all but the first episode's


def test_nothing_is_compiled_after_the_first_shapes():
    engine = _engine(4, DRAWN)
    rng = np.random.default_rng(0)
    for length in (3, 20, 30, 40):
        engine.open(0, length)
        _turn(engine, {0: rng.integers(3, 384, length).tolist()})
    sizes = engine._prefill._cache_size(), engine._decode._cache_size()
    assert sizes == (4, 1)  # four lengths of a chunk
    _play(engine, _episodes(count=14), 0)
    assert (engine._prefill._cache_size(), engine._decode._cache_size()) == sizes


def test_the_cache_is_updated_in_place():
    engine = _shared_engine(4, DRAWN)

    def pointers():
        return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(engine._state.cache)]

    for slot in range(4):
        engine.open(slot, slot)
    before, old = pointers(), engine._state
    _turn(engine, {slot: [5] * 20 for slot in range(4)})
    _turn(engine, {1: [6]})
    assert pointers() == before
    assert all(x.is_deleted() for x in jax.tree.leaves(old.cache))


def test_a_turn_ends_at_its_limit_or_when_the_context_is_full():
    never = tiny.tiny_params(CONFIG, ends=-20.0)  # the end of turn is never drawn
    engine = _engine(1, DRAWN, context_length=24, params=never)
    engine.open(0, 1)
    assert engine.fits(0, [5] * 23) and not engine.fits(0, [5] * 24)
    response = _turn(engine, {0: [5] * 10})[0]
    assert len(response.ids) == 6 and not response.ended  # max_new_tokens
    assert len(response.log_probs) == 6
    # 10 + 6 tokens so far (one of them not fed yet): room for 7 and one more token.
    assert engine.fits(0, [5] * 7) and not engine.fits(0, [5] * 8)
    response = _turn(engine, {0: [5] * 5})[0]
    # 21 in the cache: 3 more are fed, and the token after the last place is still drawn.
    assert len(response.ids) == 4 and not response.ended
    assert int(engine._state.length[0]) == 24
    # A full slot is free for the next conversation, which sees nothing of it.
    engine.open(0, 9)
    again = _turn(engine, {0: [7] * 3})
    fresh = _engine(1, DRAWN, context_length=24, params=never)
    fresh.open(0, 9)
    assert again == _turn(fresh, {0: [7] * 3})
