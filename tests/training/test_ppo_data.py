"""From episodes to batches: tables by hand, and what changes no advantage and no loss term.

The decoder is replaced by one that sees the current token only (`_sees_one_token`), so that "the
same log-probs and values" holds whatever else stands in the context; all else is the real thing.
"""

import dataclasses
import functools
import itertools
import random

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from spa_jax import batching
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.rl import advantages, objectives
from spa_jax.stage_config import PpoConfig
from spa_jax.training import forward, ppo_data, ppo_update
from spa_jax.trajectory import Sampling, Status, Step, Trajectory
from tests import tiny

CONFIG = tiny.tiny_config()
# Rows of one episode or of several, alone or two at once, on one device or two.
LAYOUTS = (
    (RowsConfig(row_length=40, policy_slots=12, step_slots=4, rows_per_device=1), 2),
    (RowsConfig(row_length=96, policy_slots=40, step_slots=12, rows_per_device=2,
                share_prefix=False), 1),
)
TERMS = {"kl_coef": 0.1, "entropy_coef": 0.01, "value_coef": 0.5, "gamma": 0.9}
OBJECTIVES = {
    "ppo": PpoConfig(**TERMS),
    "gae=token": PpoConfig(**TERMS, gae="token"),
    "kl=reward": PpoConfig(**TERMS, kl="reward"),
    "both": PpoConfig(**TERMS, kl="reward", gae="token"),
    "step baseline": PpoConfig(**TERMS, step_baseline=True),
    "grpo": PpoConfig(**TERMS, objective="grpo"),
    "rloo": PpoConfig(**TERMS, objective="rloo", kl="reward"),
    "reinforce++": PpoConfig(**TERMS, objective="reinforce++", truncate_ratio=2.0),
    "gigpo": PpoConfig(**TERMS, objective="gigpo"),
    "gagpo": PpoConfig(**TERMS, objective="gagpo"),
    "ragen": PpoConfig(**TERMS | {"kl_coef": 0.0}, objective="ragen"),
}


@functools.cache
def _params():
    value = heads.Head(width=8).init(jax.random.key(1), jnp.zeros((1, 32)))["params"]
    value["out"]["kernel"] = jnp.ones_like(value["out"]["kernel"]) * 0.3  # not 0 from the start
    return {"policy": tiny.tiny_params(CONFIG), "value": value}


@pytest.fixture
def sees_one_token(monkeypatch):
    monkeypatch.setattr(
        forward, "rows_hidden",
        lambda config, params, rows, lower_states=None: params["embed"]["embedding"][rows.tokens],
    )


def _episode(task, attempt, steps, rewards, seed, *, extra=0):
    """`steps` holds (context, response) lengths; `extra` context tokens come before each step."""
    rng, more = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    ids, step_id, log_probs, ref = [], [], [], []
    for k, (read, wrote) in enumerate(steps):
        ids += more.integers(3, 384, extra).tolist() + rng.integers(3, 384, read + wrote).tolist()
        step_id += [-1] * (extra + read) + [k] * wrote
        for numbers in (log_probs, ref):
            numbers += [0.0] * (extra + read) + (-6 - rng.random(wrote)).tolist()
    return Trajectory(
        env="alfworld", task=task, split="train", seed=0, attempt=attempt, policy="tiny",
        status=Status.SUCCESS if attempt % 2 else Status.MAX_STEPS, final_reward=attempt % 2,
        instruction="", sampling=Sampling(), token_ids=tuple(ids), step_id=tuple(step_id),
        log_probs=tuple(log_probs), ref_log_probs=tuple(ref),
        steps=tuple(
            Step("", "", "look", True, contribution=0.0, reward=r) for r in rewards[: len(steps)]
        ),
    )


def test_a_state_is_what_a_task_was_told_before_the_step():
    def told(task, *observations):
        steps = tuple(Step(o, "", "look", True) for o in observations)
        made = _episode(task, 0, [(2, 1)] * len(steps), [0] * 3, 0)
        return dataclasses.replace(made, steps=steps)

    found = ppo_data.states(
        [told("a", "A room.", "A box.", "A room. "), told("a", "A room."), told("b", "A room.")]
    )
    assert found[0, 0] == found[0, 2] == found[1, 0]
    assert len({found[0, 0], found[0, 1], found[2, 0]}) == 3 and found.max() < found.size


