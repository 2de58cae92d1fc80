"""Credits that are differences of values: AgentPRM's and branching's, by hand."""

import functools

import chex
import numpy as np
from absl.testing import absltest

from spa_jax.attribution.branching import branching_credit
from spa_jax.attribution.prm4a import process_credit, process_values

NAN = float("nan")


class ProcessTest(chex.TestCase):
    @chex.all_variants
    def test_credit_by_hand(self):
        q = np.array([[0.5, 0.75, 0.25], [0.125, NAN, NAN], [NAN] * 3], np.float32)
        mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], np.float32)
        actual = self.variant(process_credit)(q, np.array([0.25, 0.5, 0.0], np.float32), mask)
        np.testing.assert_allclose(actual, [[0.25, 0.25, -0.5], [-0.375, 0, 0], [0, 0, 0]])

    @chex.all_variants(without_device=False)
    def test_values_tell_what_an_action_decides(self):
        """The state says nothing; the first step's action says R, and so does all that follows."""
        rng = np.random.default_rng(0)
        won = np.arange(40) % 2
        state = rng.normal(size=(40, 2, 8)).astype(np.float32) * 0.1
        action = state + np.where(won, 1.0, -1.0)[:, None, None] * np.eye(8)[0] * 3
        run = functools.partial(process_values, folds=4, penalty=1.0)
        q, v = self.variant(run)(
            state, action.astype(np.float32), won.astype(np.float32), np.ones((40, 2)),
            np.arange(40) // 2 % 4,
        )
        np.testing.assert_allclose(q, np.repeat(won[:, None], 2, 1), atol=0.15)
        self.assertLess(np.abs(np.mean(v) - 0.5), 0.1)
        c = np.asarray(process_credit(q, v, np.ones((40, 2))))
        self.assertGreater(c[won == 1, 0].mean(), 0.3)
        self.assertLess(np.abs(c[:, 1]).max(), 0.2)


class BranchingTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        returns = np.array(
            [[[1, 0, 0, 0], [1, 0, 1, NAN]], [[0, 1, NAN, NAN], [NAN] * 4]], np.float32
        )
        count = np.array([[4, 3], [2, 0]], np.int32)
        mask = np.array([[1, 1], [1, 0]], np.float32)
        credit, error = self.variant(branching_credit)(
            returns, count, np.array([1.0, 0.0], np.float32), mask
        )
        # Values 1/4 and 2/3, then R = 1; 1/2, then R = 0.
        np.testing.assert_allclose(credit, [[2 / 3 - 1 / 4, 1 / 3], [-0.5, 0]], atol=1e-6)
        # Variances of the means: (3/16) / 3 and (2/9) / 2; (1/4) / 1.
        a, b = 3 / 16 / 3, 2 / 9 / 2
        np.testing.assert_allclose(error, [[np.sqrt(a + b), np.sqrt(b)], [0.5, 0]], atol=1e-6)
        np.testing.assert_allclose(credit.sum(1), [1 - 1 / 4, 0 - 1 / 2], atol=1e-6)


if __name__ == "__main__":
    absltest.main()
