"""Step rewards by hand, and the properties that make `penalty` the default."""

import functools

import chex
import hypothesis
import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spa_jax.attribution.credit import credit, fused_reward
from spa_jax.errors import UserError

NAN = float("nan")
KINDS = ("spa", "terminal", "uniform", "shuffled", "random")
N, S = 3, 6
fused = jax.jit(fused_reward, static_argnames=("alpha", "beta", "grounding"))
credits = jax.jit(credit, static_argnames=("kind", "residual"))
few = hypothesis.settings(max_examples=25, deadline=None)


def floats(shape, low=-2.0, high=2.0):
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


def masks(shape=(N, S)):
    """Masks with holes and empty rows."""
    return hnp.arrays(np.bool_, shape)


class FusedRewardTest(chex.TestCase):
    C = np.array([[0.5, -0.25, 0.0, NAN]], np.float32)
    G = np.array([[1, 0, 1, 0]], np.float32)
    MASK = np.array([[1, 1, 1, 0]], np.float32)

    @chex.all_variants
    def test_penalty(self):
        reward = functools.partial(fused_reward, alpha=2.0, beta=0.5, grounding="penalty")
        actual = self.variant(reward)(self.C, self.G, self.MASK)
        np.testing.assert_allclose(actual, [[1.0, -1.0, 0.0, 0.0]])

    @chex.all_variants
    def test_bonus(self):
        reward = functools.partial(fused_reward, alpha=2.0, beta=0.5, grounding="bonus")
        actual = self.variant(reward)(self.C, self.G, self.MASK)
        np.testing.assert_allclose(actual, [[1.5, -0.5, 0.5, 0.0]])

    def test_defaults_are_the_designed_ones(self):
        actual = fused_reward(self.C, self.G.astype(bool), self.MASK.astype(bool))
        np.testing.assert_allclose(actual, [[0.5, -0.75, 0.0, 0.0]])

    def test_unknown_grounding(self):
        with self.assertRaisesRegex(UserError, "--grounding=reward"):
            fused_reward(self.C, self.G, self.MASK, grounding="reward")


@st.composite
def insertions(draw):
    """(c, g, place): a trajectory of n steps and where an idle one goes in."""
    n = draw(st.integers(1, 5))
    c = draw(floats((1, n)))
    g = draw(hnp.arrays(np.bool_, (1, n)))
    return c, g, draw(st.integers(0, n))


def _return(c, g, gamma, grounding):
    """sum_k gamma^k r_k of one trajectory, through arrays padded to S."""
    n = c.shape[1]
    pad = ((0, 0), (0, S - n))
    mask = np.pad(np.ones((1, n)), pad)
    r = fused(np.pad(c, pad), np.pad(g, pad), mask, grounding=grounding)
    return float(np.sum(gamma ** np.arange(S) * np.asarray(r)))


class LoiteringTest(absltest.TestCase):
    """Inserting an executable step with c = 0, as an agent that dawdles does."""

    @few
    @hypothesis.given(insertions())
    def test_it_never_raises_the_return_under_penalty(self, case):
        c, g, place = case
        longer = np.insert(c, place, 0.0, axis=1), np.insert(g, place, True, axis=1)
        before, after = _return(c, g, 1.0, "penalty"), _return(*longer, 1.0, "penalty")
        self.assertLessEqual(after, before + 1e-5)

    @few
    @hypothesis.given(insertions(), st.floats(0.5, 1.0))
    def test_nor_the_discounted_one_of_a_win(self, case, gamma):
        # A win: what is still to come is worth something (progress, executable steps).
        c, _, place = case
        c = np.abs(c)
        g = np.ones(c.shape, bool)
        longer = np.insert(c, place, 0.0, axis=1), np.insert(g, place, True, axis=1)
        before, after = _return(c, g, gamma, "penalty"), _return(*longer, gamma, "penalty")
        self.assertLessEqual(after, before + 1e-5)

    def test_under_bonus_it_pays(self):
        c, g = np.array([[0.5, 0.5]], np.float32), np.ones((1, 2), bool)
        longer = np.insert(c, 1, 0.0, axis=1), np.insert(g, 1, True, axis=1)
        self.assertGreater(_return(*longer, 0.99, "bonus"), _return(c, g, 0.99, "bonus") + 0.4)