def _values(episodes, ppo, salt):
    """A value for each (episode, step) or (episode, policy token), whatever the context."""
    if not objectives.OBJECTIVES[ppo.objective].critic:
        return None
    by_token = ppo.gae == "token"
    width = max(len(t.token_ids if by_token else t.steps) for t in episodes)
    out = np.zeros((len(episodes), width), np.float32)
    for i, t in enumerate(episodes):
        step_id = np.asarray(t.step_id)
        at = np.flatnonzero(step_id >= 0) if by_token else np.unique(step_id[step_id >= 0])
        rng = np.random.default_rng([salt, *map(ord, t.task), t.attempt])
        out[i, at] = rng.normal(size=len(at))
    return out


@functools.cache
def _compiled(ppo):
    over_devices = functools.partial(jax.vmap, in_axes=(None, None, 0, None))
    loss = jax.jit(over_devices(ppo_update.make_loss(CONFIG, ppo, 0.7)))
    log_probs = ppo_update.make_log_probs(CONFIG, 0.7)
    return loss, jax.jit(jax.vmap(lambda p, rows: log_probs(p, {}, rows, None), in_axes=(None, 0)))


def _terms(episodes, ppo, layout):
    """(the loss, its sums, {(key, step or token number): advantage}, counts)."""
    rows, devices = layout
    loss_fn, log_probs = _compiled(ppo)
    table = ppo_data.make_table(episodes, _values(episodes, ppo, 5), ppo)
    update = ppo_data.make_update(
        episodes, table, np.arange(len(episodes)), rows, ppo, devices=devices,
        log_probs=lambda part, _: np.asarray(log_probs(_params(), part)),
    )
    parts = [loss_fn(_params(), {}, batch, update.counts) for batch in update.batches]
    loss, sums = jax.tree.map(lambda *x: float(sum(map(jnp.sum, x))), *parts)
    white = ppo_data.by_place(update.table, ppo)["advantages"]
    found = {}
    for i, t in enumerate(episodes):
        numbers = white[i][update.table.mask[i] > 0]
        found |= {(t.key, j): float(a) for j, a in enumerate(numbers)}
    return loss, sums, found, update.counts


