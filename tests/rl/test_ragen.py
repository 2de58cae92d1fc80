"""StarPO-S by hand: which tasks stay, and what is clipped."""

import functools

import chex
import numpy as np
from absl.testing import absltest

from spa_jax.rl import losses, ragen


class UncertaintyTest(absltest.TestCase):
    # Spreads of tasks 0 to 4: 0.5, 0, 0.43, 0.5, 0.1.
    GROUP = np.array([0, 3, 1, 2, 2, 0, 1, 2, 3, 2, 4, 4])
    FINAL = np.array([1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0.3, 0.5])

    def test_the_share_is_of_the_tasks_and_rounded_up(self):
        for share, tasks in ((0.2, [0]), (0.25, [0, 3]), (0.6, [0, 2, 3]), (1.0, range(5))):
            kept = ragen.most_uncertain(self.FINAL, self.GROUP, share=share)
            np.testing.assert_array_equal(kept, np.isin(self.GROUP, tasks))
        self.assertEqual(ragen.SHARE, 0.25)


class ClipHigherTest(chex.TestCase):
    RATIO = np.array([1.25, 1.4, 0.7, 0.7, 1.4, 0.9], np.float32)
    A = np.array([1.0, 1.0, -1.0, 1.0, -1.0, 9.0], np.float32)
    MASK = np.array([1, 1, 1, 1, 1, 0], np.float32)

    @chex.all_variants
    def test_by_hand(self):
        run = functools.partial(ragen.clip_higher_policy_loss, clip=0.2, clip_high=0.28)
        loss, stats = self.variant(run)(np.log(self.RATIO), np.zeros(6), self.A, self.MASK)
        # 1.25 is inside now, 1.4 is cut to 1.28; down to 0.8 where A < 0; nothing elsewhere.
        np.testing.assert_allclose(loss, -(1.25 + 1.28 - 0.8 + 0.7 - 1.4), rtol=1e-5)
        np.testing.assert_allclose(stats.clipped, 2)
        np.testing.assert_allclose(stats.ratio, self.RATIO[:5].sum(), rtol=1e-5)

    def test_with_one_eps_it_is_ppos(self):
        args = (np.log(self.RATIO), np.zeros(6), self.A, self.MASK)
        ours = ragen.clip_higher_policy_loss(*args, clip=0.2, clip_high=0.2)
        theirs = losses.clipped_policy_loss(*args, clip=0.2)
        chex.assert_trees_all_close(ours, theirs)


if __name__ == "__main__":
    absltest.main()
