"""ArCHer's critic: against values known by hand, and what it must not see."""

import functools

import chex
import numpy as np
from absl.testing import absltest

from spa_jax.rl import archer

# A chain of three steps.  At each a good action (+) or a bad one (-); the last pays 1 if it was
# good, else 0.  State and action stand in one-hot features of their own.
N, S = 64, 3


def data():
    good = np.array([[i >> k & 1 for k in range(S)] for i in range(N)]) == 1
    rewards = np.zeros((N, S), np.float32)
    rewards[:, -1] = good[:, -1]
    state = np.tile(np.eye(8, dtype=np.float32)[:S], (N, 1, 1))
    action = state.copy()
    for k in range(S):
        action[:, k, 3 + k] = np.where(good[:, k], 1, -1)
    return state * 3, action * 3, rewards, np.ones((N, S)), np.arange(N) // 8 % 4, good


class CriticTest(chex.TestCase):
    @chex.all_variants(without_device=False)
    def test_by_hand(self):
        state, action, rewards, mask, fold, good = data()
        run = functools.partial(archer.utterance_critic, folds=4, gamma=0.5, penalty=0.01)
        q, v = self.variant(run)(state, action, rewards, mask, fold)
        np.testing.assert_allclose(q[:, 2], good[:, 2], atol=0.1)
        # V(s_2) = 1/2, so Q(s_1, .) = V(s_1) = 1/4 and Q(s_0, .) = V(s_0) = 1/8, whatever was done.
        np.testing.assert_allclose(v, np.tile([1 / 8, 1 / 4, 1 / 2], (N, 1)), atol=0.05)
        np.testing.assert_allclose(q[:, :2], np.tile([1 / 8, 1 / 4], (N, 1)), atol=0.05)

    def test_an_episodes_own_reward_moves_its_values_by_nothing(self):
        state, action, rewards, mask, fold, _ = data()
        run = functools.partial(archer.utterance_critic, folds=4, gamma=0.5)
        before = run(state, action, rewards, mask, fold)
        changed = np.where((fold == 1)[:, None], rewards + 5, rewards)
        after = run(state, action, changed, mask, fold)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a[fold == 1], b[fold == 1])
            self.assertGreater(np.abs(a - b)[fold != 1].min(), 0.5)

    def test_what_lies_outside_the_mask_reaches_nothing(self):
        state, action, rewards, mask, fold, _ = data()
        mask[::3, 2] = 0
        run = functools.partial(archer.utterance_critic, folds=4, gamma=0.5)
        before = run(state, action, rewards, mask, fold)
        state[mask == 0], action[mask == 0], rewards[mask == 0] = np.nan, np.inf, np.nan
        after = run(state, action, rewards, mask, fold)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(np.asarray(a)[mask == 0], 0)


if __name__ == "__main__":
    absltest.main()
