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
from spa_jax.sampling import decode, programs
from spa_jax.sampling.decode import PrefillRows
from spa_jax.sampling.engine import Ending, Engine, Response
from spa_jax.sampling.parallel import ParallelEngine
from spa_jax.sampling.tuning import CPU
from spa_jax.training import forward
from spa_jax.trajectory import Sampling, Status, Step, Trajectory
from tests import tiny

CONFIG = tiny.tiny_config()
PARAMS = tiny.tiny_params(CONFIG)
EOT, SEED, CONTEXT = 2, 5, 192
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)
DRAWN = Sampling(temperature=0.8, max_new_tokens=6)
STOPPED = dataclasses.replace(DRAWN, stop=("ab", "dd", "bcb"))


def _text(ids) -> str:
    """A letter a token, of four; none for the end of turn."""
    return "".join("abcd"[i % 4] for i in ids if i != EOT)


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


def _engine(
    slots: int, sampling: Sampling, context_length: int = CONTEXT, params=PARAMS, **settings
) -> Engine:
    settings = {"end_of_turn": (EOT,), "seed": SEED, "text": _text} | settings
    return Engine(
        CONFIG, params, slots=slots, context_length=context_length, sampling=sampling, **settings
    )


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
    )


def _plain(episode: Episode, sampling: Sampling) -> Episode:
    """The same conversation without an engine, a cache or a batch."""
    out = Episode(episode.number, episode.contexts)
    for _ in episode.contexts:
        out.read()
        ids, log_probs = [], []
        while (
            len(ids) < sampling.max_new_tokens
            and EOT not in ids
            and not any(stop in _text(ids) for stop in sampling.stop)
        ):
            padded = np.zeros((1, CONTEXT), np.int32)
            sofar = out.ids + ids
            padded[0, : len(sofar)] = sofar
            token, log_prob = _next(padded, len(sofar), sampling, np.uint32(episode.number))
            ids, log_probs = [*ids, int(token[0])], [*log_probs, float(log_prob[0])]
        out.write(ids, log_probs)
    return out


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, STOPPED], ids=["greedy", "drawn", "stopped"])
def test_the_engine_writes_what_plain_decoding_writes(sampling):
    wanted = [_plain(e, sampling) for e in sorted(_episodes(), key=lambda e: e.number)]
    if sampling is not GREEDY:
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
    ]
    rows = batching.pack(trajectories, row_length=256, policy_slots=96, step_slots=16)
    assert len(rows.tokens) < len(episodes), "nothing is packed together"
    score = jax.jit(functools.partial(forward.score, CONFIG, temperature=DRAWN.temperature))
    scored = score({"policy": PARAMS}, rows)["log_probs"]
    mask = rows.token_mask > 0
    assert mask.sum() == sum(s >= 0 for e in episodes for s in e.step_id)
    np.testing.assert_allclose(np.asarray(scored)[mask], rows.log_probs[mask], atol=1e-4)


def test_nothing_is_encoded_twice():
    engine = _shared_engine(4, DRAWN)
    before = dataclasses.replace(engine.usage)
    episodes = _play(engine, _episodes(), 4)
    context = sum(len(c) for e in episodes for c in e.contexts)
    turns = sum(e.turn - 1 for e in episodes)  # the last token of a turn opens the next chunk
    used = engine.usage.since(before)
    assert used.prefilled + used.reused == context + turns
    wrote = sum(s >= 0 for e in episodes for s in e.step_id)
    assert used.generated == wrote
    assert 0 < used.occupancy <= 1 and used.places % 4 == 0
    assert used.prefill_s > 0 and used.decode_s > 0


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
        assert engine.usage.prefilled + engine.usage.reused == context + turns
        assert engine.usage.reused >= 34 * 6  # all but the first episode's


def test_rollouts_of_a_task_share_its_first_observation():
    """All come at once: tasks of 3, 2 and 2 rollouts after the same instruction."""
    rng = np.random.default_rng(3)
    instruction = rng.integers(3, 384, 60).tolist()
    tasks = [rng.integers(3, 384, n).tolist() for n in (40, 30, 50)]
    order = [0, 1, 0, 2, 1, 2, 0]
    engine = _engine(7, DRAWN)
    for slot in range(7):
        engine.open(slot, 100 + slot)
    turns = _turn(engine, {slot: instruction + tasks[task] for slot, task in enumerate(order)})
    whole = sum(60 + len(tasks[task]) for task in order)
    assert engine.usage.prefilled + engine.usage.reused == whole
    # The instruction and each observation once, and fewer than 16 tokens of each other rollout.
    assert engine.usage.prefilled < 60 + 40 + 30 + 50 + 4 * 16
    for slot, task in enumerate(order):
        alone = _plain(Episode(100 + slot, [instruction + tasks[task]]), DRAWN)
        assert turns[slot].ids == alone.ids[60 + len(tasks[task]) :]


