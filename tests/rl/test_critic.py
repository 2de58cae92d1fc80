"""The cross-fitted ridge critic: against the closed form, and what it must not see."""

import functools

import chex
import jax
import numpy as np
import pytest

from spa_jax.rl import critic


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(12, 5, 6)).astype(np.float32)
    mask = (np.arange(5) < rng.integers(1, 6, size=(12, 1))).astype(np.float32)
    returns = (hidden @ rng.normal(size=6) + 3).astype(np.float32)
    return hidden, returns, mask, np.arange(12) % 4


class CriticTest(chex.TestCase):
    @chex.all_variants(without_device=False)
    def test_it_is_ridge_regression_on_the_other_folds(self):
        rng = np.random.default_rng(1)
        hidden = rng.normal(size=(6, 3, 4)).astype(np.float32)
        returns = rng.normal(size=(6, 3)).astype(np.float32)
        mask, fold = np.ones((6, 3), np.float32), np.array([0, 1, 2, 0, 1, 2])
        run = functools.partial(critic.cross_fitted_values, folds=3, penalty=2.0)
        values = self.variant(run)(hidden, returns, mask, fold)
        x = hidden - hidden.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        x = x - x.mean((0, 1))
        x = x / x.std((0, 1))
        for f in range(3):
            seen, own = x[fold != f].reshape(-1, 4), x[fold == f]
            y = returns[fold != f].ravel()
            w = np.linalg.solve(seen.T @ seen + 2 * np.eye(4), seen.T @ (y - y.mean()))
            np.testing.assert_allclose(values[fold == f], y.mean() + own @ w, atol=1e-4)


def test_an_episodes_own_return_moves_its_value_by_nothing(data):
    hidden, returns, mask, fold = data
    before = critic.cross_fitted_values(hidden, returns, mask, fold, folds=4)
    changed = returns.copy()
    changed[fold == 1] += 7
    after = critic.cross_fitted_values(hidden, changed, mask, fold, folds=4)
    np.testing.assert_array_equal(before[fold == 1], after[fold == 1])
    assert np.abs(before - after)[mask * (fold != 1)[:, None] > 0].min() > 1


def test_what_lies_outside_the_mask_reaches_nothing(data):
    hidden, returns, mask, fold = data
    before = critic.cross_fitted_values(hidden, returns, mask, fold, folds=4)
    hole = mask == 0
    assert hole.any() and np.all(np.asarray(before)[hole] == 0)
    hidden[hole], returns[hole] = np.nan, np.inf
    after = critic.cross_fitted_values(hidden, returns, mask, fold, folds=4)
    np.testing.assert_array_equal(before, after)


def test_a_linear_return_is_learnt_but_for_the_penalty(data):
    hidden, returns, mask, fold = data
    real = mask > 0
    error = [
        np.abs(
            critic.cross_fitted_values(hidden, returns, mask, fold, folds=4, penalty=p) - returns
        )
        for p in (1e-3, 1e4)
    ]
    assert error[0][real].mean() < 0.5 * error[1][real].mean()
    assert np.isfinite(jax.device_get(error[0])).all()
