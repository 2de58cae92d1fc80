"""GiGPO and GAGPO by hand, and what grouping equal states may not do."""

import functools

import chex
import numpy as np
from absl.testing import absltest

from spa_jax.rl import gagpo, gigpo, groups

NAN = float("nan")
# Two rollouts of a task and one of another.  Both rollouts start in state 0; the first comes back
# to it at its last step, the second goes on to a state of its own.
REWARDS = np.array([[0.0, 0.0, 1.0], [0.0, 0.5, NAN], [2.0, NAN, NAN]], np.float32)
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
RETURNS = np.array([[0.25, 0.5, 1.0], [0.25, 0.5, NAN], [2.0, NAN, NAN]], np.float32)  # gamma 1/2
GROUP = np.array([1, 1, 0], np.int32)
STATE = np.array([[0, 1, 0], [0, 2, 0], [3, 0, 0]], np.int32)


class GroupsTest(chex.TestCase):
    @chex.all_variants
    def test_moments(self):
        run = functools.partial(groups.moments, groups=5)
        mean, std, count = self.variant(run)(RETURNS, MASK, STATE)
        # State 0: 0.25, 1, 0.25; what lies outside the mask is in no group, NaN or not.
        np.testing.assert_allclose(mean, [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [2, 0.5, 0.5]])
        sd = np.sqrt((0.0625 + 0.25 + 0.0625) / 3)
        np.testing.assert_allclose(std, [[sd, 0, sd], [sd, 0, sd], [0, sd, sd]], atol=1e-6)
        np.testing.assert_array_equal(count, [[3, 1, 3], [3, 1, 3], [1, 3, 3]])


class GigpoTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        actual = self.variant(gigpo.gigpo)(REWARDS, RETURNS, MASK, GROUP, STATE)
        # Episodes: 1 and 0.5, mean 0.75.  Steps from state 0: 0.25, 1, 0.25, mean 0.5.
        np.testing.assert_allclose(
            actual,
            [[0.25 - 0.25, 0.25, 0.25 + 0.5], [-0.25 - 0.25, -0.25, 0], [0, 0, 0]],
            atol=1e-6,
        )

    def test_without_a_state_twice_it_is_the_episodes_term(self):
        state = np.arange(9, dtype=np.int32).reshape(3, 3)
        actual = gigpo.gigpo(REWARDS, RETURNS, MASK, GROUP, state)
        np.testing.assert_allclose(actual, MASK * [[0.25], [-0.25], [0]], atol=1e-6)

    def test_the_weight_is_of_the_steps_term(self):
        none, twice = (
            np.asarray(gigpo.gigpo(REWARDS, RETURNS, MASK, GROUP, STATE, weight=w)) for w in (0, 2)
        )
        once = np.asarray(gigpo.gigpo(REWARDS, RETURNS, MASK, GROUP, STATE))
        np.testing.assert_allclose(twice - none, 2 * (once - none), atol=1e-6)


class GagpoTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        run = functools.partial(gagpo.gagpo, gamma=0.5, gae_lambda=0.5)
        actual = self.variant(run)(REWARDS, RETURNS, MASK, GROUP, STATE)
        # V(0) = 0.5, V(1) = 0.5, V(2) = 0.5.  First: delta = -0.25, -0.25, 0.5;
        # A = -0.25 + (-0.125) / 4, -0.125, 0.5.  Second: delta = -0.25, 0; A = -0.25, 0.
        a = np.array([-0.28125, -0.125, 0.5, -0.25, 0.0])
        a = (a - a.mean()) / (a.std() + 1e-4)
        np.testing.assert_allclose(
            actual, [a[:3], [*a[3:], 0], [0, 0, 0]], atol=1e-5
        )  # the only rollout of the other task is compared with nothing

    @chex.all_variants
    def test_an_actions_ratio_is_the_mean_of_its_tokens(self):
        log_ratio = np.array([[0.1, 0.3, -0.5, NAN], [1.0, NAN, 2.0, 6.0]], np.float32)
        step = np.array([[0, 0, 1, 1], [1, 0, 0, 0]], np.int32)
        mask = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], np.float32)
        run = functools.partial(gagpo.action_log_ratio, steps=2)
        actual = self.variant(run)(log_ratio, step, mask)
        np.testing.assert_allclose(actual, [[0.2, 0.2, -0.5, 0], [1, 0, 4, 4]], atol=1e-6)


if __name__ == "__main__":
    absltest.main()
