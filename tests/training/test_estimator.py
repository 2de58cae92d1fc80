"""What the estimator reads of a step, and what becomes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax import chat, tokenizer
from spa_jax.config import RowsConfig
from spa_jax.training import estimator_update, scoring
from spa_jax.training.estimator_update import StepFeatures
from tests import tiny

CONFIG = tiny.tiny_config()
ROWS = RowsConfig(row_length=96, policy_slots=48, step_slots=16, rows_per_device=1)


def _features(count=3, steps=4, size=16):
    rng = np.random.default_rng(0)
    return StepFeatures(
        hidden=rng.normal(size=(count, steps, size)).astype(np.float32),
        start=rng.normal(size=(count, size)).astype(np.float32),
        step_mask=np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], np.float32)[:count],
        final_reward=np.array([1.0, 0.0, 1.0], np.float32)[:count],
    )


@pytest.mark.parametrize("kind", ["answer", "value", "paper"])
def test_new_heads_give_nothing(kind):
    features = _features()
    heads = estimator_update.init(kind, 8, 1, key=jax.random.key(0), features=features, clock={})
    assert estimator_update.kind_of(heads) == kind
    c, start = estimator_update.contributions(heads, features)
    assert c.shape == (3, 4) and start.shape == (3,)
    assert not c.any() and not start.any()


def test_contributions_of_values_are_their_differences():
    """V by hand: the head reads coordinate 0 (linear, its norm standardises to the identity)."""
    features = _features(size=2)
    norm = {"scale": jnp.zeros(2), "bias": jnp.zeros(2)}
    head = {"norm": norm, "out": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    c, start = estimator_update.contributions({"0": {"state": head}}, features)
    assert not c.any() and not start.any()
    member = {"state": head}
    values = np.array([[0.2, 0.5, 0.4, 1.0], [0.3, 0.1, 9, 9], [0.6, 9, 0.9, 9]], np.float32)
    c, start = estimator_update._compose(
        member, values, np.array([0.1, 0.5, 0.5], np.float32), features.step_mask
    )
    # Where step 1 wrote no token, step 2 is measured against what stood behind step 0.
    wanted = [[0.1, 0.3, -0.1, 0.6], [-0.2, -0.2, 0, 0], [0.1, 0, 0.3, 0]]
    np.testing.assert_allclose(np.where(features.step_mask > 0, c, 0), wanted, atol=1e-6)
    np.testing.assert_allclose(start, [0.1, 0.5, 0.5])


def test_several_heads_are_averaged():
    features = _features()
    both = estimator_update.init("answer", 8, 2, key=jax.random.key(0), features=features, clock={})
    rng = np.random.default_rng(1)
    both = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), both)
    alone = [estimator_update.contributions({"0": both[name]}, features) for name in "01"]
    for found, one, other in zip(
        estimator_update.contributions(both, features), *alone, strict=True
    ):
        np.testing.assert_allclose(found, (one + other) / 2, rtol=1e-5)


def test_a_clock_is_the_mean_state_of_each_step():
    """Step 0 of three episodes, step 3 of one: that is drawn to the mean over all steps."""
    features = _features()
    clock = estimator_update.make_clock("answer", features)["clock"]["mean"]
    mask = features.step_mask[..., None]
    mean = (features.hidden * mask).sum((0, 1)) / mask.sum()
    first = (features.hidden[:, 0].sum(0) + 4 * mean) / 7
    last = (features.hidden[0, 3] + 4 * mean) / 5
    np.testing.assert_allclose(clock[0], first, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clock[3], last, rtol=1e-4, atol=1e-5)
    assert estimator_update.make_clock("value", features) == {}


def test_what_all_steps_of_a_number_have_in_common_earns_nothing():
    """The same shift of all states behind a step, and of their mean, changes no contribution."""
    features = _features()
    clock = estimator_update.make_clock("answer", features)
    heads = estimator_update.init(
        "answer", 8, 1, key=jax.random.key(0), features=features, clock=clock
    )
    heads = jax.tree.map(lambda x: x + 0.1, heads)
    shift = 3.0 * np.arange(64, dtype=np.float32).reshape(4, 16)
    moved = features.replace(hidden=features.hidden + shift)
    found = [
        estimator_update.contributions({**heads, "clock": {"mean": mean}}, seen)[0]
        for seen, mean in (
            (features, clock["clock"]["mean"]),
            (moved, clock["clock"]["mean"] + shift),
            (moved, clock["clock"]["mean"]),
        )
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    assert np.abs(found[2] - found[0]).max() > 0.01


def test_a_step_is_read_behind_its_answer_and_the_last_one_too(tmp_path):
    fmt = chat.ChatFormat.from_tokenizer(tokenizer.load(tiny.tiny_tokenizer(tmp_path, tiny.CHATML)))
    rng = np.random.default_rng(2)
    played = [
        dataclasses.replace(
            tiny.random_trajectory(rng, f"task {i}", steps=2, context=6), final_observation="Ok."
        )
        for i in range(3)
    ]
    params = {"policy": tiny.tiny_params(CONFIG)}
    without, scores = (
        scoring.score(CONFIG, params, played, ROWS, temperature=1.0, title="", chat=given)
        for given in (None, fmt)
    )
    for name in ("end_hidden", "value_hidden", "step_mask"):
        np.testing.assert_allclose(getattr(scores, name), getattr(without, name), atol=1e-5)
    for ours, theirs in zip(scores.log_probs, without.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Behind the first answer the policy writes the second action.
    np.testing.assert_allclose(scores.answer_hidden[:, 0], scores.value_hidden[:, 1], atol=1e-6)
    # Behind the last one it would go on: the state before a third step, were there one.
    longer = [
        dataclasses.replace(
            t,
            token_ids=(*read.token_ids, 5),
            step_id=(*read.step_id, 2),
            log_probs=(*read.log_probs, -1.0),
            ref_log_probs=None,
            steps=(*t.steps, t.steps[0]),
        )
        for t, read in zip(played, scoring.answered(played, fmt, CONFIG, ROWS), strict=True)
    ]
    more = scoring.score(CONFIG, params, longer, ROWS, temperature=1.0, title="")
    np.testing.assert_allclose(scores.answer_hidden[:, 1], more.value_hidden[:, 2], atol=1e-5)
    np.testing.assert_allclose(without.answer_hidden[:, 1], without.end_hidden[:, 1], atol=1e-6)
