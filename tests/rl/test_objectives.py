"""Objectives without a critic: by hand, against their papers' formulas, and what may not matter."""

import functools

import chex
import hypothesis
import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spa_jax.attribution.credit import credit
from spa_jax.rl import advantages, objectives

NAN = float("nan")
GROUPED = [name for name, o in objectives.OBJECTIVES.items() if o.group and not o.critic]
few = hypothesis.settings(max_examples=25, deadline=None)
N, S = 5, 4
GROUP = np.array([2, 0, 2, 2, 0], np.int32)  # three rollouts of one task, two of another
STATE = np.array([[0, 1, 2, 0], [3, 4, 3, 5], [0, 1, 6, 7], [0, 8, 0, 2], [3, 5, 9, 9]], np.int32)


@functools.partial(jax.jit, static_argnames="objective")
def run(objective, rewards, mask, group, *, gamma=0.9, state=None):
    values = np.full(rewards.shape, 7.0, np.float32)  # that only those with a critic may read
    return objectives.advantages_and_returns(
        objective, rewards, values, mask, group, gamma=gamma, gae_lambda=0.8,
        state=STATE if state is None else state, action_values=rewards - 1,
    )


def floats(*shape):
    return hnp.arrays(np.float32, shape, elements=st.floats(-2, 2, width=32))


def lengths(count=N):
    return hnp.arrays(np.int64, count, elements=st.integers(0, S))


def masks(n):
    return (np.arange(S) < np.asarray(n)[:, None]).astype(np.float32)


class ByHandTest(chex.TestCase):
    # Returns-to-go of two rollouts of a task and one of another; the second has ended at step 1.
    G = np.array([[4.0, 2.0, 1.0], [6.0, NAN, NAN], [5.0, 5.0, NAN]], np.float32)
    MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], np.float32)
    GROUP = np.array([1, 1, 0], np.int32)

    @chex.all_variants
    def test_an_ended_rollout_stands_at_its_last_step(self):
        actual = self.variant(objectives.at_each_step)(self.G, self.MASK)
        np.testing.assert_array_equal(actual, [[4, 2, 1], [6, 6, 6], [5, 5, 5]])
        holes = self.variant(objectives.at_each_step)(
            np.array([[NAN, 3.0, NAN, 2.0], [NAN] * 4]), np.array([[0, 1, 0, 1], [0] * 4])
        )
        np.testing.assert_array_equal(holes, [[3, 3, 3, 2], [0] * 4])

    @chex.all_variants
    def test_rloo(self):
        actual = self.variant(objectives.rloo)(self.G, self.MASK, self.GROUP)
        np.testing.assert_allclose(actual, [[-2, -4, -5], [2, 0, 0], [0, 0, 0]], atol=1e-6)

    @chex.all_variants
    def test_grpo(self):
        # Two numbers are always one standard deviation from their mean.
        actual = self.variant(objectives.grpo)(self.G, self.MASK, self.GROUP)
        np.testing.assert_allclose(actual, [[-1, -1, -1], [1, 0, 0], [0, 0, 0]], atol=2e-4)

    def test_reinforce_plus_plus_is_the_discounted_return(self):
        advantage, returns = run(
            "reinforce++", np.array([[1.0, 0.0, 2.0], [3.0, NAN, NAN]], np.float32),
            np.array([[1, 1, 1], [1, 0, 0]]), np.zeros(2, np.int32), gamma=0.5,
        )
        np.testing.assert_allclose(advantage, [[1.5, 1, 2], [3, 0, 0]])
        np.testing.assert_array_equal(advantage, returns)

    def test_ppo_is_gae(self):
        rewards, mask = np.ones((N, S), np.float32), masks([4, 1, 0, 2, 3])
        theirs = advantages.step_gae(
            rewards, np.full((N, S), 7.0, np.float32), mask, gamma=0.9, gae_lambda=0.8
        )
        for a, b in zip(run("ppo", rewards, mask, GROUP), theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


class PapersTest(parameterized.TestCase):
    """With the reward at the end every step has the papers' advantage of the trajectory."""

    @few
    @hypothesis.given(hnp.arrays(np.float32, N, elements=st.floats(0, 1, width=32)),
                      hnp.arrays(np.int64, N, elements=st.integers(1, S)))
    def test_terminal_credit(self, final, n):
        mask = masks(n)
        rewards = np.asarray(credit("terminal", np.zeros((N, S), np.float32), final, mask))
        ours = {
            name: np.asarray(run(name, rewards, mask, GROUP, gamma=1.0)[0])
            for name in ("grpo", "rloo", "reinforce++")
        }
        for i in range(N):
            group = final[GROUP == GROUP[i]]
            others = (group.sum() - final[i]) / (len(group) - 1)
            theirs = {
                "grpo": (final[i] - group.mean()) / (group.std() + 1e-4),
                "rloo": final[i] - others,
                "reinforce++": final[i],
            }
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name][i], value * mask[i], atol=1e-3)