def test_nothing_is_compiled_after_the_warm_up():
    programs.of.cache_clear()
    engine = _engine(4, DRAWN)
    assert engine.compiled == 0
    engine.warm_up()
    assert engine.compiled == len(CPU.chunks) + 2  # a prefill for each length; copy and decode
    _play(engine, _episodes(count=14), 0)
    assert engine.compiled == len(CPU.chunks) + 2
    state = engine._state
    with pytest.raises(AssertionError, match="would be compiled after the warm-up"):
        tokens, row = np.zeros((1, 7), np.int32), np.zeros(1, np.int32)
        rows = PrefillRows(slots=row, tokens=tokens, starts=row, counts=row, newest=row > 0)
        engine._programs.prefill(engine._params, state, rows)


def test_new_weights_compile_nothing_and_see_nothing_of_the_old_cache():
    other = tiny.tiny_params(CONFIG, seed=1)
    first = _engine(4, DRAWN)
    first.warm_up()
    old = _play(first, _episodes(), 0)
    second = _engine(4, DRAWN, params=other)
    new = _play(second, _episodes(), 0)
    assert second.compiled == first.compiled == len(CPU.chunks) + 2
    assert second.usage.reused == 0
    assert [e.ids for e in new] != [e.ids for e in old]
    programs.of.cache_clear()
    fresh = _play(_engine(4, DRAWN, params=other), _episodes(), 0)
    assert [e.ids for e in new] == [e.ids for e in fresh]


def test_a_slots_device_changes_no_token():
    """Three devices, two slots each, played at the same time."""
    one = _play(_shared_engine(4, DRAWN), _episodes(), 0)

    def make(slots, devices):
        return _engine(slots, DRAWN, devices=devices)

    engine = ParallelEngine(make, 7, [(device,) for device in jax.local_devices()[:3]])
    assert engine.slots == 6
    engine.warm_up()
    compiled = engine.compiled
    used = {next(iter(part._state.hidden.devices())) for part in engine._engines}
    assert used == set(jax.local_devices()[:3])
    for seed in (1, 2):
        for ours, theirs in zip(_play(engine, _episodes(), seed), one, strict=True):
            assert ours.ids == theirs.ids
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
    assert engine.compiled == compiled
    wrote = sum(s >= 0 for e in one for s in e.step_id)
    assert engine.usage.generated == 2 * wrote


def test_any_of_several_ids_ends_a_turn():
    ends = (EOT, *range(3, 60))
    engine, plain = _engine(1, DRAWN, end_of_turn=ends), _shared_engine(1, DRAWN)
    last = set()
    for number in range(20):
        turns = []
        for one in (engine, plain):
            one.open(0, number)
            turns.append(_turn(one, {0: [5] * 10})[0])
        ours, theirs = turns
        assert ours.ids == theirs.ids[: len(ours.ids)]
        assert not set(ends).intersection(ours.ids[:-1])
        assert ours.ended == (ours.ids[-1] in ends)
        last.add(ours.ids[-1])
    assert EOT in last and last.intersection(ends[1:])


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
    assert len(response.ids) == 6 and not response.ended
    assert response.ending is Ending.MAX_TOKENS
    assert len(response.log_probs) == 6
    # 10 + 6 tokens so far (one of them not fed yet): room for 7 and one more token.
    assert engine.fits(0, [5] * 7) and not engine.fits(0, [5] * 8)
    response = _turn(engine, {0: [5] * 5})[0]
    # 21 in the cache: 3 more are fed, and the token after the last place is still drawn.
    assert len(response.ids) == 4 and not response.ended
    assert response.ending is Ending.CONTEXT_FULL
    assert int(engine._state.length[0]) == 24
    # A full slot is free for the next conversation, which sees nothing of it.
    engine.open(0, 9)
    again = _turn(engine, {0: [7] * 3})
    fresh = _engine(1, DRAWN, context_length=24, params=never)
    fresh.open(0, 9)
    assert again == _turn(fresh, {0: [7] * 3})


def test_a_turn_ends_with_the_first_stop_string_and_the_conversation_goes_on():
    ended = {ending: 0 for ending in Ending}
    engine = _shared_engine(4, STOPPED)
    for number in range(12):
        engine.open(number % 4, number)
        for _ in range(3):
            response = _turn(engine, {number % 4: [9, 6, 8, 10]})[number % 4]
            ended[response.ending] += 1
            text = _text(response.ids)
            found = [stop for stop in STOPPED.stop if stop in text]
            assert (response.stop in found) if found else response.stop == ""
            assert (response.ending is Ending.STOP) == bool(found)
            assert not any(stop in _text(response.ids[:-1]) for stop in STOPPED.stop)
            assert len(response.log_probs) == len(response.ids)
    assert ended[Ending.STOP] > 3 and ended[Ending.END_OF_TURN] > 3, ended


def test_a_turn_that_takes_too_long_is_cut_and_kept():
    never = tiny.tiny_params(CONFIG, ends=-20.0)
    long = dataclasses.replace(DRAWN, max_new_tokens=30)
    slow = _engine(1, long, params=never, turn_deadline_s=1e-9)
    free = _engine(1, long, params=never)
    for engine in (slow, free):
        engine.open(0, 3)
    cut, whole = (_turn(engine, {0: [5] * 10})[0] for engine in (slow, free))
    assert cut.ending is Ending.DEADLINE and not cut.ended
    assert 0 < len(cut.ids) < 30 == len(whole.ids)
    assert cut.ids == whole.ids[: len(cut.ids)] and cut.log_probs == whole.log_probs[: len(cut.ids)]
    assert not slow.busy
