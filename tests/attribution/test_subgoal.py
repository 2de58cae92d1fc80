"""Subgoal credit by hand."""

import chex
import numpy as np
from absl.testing import absltest

from spa_jax.attribution.subgoal import subgoal_credit

NAN = float("nan")


class SubgoalTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        progress = np.array(
            [[0.0, 0.5, 0.25, 1.0], [0.25, 0.25, NAN, NAN], [0.5, NAN, NAN, NAN]], np.float32
        )
        mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], np.float32)
        actual = self.variant(subgoal_credit)(progress, mask)
        np.testing.assert_allclose(actual, [[0.5, -0.25, 0.75], [0, 0, 0], [0, 0, 0]])

    @chex.all_variants
    def test_the_sum_is_what_was_reached(self):
        progress = np.random.default_rng(0).random((5, 7)).astype(np.float32)
        actual = self.variant(subgoal_credit)(progress, np.ones((5, 6)))
        np.testing.assert_allclose(actual.sum(1), progress[:, -1] - progress[:, 0], atol=1e-6)


if __name__ == "__main__":
    absltest.main()
