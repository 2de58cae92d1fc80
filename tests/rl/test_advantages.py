"""Step GAE and whitening: by hand, and what may not change them."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spa_jax.rl import advantages

NAN = float("nan")
few = hypothesis.settings(max_examples=25, deadline=None)
gae = jax.jit(advantages.step_gae)


def floats(*shape):
    return hnp.arrays(np.float32, shape, elements=st.floats(-2, 2, width=32))


class StepGaeTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        # gamma = lambda = 1/2.  First row: delta = [1 + .5 - .5, 0 - .5 - 1, 2 + 1] and
        # A = delta + A_next / 4; second: one step without a reward.
        rewards = np.array([[1.0, 0.0, 2.0], [0.0, NAN, NAN]], np.float32)
        values = np.array([[0.5, 1.0, -1.0], [0.25, NAN, NAN]], np.float32)
        mask = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
        f = functools.partial(advantages.step_gae, gamma=0.5, gae_lambda=0.5)
        advantage, returns = self.variant(f)(rewards, values, mask)
        np.testing.assert_allclose(advantage, [[0.8125, -0.75, 3.0], [-0.25, 0, 0]])
        np.testing.assert_allclose(returns, [[1.3125, 0.25, 2.0], [0, 0, 0]])

    def test_a_step_without_reward_is_still_a_step(self):
        run = functools.partial(gae, values=np.zeros((1, 3)), gamma=0.5, gae_lambda=1.0)
        short, _ = run(np.array([[1.0, 1.0, 0.0]]), step_mask=np.array([[1, 1, 0]]))
        long, _ = run(np.array([[1.0, 0.0, 1.0]]), step_mask=np.array([[1, 1, 1]]))
        np.testing.assert_allclose(short, [[1.5, 1.0, 0.0]])
        np.testing.assert_allclose(long, [[1.25, 0.5, 1.0]])

    def test_the_value_of_what_follows_an_ending_is_zero(self):
        advantage, _ = gae(
            np.array([[0.0]]), np.array([[3.0]]), np.array([[1]]), gamma=1.0, gae_lambda=1.0
        )
        np.testing.assert_allclose(advantage, [[-3.0]])

    @few
    @hypothesis.given(floats(2, 4), floats(2, 4))
    def test_monte_carlo_limit(self, rewards, values):
        _, returns = gae(rewards, values, np.ones((2, 4)), gamma=1.0, gae_lambda=1.0)
        np.testing.assert_allclose(returns, rewards[:, ::-1].cumsum(1)[:, ::-1], atol=1e-5)

    @few
    @hypothesis.given(
        floats(2, 4), floats(2, 4), hnp.arrays(np.int64, 4, elements=st.integers(0, 4))
    )
    def test_padded_steps_change_nothing(self, rewards, values, where):
        """At the end or between the steps, whatever lies in them."""
        places = np.sort(where)
        wide = [np.insert(x, places, np.nan, axis=1) for x in (rewards, values)]
        mask = np.insert(np.ones((2, 4)), places, 0, axis=1)
        plain = gae(rewards, values, np.ones((2, 4)), gamma=0.9, gae_lambda=0.8)
        padded = gae(*wide, mask, gamma=0.9, gae_lambda=0.8)
        for a, b in zip(plain, padded, strict=True):
            np.testing.assert_allclose(np.asarray(b)[mask > 0].reshape(2, 4), a, atol=1e-6)
            np.testing.assert_array_equal(np.asarray(b)[mask == 0], 0)

    def test_no_gradient_flows(self):
        f = functools.partial(advantages.step_gae, gamma=0.9, gae_lambda=0.9)
        grad = jax.grad(lambda v: sum(map(jnp.sum, f(jnp.ones((1, 3)), v, jnp.ones((1, 3))))))
        np.testing.assert_array_equal(grad(jnp.ones((1, 3))), 0)

    def test_no_steps_at_all(self):
        empty = np.zeros((2, 0), np.float32)
        advantage, returns = gae(empty, empty, empty, gamma=0.9, gae_lambda=0.9)
        chex.assert_shape([advantage, returns], (2, 0))


class WhitenTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        x, mask = np.array([1.0, 2.0, 3.0, NAN], np.float32), np.array([1, 1, 1, 0])
        actual = self.variant(advantages.whiten)(x, mask)
        np.testing.assert_allclose(actual, [-(1.5**0.5), 0, 1.5**0.5, 0], rtol=1e-6)

    @parameterized.parameters(1, 2, 4, 8)
    def test_devices_share_one_mean(self, devices):
        x = np.random.default_rng(0).normal(3, 2, (8, 5)).astype(np.float32)
        mask = np.random.default_rng(1).integers(0, 2, (8, 5))
        mask[0] = 0  # a device may have no step
        whole = advantages.whiten(x, mask)
        dealt = advantages.whiten(x.reshape(devices, -1, 5), mask.reshape(devices, -1, 5))
        np.testing.assert_allclose(dealt.reshape(8, 5), whole, atol=1e-6)

    @parameterized.parameters(([0, 0, 0],), ([0, 1, 0],), ([1, 1, 1],))
    def test_nothing_one_number_and_equal_numbers_become_zero(self, mask):
        actual = advantages.whiten(np.array([2.0, 2.0, 2.0]), np.array(mask))
        np.testing.assert_array_equal(actual, 0)


class LessStepMeanTest(parameterized.TestCase):
    def test_by_hand(self):
        x = np.array([[4.0, 5.0, 6.0], [1.0, 2.0, NAN], [7.0, NAN, NAN]])
        mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
        actual = advantages.less_step_mean(x, mask)
        np.testing.assert_allclose(actual, [[0, 3, 6], [-4.5, -3, 0], [4.5, 0, 0]])

    @few
    @hypothesis.given(floats(4, 3), floats(3))
    def test_what_depends_on_the_step_alone_is_gone(self, x, step):
        mask = np.ones((4, 3))
        actual = advantages.less_step_mean(x + step, mask)
        np.testing.assert_allclose(actual, advantages.less_step_mean(x, mask), atol=1e-5)
        np.testing.assert_allclose(actual.sum(0), 0, atol=1e-4)

    @few
    @hypothesis.given(floats(4, 3))
    def test_the_baseline_is_that_of_the_others(self, x):
        changed = x.copy()
        changed[1] += 1.0
        before = advantages.less_step_mean(x, np.ones((4, 3)))
        after = advantages.less_step_mean(changed, np.ones((4, 3)))
        np.testing.assert_allclose(after[1] - before[1], 1.0, atol=1e-5)


if __name__ == "__main__":
    absltest.main()