class PropertiesTest(parameterized.TestCase):
    @parameterized.parameters(*objectives.OBJECTIVES)
    def test_order_padding_and_the_names_of_groups_change_nothing(self, name):
        @few
        @hypothesis.given(floats(N, S), lengths(), st.permutations(range(N)), floats(N, S))
        def check(rewards, n, order, junk):
            mask, order = masks(n), np.array(order)
            out = run(name, np.where(mask > 0, rewards, 0), mask, GROUP)
            dirty = np.where(mask > 0, rewards, np.where(junk > 0, junk, np.nan))
            state = (STATE + 3)[order]
            again = run(name, dirty[order], mask[order], (GROUP + 1)[order], state=state)
            for a, b in zip(out, again, strict=True):
                np.testing.assert_allclose(b, np.asarray(a)[order], atol=2e-3)
                np.testing.assert_array_equal(np.asarray(a)[mask == 0], 0)

        check()

    @parameterized.parameters(*GROUPED)
    def test_other_tasks_do_not_count(self, name):
        rewards = np.random.default_rng(0).normal(size=(N, S)).astype(np.float32)
        mask = masks([4, 2, 3, 1, 4])
        before = np.asarray(run(name, rewards, mask, GROUP)[0])
        changed = np.where((GROUP == 0)[:, None], rewards + 3, rewards)
        after = np.asarray(run(name, changed, mask, GROUP)[0])
        np.testing.assert_allclose(after[GROUP == 2], before[GROUP == 2], atol=1e-6)
        self.assertGreater(np.abs(before[GROUP == 2]).max(), 0.1)

    @few
    @hypothesis.given(floats(N, S), hnp.arrays(np.int64, N, elements=st.integers(1, S)))
    def test_rloos_baseline_is_that_of_the_others(self, rewards, n):
        """It does not move with one's own return, so it adds no bias."""
        mask = masks(n)
        more = rewards.copy()
        more[0, n[0] - 1] += 1.0
        before, g = (np.asarray(x)[0] for x in run("rloo", rewards, mask, GROUP))
        after, g_after = (np.asarray(x)[0] for x in run("rloo", more, mask, GROUP))
        np.testing.assert_allclose(after - before, g_after - g, atol=1e-4)

    @parameterized.parameters("grpo", "rloo")
    def test_a_rollout_without_a_step_is_in_no_group(self, name):
        rewards = np.random.default_rng(1).normal(size=(N, S)).astype(np.float32)
        mask = masks([4, 2, 3, 0, 0])
        actual = np.asarray(run(name, rewards, mask, GROUP)[0])
        without = np.asarray(run(name, rewards[:3], mask[:3], np.array([1, 0, 1], np.int32))[0])
        np.testing.assert_allclose(actual[:3], without, atol=1e-5)
        np.testing.assert_array_equal(actual[1], 0)  # the only one of its task that is left

    @parameterized.parameters("grpo", "rloo")
    def test_equal_rollouts_teach_nothing(self, name):
        rewards = np.tile([0.25, -0.5, 0.0, 1.0], (N, 1)).astype(np.float32)
        actual = run(name, rewards, np.ones((N, S)), GROUP)[0]
        np.testing.assert_allclose(actual, 0, atol=2e-3)


if __name__ == "__main__":
    absltest.main()