LENGTHS = st.lists(st.tuples(st.integers(2, 4), st.integers(1, 3)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_context_padding_packing_order_and_devices_change_nothing(name, sees_one_token):
    """Also with episodes of one step and of one token, and where no reward was paid."""
    ppo = OBJECTIVES[name]

    @hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
    @hypothesis.given(
        st.lists(LENGTHS, min_size=3, max_size=3), st.booleans(), st.integers(0, 99),
        st.sampled_from((0, 3)), st.randoms(use_true_random=False),
    )
    @hypothesis.example([[(2, 1)], [(3, 1)], [(2, 1), (2, 3)]], False, 0, 3, random.Random(0))
    def check(lengths, paid, seed, extra, shuffler):
        lengths = [[(4, 3)] * 3, *lengths]  # the longest: every table has one of few shapes
        rewards = np.random.default_rng(seed).normal(size=(len(lengths), 3)) * paid
        made = [
            [
                _episode(f"task_{i // 3}", i, steps, rewards[i].tolist(), seed + i, extra=more)
                for i, steps in enumerate(lengths)
            ]
            for more in (0, extra)
        ]
        shuffler.shuffle(made[1])
        loss, sums, white, counts = _terms(made[0], ppo, LAYOUTS[0])
        loss_2, sums_2, white_2, counts_2 = _terms(made[1], ppo, LAYOUTS[1])
        assert counts_2 == counts and white_2.keys() == white.keys()
        assert np.isfinite(loss) and all(np.isfinite(list(sums.values())))
        for key, value in white.items():
            assert white_2[key] == pytest.approx(value, abs=2e-3), key
        assert loss_2 == pytest.approx(loss, rel=1e-4, abs=2e-3)
        for key, value in sums.items():
            assert sums_2[key] == pytest.approx(value, rel=1e-4, abs=2e-2), key

    check()


def _four():
    lengths = [[(3, 2), (2, 1)], [(2, 3)], [(4, 1)], [(2, 2), (3, 2), (2, 1)]]
    rewards = np.random.default_rng(0).normal(size=(4, 3)).tolist()
    return [_episode(f"t{i // 2}", i, s, rewards[i], i) for i, s in enumerate(lengths)]


@pytest.mark.parametrize("name", ["ppo", "gae=token"])
def test_a_row_without_policy_tokens_poisons_nothing(name, sees_one_token):
    """Whatever lies in its unused slots: it adds nothing to the loss or to a gradient."""
    ppo, (rows, _) = OBJECTIVES[name], LAYOUTS[0]
    rows = dataclasses.replace(rows, rows_per_device=6)
    episodes = _four()
    empty = dataclasses.replace(
        _episode("t0", 9, [(6, 1)], [0.0], 9), step_id=(-1,) * 7, steps=(), ref_log_probs=None
    )
    found = []
    for given in (episodes, [*episodes, empty]):
        table = ppo_data.make_table(given, _values(given, ppo, 5), ppo)
        update = ppo_data.make_update(given, table, np.arange(len(given)), rows, ppo, devices=1)
        (batch,) = (jax.tree.map(lambda x: np.array(x[0]), b) for b in update.batches)
        unused = batch.rows.token_mask.sum(1) == 0
        assert unused.sum() == 4
        if given is not episodes:
            for array in (batch.rows.log_probs, batch.rows.ref_log_probs, batch.advantages,
                          batch.returns, batch.old_values):
                array[unused] = [np.nan, np.inf, *[np.nan] * (array.shape[1] - 2)]
        loss_fn = ppo_update.make_loss(CONFIG, ppo, 0.7)
        run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        found.append(run(_params(), {}, batch, update.counts))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_the_numerical_ones(name, monkeypatch):
    """The whole loss in float64, with a softmax over a table as the policy."""
    # A truncated ratio's gradient is not the loss's: tests/rl/test_losses.py.
    ppo, (rows, _) = dataclasses.replace(OBJECTIVES[name], truncate_ratio=0.0), LAYOUTS[1]
    episodes = _four()
    table = ppo_data.make_table(episodes, _values(episodes, ppo, 5), ppo)
    update = ppo_data.make_update(
        episodes, table, np.arange(4), rows, ppo, devices=1,
        log_probs=lambda part, _: np.random.default_rng(3).normal(-6, 0.5, part.targets.shape),
    )
    (batch,) = (jax.tree.map(lambda x: np.array(x[0]), b) for b in update.batches)
    monkeypatch.setattr(forward, "rows_hidden", lambda c, p, rows, b=None: p["e"][rows.tokens])
    monkeypatch.setattr(
        forward, "policy_logits", lambda p, hidden, rows, t: forward.at(hidden, rows.token_index)
        @ p["w"] / t,
    )
    monkeypatch.setattr(heads, "read", lambda p, hidden: jnp.tanh(hidden @ p))
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        policy = {"e": rng.normal(size=(384, 3)), "w": rng.normal(size=(3, 384))}
        params = {"policy": policy, "value": rng.normal(size=3)}

        def loss(p):
            return ppo_update.make_loss(CONFIG, ppo, 0.7)(p, {}, batch, update.counts)[0]

        assert jax.eval_shape(loss, params).dtype == jnp.float64
        check_grads(jax.jit(loss), (params,), order=1, modes="rev", atol=1e-6, rtol=1e-6)


# --- tables ---------------------------------------------------------------------------------


def test_gae_over_policy_tokens_by_hand():
    """gamma = lambda = 1/2, two steps of two tokens and of one; context is no place."""
    episode = _episode("t", 0, [(2, 2), (3, 1)], [1.0, 2.0], 0)
    values = np.zeros((1, 8), np.float32)
    values[0, [2, 3, 7]] = [0.5, 1.0, -1.0]
    ppo = PpoConfig(gae="token", gamma=0.5, gae_lambda=0.5)
    table = ppo_data.make_table([episode], values, ppo)
    np.testing.assert_array_equal(table.rewards, [[0, 0, 0, 1, 0, 0, 0, 2]])
    np.testing.assert_array_equal(table.mask, [[0, 0, 1, 1, 0, 0, 0, 1]])
    # delta = [0 + .5 - .5, 1 - .5 - 1, 2 + 1], A = delta + A_next / 4
    np.testing.assert_allclose(table.advantages, [[0, 0, 0.0625, 0.25, 0, 0, 0, 3]])
    np.testing.assert_allclose(table.returns, [[0, 0, 0.5625, 1.25, 0, 0, 0, 2]])
    packed = batching.pack([episode], row_length=16, policy_slots=4, step_slots=2)
    slots = ppo_data._scatter_tokens(table.advantages, packed)
    np.testing.assert_allclose(slots, [[0.0625, 0.25, 3, 0]])
    back = ppo_data.gather_policy_tokens(slots, packed, (1, 8))
    np.testing.assert_allclose(back, table.advantages)


def test_one_token_a_step_and_the_two_gae_agree():
    episodes = [_episode("t", i, [(2, 1)] * 3, [0.5, -1.0, i], i) for i in range(3)]
    values = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    by_token = np.zeros((3, 9), np.float32)
    by_token[:, [2, 5, 8]] = values
    step = ppo_data.make_table(episodes, values, PpoConfig())
    token = ppo_data.make_table(episodes, by_token, PpoConfig(gae="token"))
    np.testing.assert_allclose(token.advantages[:, [2, 5, 8]], step.advantages, rtol=1e-6)
    assert np.count_nonzero(token.advantages) == 9


@pytest.mark.parametrize("name", ["kl=reward", "both", "rloo"])
def test_a_kl_in_the_reward_is_summed_a_step_and_discounted(name):
    """As if the rewards had been less by it; a group's baseline is that of the rewards alone."""
    ppo, episodes = OBJECTIVES[name], _four()
    log_probs = {t.key: np.random.default_rng(i).normal(-6, 1, len(t.token_ids))
                 for i, t in enumerate(episodes)}
    rows = LAYOUTS[1][0]

    def now(part, _):
        used, trajectory, position = ppo_data._places_of_tokens(part)
        out = np.zeros(used.shape)
        out[used] = [log_probs[episodes[i].key][at]
                     for i, at in zip(trajectory, position, strict=True)]
        return out

    def charged(t):
        ratio = log_probs[t.key] - np.asarray(t.ref_log_probs)
        kl = [ratio[np.asarray(t.step_id) == k].sum() for k in range(len(t.steps))]
        steps = [dataclasses.replace(s, reward=s.reward - 0.1 * x)
                 for s, x in zip(t.steps, kl, strict=True)]
        return dataclasses.replace(t, steps=tuple(steps))

    values = _values(episodes, ppo, 5)
    plain = ppo_data.make_table(episodes, values, ppo)
    update = ppo_data.make_update(
        episodes, plain, np.arange(4), rows, ppo, devices=1, log_probs=now
    )
    wanted = ppo_data.make_table([charged(t) for t in episodes], values, ppo)
    for field in ("rewards", "returns"):
        ours, theirs = getattr(update.table, field), getattr(wanted, field)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if name == "rloo":
        change = wanted.returns - plain.returns
        np.testing.assert_allclose(update.table.advantages - plain.advantages, change, atol=1e-5)
    else:
        np.testing.assert_allclose(update.table.advantages, wanted.advantages, atol=1e-5)
    assert np.abs(update.table.advantages - plain.advantages).max() > 0.05


def test_with_recorded_log_probs_the_first_pass_has_no_kl():
    """Which is why those of the update's start are computed: here pi is the reference."""
    ppo = OBJECTIVES["kl=reward"]
    episodes = [dataclasses.replace(t, ref_log_probs=t.log_probs) for t in _four()]
    table = ppo_data.make_table(episodes, _values(episodes, ppo, 5), ppo)
    update = ppo_data.make_update(
        episodes, table, np.arange(4), LAYOUTS[1][0], ppo, devices=1,
        log_probs=lambda part, _: part.log_probs,
    )
    np.testing.assert_array_equal(update.table.advantages, table.advantages)


def test_whitened_only_where_the_objective_says_so():
    episodes = _four()
    for name, ppo in OBJECTIVES.items():
        table = ppo_data.make_table(episodes, _values(episodes, ppo, 5), ppo)
        given = ppo_data.by_place(table, ppo)["advantages"]
        if not objectives.OBJECTIVES[ppo.objective].whiten:
            np.testing.assert_array_equal(given, table.advantages)
        else:
            white = advantages.whiten(table.advantages, table.mask)
            np.testing.assert_array_equal(given, white, err_msg=name)


@pytest.mark.parametrize("name", ["grpo", "rloo", "gigpo", "gagpo", "ragen"])
def test_tasks_played_once_have_no_group(name):
    episodes = [dataclasses.replace(t, task=f"only_{i}") for i, t in enumerate(_four())]
    with pytest.raises(UserError, match=f"--objective={name}.*--rollouts"):
        ppo_data.make_table(episodes, None, OBJECTIVES[name])


def test_ragen_keeps_the_tasks_whose_rollouts_differ():
    """Of five tasks two, a quarter rounded up; all rollouts of each, in their order."""
    final = {"a": (0, 0), "b": (1, 0), "c": (1, 1), "d": (0.5, 0.4), "e": (0, 0.9)}
    episodes = [
        dataclasses.replace(_episode(task, i, [(2, 1)], [0], i), final_reward=rewards[i])
        for i in (0, 1)
        for task, rewards in final.items()
    ]
    kept = [(t.task, t.attempt) for t in ppo_data.uncertain(episodes)]
    assert kept == [("b", 0), ("e", 0), ("b", 1), ("e", 1)]


# --- rejection sampling ---------------------------------------------------------------------


def test_rejection_sampling_keeps_the_distinct_won_episodes():
    episodes = _four()
    twice = dataclasses.replace(episodes[3], attempt=5)
    won = ppo_data.won([*episodes, twice], "file")
    assert [t.key for t in won] == [episodes[1].key, episodes[3].key]
    update = ppo_data.make_rft_update(won, np.arange(2), LAYOUTS[0][0], devices=1)
    assert update.counts == {"tokens": 8.0}  # 3 + 2 + 2 + 1


def test_nothing_won_is_said_clearly():
    lost = [t for t in _four() if not t.success]
    with pytest.raises(UserError, match="file: none of the 2 episodes was won.*explore more"):
        ppo_data.won(lost, "file")


def test_no_episodes_value_knows_its_own_task():
    """Three tasks of two rollouts, so three folds; the returns of task b change."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 2, 4)).astype(np.float32)
    ppo = PpoConfig(critic="ridge", gamma=0.5)

    def values(paid):
        episodes = [
            _episode(name, attempt, [(3, 2), (2, 1)], [0.1, paid if name == "b" else 0.3], seed)
            for seed, (name, attempt) in enumerate(itertools.product("abc", (0, 1)))
        ]
        return ppo_data.fitted_values(episodes, hidden, ppo)

    first, second = values(0.0), values(8.0)
    np.testing.assert_array_equal(first[2:4], second[2:4])
    assert np.abs(first - second)[[0, 1, 4, 5]].min() > 0.5
    # All of task b's returns-to-go are 0.25 and 0.3 now, as those of the others.
    np.testing.assert_allclose(values(0.3)[:, 1].mean(), np.mean([0.25, 0.3]), atol=0.02)


def test_values_of_one_task_cannot_be_fitted_on_others():
    episodes = [_episode("a", attempt, [(3, 2)], [1.0], attempt) for attempt in (0, 1)]
    with pytest.raises(UserError, match="--critic=ridge.*one task only"):
        ppo_data.fitted_values(episodes, np.zeros((2, 1, 4), np.float32), PpoConfig())
