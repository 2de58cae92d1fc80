"""Losses by hand, their gradients, and what masked places may not do to either."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from spa_jax.parity import released
from spa_jax.rl import losses

few = hypothesis.settings(max_examples=25, deadline=None)
policy_loss = functools.partial(losses.clipped_policy_loss, clip=0.2)
value_loss = functools.partial(losses.clipped_value_loss, clip=0.5)


class PolicyLossTest(chex.TestCase):
    # Raised and clipped, lowered and kept, in between, and the same for bad actions.
    RATIO = np.array([1.5, 0.5, 1.1, 1.5, 0.5], np.float32)
    A = np.array([2.0, 2.0, -1.0, -1.0, -2.0], np.float32)
    OLD = np.array([-1.0, -2.0, -0.5, -3.0, -1.0], np.float32)
    MASK = np.ones(5, np.float32)

    @chex.all_variants
    def test_by_hand(self):
        new = self.OLD + np.log(self.RATIO)
        loss, stats = self.variant(policy_loss)(new, self.OLD, self.A, self.MASK)
        np.testing.assert_allclose(loss, -(2.4 + 1.0 - 1.1 - 1.5 - 1.6), rtol=1e-5)
        self.assertEqual(stats.clipped, 2)
        np.testing.assert_allclose(stats.ratio, 5.1, rtol=1e-6)
        np.testing.assert_allclose(stats.approx_kl, 0.580054, rtol=1e-5)

    def test_clipped_tokens_have_no_gradient(self):
        new = jnp.asarray(self.OLD + np.log(self.RATIO))
        grad = jax.grad(lambda x: policy_loss(x, self.OLD, self.A, self.MASK)[0])(new)
        np.testing.assert_allclose(grad, [0.0, -1.0, 1.1, 1.5, 0.0], rtol=1e-5)

    def test_on_policy_it_is_the_policy_gradient(self):
        f = lambda x: policy_loss(x, self.OLD, self.A, self.MASK)  # noqa: E731
        (loss, stats), grad = jax.value_and_grad(f, has_aux=True)(jnp.asarray(self.OLD))
        np.testing.assert_allclose(loss, -self.A.sum(), atol=1e-6)
        np.testing.assert_allclose(grad, -self.A, atol=1e-6)
        self.assertEqual((stats.clipped, stats.ratio, stats.approx_kl), (0, 5, 0))


class OldEpisodesTest(chex.TestCase):
    """The ratio to the policy that drew the tokens, however old it is."""

    def test_it_makes_the_gradient_that_of_the_new_policy(self):
        """Over all actions, weighted as the old policy draws them: E_old[rho A] = E_new[A]."""
        old, a = np.log([0.5, 0.3, 0.2]).astype(np.float32), np.array([1.0, -2.0, 0.5], np.float32)

        def surrogate(logits, i):
            log_pi = jax.nn.log_softmax(logits)
            loss = functools.partial(losses.clipped_policy_loss, clip=1e6)
            return loss(log_pi[i : i + 1], old[i : i + 1], a[i : i + 1], np.ones(1))[0]

        logits = jnp.array([0.3, -1.0, 2.0])
        grads = [np.exp(old[i]) * jax.grad(surrogate)(logits, i) for i in range(3)]
        wanted = jax.grad(lambda x: -jnp.dot(jax.nn.softmax(x), a))(logits)
        np.testing.assert_allclose(sum(grads), wanted, atol=1e-6)

    @chex.all_variants
    def test_truncated_by_hand(self):
        ratio, a = np.array([4.0, 4.0, 1.0, 0.1], np.float32), np.array([-1.0, 1.0, -1.0, -1.0])
        old = np.full(4, -2.0, np.float32)
        f = functools.partial(policy_loss, truncate=2.0)
        loss, stats = self.variant(f)(old + np.log(ratio), old, a.astype(np.float32), np.ones(4))
        np.testing.assert_allclose(loss, 2.0 - 1.2 + 1.0 + 0.8, rtol=1e-5)
        np.testing.assert_allclose(stats.ratio, 9.1, rtol=1e-5)  # as it is
        np.testing.assert_allclose(stats.ratio_squared, 33.01, rtol=1e-5)

    def test_truncated_the_direction_is_kept_and_its_size_bounded(self):
        old = np.full(3, -90.0, np.float32)
        new, a = np.array([-1e-3, -89.9, -89.0], np.float32), -np.ones(3, np.float32)
        f = functools.partial(policy_loss, truncate=2.0)
        grad = jax.grad(lambda x: f(x, old, a, np.ones(3))[0])(new)
        np.testing.assert_allclose(grad, [2.0, np.exp(0.1), 2.0], rtol=1e-4)

    def test_truncation_above_every_ratio_changes_nothing(self):
        rng = np.random.default_rng(2)
        new, old, a = (rng.normal(-1, 0.3, 9).astype(np.float32) for _ in range(3))
        plain, cut = (
            jax.value_and_grad(lambda x, c=c: policy_loss(x, old, a, np.ones(9), truncate=c)[0])(
                new
            )
            for c in (0.0, 1e4)
        )
        np.testing.assert_array_equal(plain[0], cut[0])
        np.testing.assert_array_equal(plain[1], cut[1])

    def test_effective_share(self):
        for weights, share in (([1, 1, 1, 1], 1.0), ([4, 0, 0, 0], 0.25), ([1, 3], 0.8)):
            w = np.array(weights, float)
            actual = losses.effective_share(w.sum(), (w * w).sum(), len(w))
            self.assertAlmostEqual(actual, share)
        self.assertEqual(losses.effective_share(0.0, 0.0, 3), 0.0)


class ValueLossTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        # Kept by the old value (0.25 > 0), unmoved (1), unmoved and far (25).
        v, old = np.array([1.0, 2.0, 0.0], np.float32), np.array([0.0, 2.0, 0.0], np.float32)
        loss = self.variant(value_loss)(v, old, np.array([1.0, 1.0, 5.0], np.float32), np.ones(3))
        np.testing.assert_allclose(loss, (0.25 + 1 + 25) / 2)


class KlTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        new, ref = np.log([0.25, 0.5]), np.log([0.5, 0.25])
        kl = self.variant(losses.k3_kl)(new.astype(np.float32), ref.astype(np.float32), np.ones(2))
        np.testing.assert_allclose(kl, 0.5, rtol=1e-6)  # 2 - 1 - log 2 + 1/2 - 1 + log 2

    def test_its_mean_over_the_policy_is_the_kl_divergence(self):
        pi, ref = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
        estimates = jax.vmap(losses.k3_kl)(np.log(pi), np.log(ref), np.ones(3))
        np.testing.assert_allclose(np.dot(pi, estimates), np.sum(pi * np.log(pi / ref)), rtol=1e-5)

    @few
    @hypothesis.given(*[hnp.arrays(np.float32, 4, elements=st.floats(-9, 0, width=32))] * 2)
    def test_never_negative(self, new, ref):
        self.assertGreaterEqual(losses.k3_kl(new, ref, np.ones(4)), 0)
        self.assertEqual(losses.k3_kl(new, new, np.ones(4)), 0)


class EntropyTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        logits = np.log([[0.5, 0.25, 0.25], [1 / 3] * 3, [0.9, 0.05, 0.05]]).astype(np.float32)
        actual = self.variant(losses.entropy)(logits + 7, np.array([1, 1, 0]))
        np.testing.assert_allclose(actual, 1.5 * np.log(2) + np.log(3), rtol=1e-5)

    def test_tokens_ruled_out(self):
        logits = jnp.array([[0.0, 0.0, -jnp.inf]])
        value, grad = jax.value_and_grad(losses.entropy)(logits, np.ones(1))
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
        np.testing.assert_allclose(grad, np.zeros((1, 3)), atol=1e-6)


class NllTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        x = np.array([-0.5, -1.5, -9.0], np.float32)
        self.assertEqual(self.variant(losses.nll)(x, np.array([1, 1, 0])), 2.0)


ELEMENTWISE = {
    "policy": (lambda *a: policy_loss(*a)[0], 3),
    "value": (value_loss, 3),
    "kl": (losses.k3_kl, 2),
    "nll": (losses.nll, 1),
    "entropy": (lambda x, m: losses.entropy(jnp.stack([x, 0 * x], -1), m), 1),
}


class EveryLossTest(parameterized.TestCase):
    @parameterized.parameters(*ELEMENTWISE)
    def test_masked_places_poison_neither_loss_nor_gradient(self, name):
        loss, n = ELEMENTWISE[name]
        x = [np.linspace(-2, -0.5 - i, 6, dtype=np.float32) for i in range(n)]
        mask = np.array([1, 1, 1, 1, 0, 0])
        clean, clean_grad = jax.value_and_grad(loss)(*x, mask)
        dirty = [np.where(mask, a, np.array([0, 0, 0, 0, np.nan, np.inf], np.float32)) for a in x]
        value, grad = jax.value_and_grad(loss)(*dirty, mask)
        np.testing.assert_allclose(value, clean, rtol=1e-6)
        np.testing.assert_allclose(grad, clean_grad, rtol=1e-6)
        np.testing.assert_array_equal(grad[4:], 0)
        self.assertNotEqual(clean, 0)

    @parameterized.parameters(*ELEMENTWISE)
    def test_nothing_costs_nothing(self, name):
        loss, n = ELEMENTWISE[name]
        value, grad = jax.value_and_grad(loss)(*[np.full(3, np.nan, np.float32)] * n, np.zeros(3))
        self.assertEqual(value, 0)
        np.testing.assert_array_equal(grad, 0)

    @parameterized.parameters(*ELEMENTWISE)
    def test_a_sum_does_not_depend_on_the_dealing(self, name):
        loss, n = ELEMENTWISE[name]
        rng = np.random.default_rng(0)
        x = [rng.normal(-1, 1, (8, 5)).astype(np.float32) for _ in range(n)]
        mask = rng.integers(0, 2, (8, 5))
        whole = loss(*x, mask)
        for parts in (2, 4, 8):
            cut = [a.reshape(parts, -1, 5) for a in (*x, mask)]
            np.testing.assert_allclose(jax.vmap(loss)(*cut).sum(), whole, rtol=1e-5)

    @parameterized.parameters(*ELEMENTWISE)
    def test_gradients_are_the_numerical_ones(self, name):
        loss, n = ELEMENTWISE[name]
        with jax.enable_x64(True):
            rng = np.random.default_rng(1)
            x = [rng.normal(-1, 0.7, 7) for _ in range(n)]  # no ratio lies on a kink
            check_grads(lambda a: loss(a, *x[1:], np.ones(7)), (x[0],), order=1, modes="rev")

    def test_shapes_are_checked(self):
        with self.assertRaises(AssertionError):
            policy_loss(np.zeros(3), np.zeros(3), np.zeros((3, 1)), np.ones(3))
        with self.assertRaises(AssertionError):
            losses.entropy(np.zeros(3), np.ones(3))


class AdaptedKlTest(parameterized.TestCase):
    @parameterized.parameters(
        # c, KL, what c is multiplied with: target 6, 8 episodes, horizon 10,000
        (0.3, 6.0, 1.0),
        (0.3, 6.6, 1 + 0.1 * 8 / 10_000),
        (0.3, 5.4, 1 - 0.1 * 8 / 10_000),
        (0.3, 60.0, 1 + 0.2 * 8 / 10_000),
        (2.0, -1.0, 1 - 0.2 * 8 / 10_000),
    )
    def test_it_moves_towards_the_target_and_no_faster_than_a_fifth(self, c, kl, factor):
        found = losses.adapted_kl_coef(c, kl, target=6.0, episodes=8, horizon=10_000)
        self.assertAlmostEqual(found, c * factor)

    def test_it_is_the_released_trainers(self):
        """That of `parity.released`, which golden cases hold to the authors' own numbers."""
        config = released.Config(8, 1, target=6.0, horizon=10_000.0)
        for kl in (0.5, 5.9, 6.3, 20.0):
            ours = losses.adapted_kl_coef(0.3, kl, target=6.0, episodes=8, horizon=10_000.0)
            self.assertAlmostEqual(ours, released.next_kl_coef(0.3, kl, config), places=9)


if __name__ == "__main__":
    absltest.main()