class CreditTest(chex.TestCase):
    C = np.array([[0.5, 0.1, -0.3, NAN], [0.2, NAN, NAN, NAN], [NAN] * 4], np.float32)
    MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    R = np.array([1.0, 0.0, 1.0], np.float32)

    @chex.all_variants
    @parameterized.parameters(
        ("spa", False, [[0.5, 0.1, -0.3, 0], [0.2, 0, 0, 0], [0] * 4]),
        ("uniform", False, [[0.1, 0.1, 0.1, 0], [0.2, 0, 0, 0], [0] * 4]),
        ("terminal", False, [[0, 0, 1.0, 0], [0, 0, 0, 0], [0] * 4]),
        ("spa", True, [[0.5, 0.1, 0.4, 0], [0.0, 0, 0, 0], [0] * 4]),
        ("uniform", True, [[0.1, 0.1, 0.8, 0], [0.0, 0, 0, 0], [0] * 4]),
        ("terminal", True, [[0, 0, 1.0, 0], [0, 0, 0, 0], [0] * 4]),
    )
    def test_by_hand(self, kind, residual, expected):
        choose = functools.partial(credit, kind, residual=residual)
        actual = self.variant(lambda c, r, m: choose(c, r, m))(self.C, self.R, self.MASK)
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    def test_shuffled_is_a_permutation_that_depends_on_the_key(self):
        c = np.tile(np.arange(6, dtype=np.float32), (4, 1))
        mask = np.tile([1, 0, 1, 1, 1, 0], (4, 1))
        drawn = [
            np.asarray(credits("shuffled", c, np.ones(4), mask, jax.random.key(i)))
            for i in range(3)
        ]
        for draw in drawn:
            np.testing.assert_array_equal(draw[:, [1, 5]], 0)
            np.testing.assert_array_equal(
                np.sort(draw[:, [0, 2, 3, 4]], axis=1), np.tile([0, 2, 3, 4], (4, 1))
            )
        self.assertFalse(np.array_equal(drawn[0], drawn[1]))
        self.assertFalse(np.array_equal(drawn[0][0], drawn[0][1]) and
                         np.array_equal(drawn[0][1], drawn[0][2]))

    def test_random_shares_are_dirichlet(self):
        rows, n = 400, 4
        c, mask = np.full((rows, n), 0.5, np.float32), np.ones((rows, n))
        shares = np.asarray(credit("random", c, np.ones(rows), mask, jax.random.key(0))) / 2
        self.assertTrue((shares >= 0).all())
        np.testing.assert_allclose(shares.mean(0), 1 / n, atol=0.04)
        # Var of a Dirichlet(1, ..., 1) share: (n - 1) / (n^2 (n + 1)) = 0.0375.
        np.testing.assert_allclose(shares.var(0), 0.0375, atol=0.012)

    def test_unknown_kind_and_missing_key(self):
        with self.assertRaisesRegex(UserError, "--credit=magic"):
            credit("magic", self.C, self.R, self.MASK)
        with self.assertRaisesRegex(ValueError, "key"):
            credit("random", self.C, self.R, self.MASK)


class CreditPropertiesTest(parameterized.TestCase):
    KEY = jax.random.key(7)

    @parameterized.product(kind=KINDS, residual=(False, True))
    def test_the_total_is_kept(self, kind, residual):
        @few
        @hypothesis.given(floats((N, S)), floats(N, 0.0, 1.0), masks())
        def check(c, reward, mask):
            out = np.asarray(credits(kind, c, reward, mask, self.KEY, residual=residual))
            played = mask.any(1)
            total = reward if residual or kind == "terminal" else (c * mask).sum(1)
            np.testing.assert_allclose(out.sum(1), total * played, atol=1e-4)
            np.testing.assert_array_equal(out[~mask], 0)

        check()

    @parameterized.parameters(*KINDS)
    def test_padding_and_what_lies_in_it_change_nothing(self, kind):
        @few
        @hypothesis.given(floats((N, S)), masks(), floats((N + 1, S + 2)))
        def check(c, mask, junk):
            more = np.zeros((N + 1, S + 2), bool)
            more[:N, :S] = mask
            padded = np.where(more, np.pad(c, ((0, 1), (0, 2))), np.where(junk > 0, junk, np.nan))
            reward = np.linspace(0, 1, N + 1, dtype=np.float32)
            out = np.asarray(credits(kind, c, reward[:N], mask, self.KEY))
            wide = np.asarray(credits(kind, padded, reward, more, self.KEY))
            np.testing.assert_allclose(wide[:N, :S], out, atol=1e-5)
            np.testing.assert_array_equal(wide[~more], 0)

        check()


if __name__ == "__main__":
    absltest.main()
