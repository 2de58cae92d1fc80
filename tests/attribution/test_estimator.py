"""The estimator's objective, by hand, and what padding may not do to it."""

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
