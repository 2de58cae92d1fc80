"""The estimator's objective, by hand, and what padding may not do to it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from spa_jax.attribution import estimator

NAN = float("nan")
C = np.array([[0.5, 0.25, NAN], [0.1, -0.2, 0.4], [NAN, NAN, NAN]], np.float32)
MASK = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], np.float32)
R = np.array([1.0, 0.0, 1.0], np.float32)


class EstimatorTest(chex.TestCase):
    @chex.all_variants
    def test_predicted_return(self):
        actual = self.variant(estimator.predicted_return)(C, MASK)
        np.testing.assert_allclose(actual, [0.75, 0.3, 0.0], atol=1e-6)

    @chex.all_variants
    def test_loss(self):
        loss, count = self.variant(estimator.progress_loss)(C, MASK, R)
        np.testing.assert_allclose(loss, 0.25**2 + 0.3**2, rtol=1e-6)
        self.assertEqual(count, 2)  # the third has no step: nothing to attribute its reward to

    def test_every_step_of_a_trajectory_gets_the_same_gradient(self):
        grad = jax.grad(lambda c: estimator.progress_loss(c, MASK, R)[0])(jnp.asarray(C))
        expected = 2 * np.array([[-0.25, -0.25, 0], [0.3, 0.3, 0.3], [0, 0, 0]])
        np.testing.assert_allclose(grad, expected, atol=1e-6)

    @chex.all_variants
    def test_every_prefix_predicts_the_reward(self):
        loss = self.variant(functools.partial(estimator.prefix_loss, prefixes=0.5))
        start = np.array([0.1, 0.5, NAN], np.float32)
        # 0.1, 0.6, 0.85 against 1; 0.5, 0.6, 0.4, 0.8 against 0; the third has no step.
        first = (0.9**2 + 0.4**2 + 0.15**2) / 3
        second = (0.5**2 + 0.6**2 + 0.4**2 + 0.8**2) / 4
        total, error = loss(C, start, MASK, R)
        np.testing.assert_allclose(error, 0.15**2 + 0.8**2, rtol=1e-5)
        np.testing.assert_allclose(total, 0.15**2 + 0.8**2 + 0.5 * (first + second), rtol=1e-5)

    def test_without_prefixes_and_a_start_it_is_the_paper_s(self):
        ours, _ = estimator.prefix_loss(C, jnp.zeros(3), MASK, R, prefixes=0.0)
        np.testing.assert_allclose(ours, estimator.progress_loss(C, MASK, R)[0], rtol=1e-6)

    def test_only_the_prefixes_say_which_step(self):
        """The same sum on another step: the paper's loss cannot tell them apart."""
        mask, reward = np.ones((1, 2), np.float32), np.array([1.0], np.float32)
        early, late = np.array([[0.9, 0.1]]), np.array([[0.1, 0.9]])
        sums = [estimator.progress_loss(c, mask, reward)[0] for c in (early, late)]
        np.testing.assert_allclose(sums[0], sums[1], atol=1e-12)
        with_prefixes = [
            estimator.prefix_loss(c, jnp.zeros(1), mask, reward, prefixes=1.0)[0]
            for c in (early, late)
        ]
        assert with_prefixes[0] < with_prefixes[1] - 0.2

    def test_boolean_masks(self):
        chex.assert_trees_all_equal(
            estimator.progress_loss(C, MASK.astype(bool), R), estimator.progress_loss(C, MASK, R)
        )

    def test_shapes_are_checked(self):
        with self.assertRaises(AssertionError):
            estimator.progress_loss(C, MASK, R[:2])
        with self.assertRaises(AssertionError):
            estimator.predicted_return(C, MASK[:, :2])


if __name__ == "__main__":
    absltest.main()
