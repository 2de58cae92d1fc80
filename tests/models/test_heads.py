"""The heads: zero at the start, float32 always, and able to learn."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from spa_jax.attribution.estimator import progress_loss
from spa_jax.models import heads
from spa_jax.models.heads import Head


class HeadsTest(chex.TestCase):
    @chex.all_variants
    def test_zero_at_the_start_in_any_shape_and_dtype(self):
        head = Head(width=8)
        hidden = jax.random.normal(jax.random.key(0), (2, 3, 16)).astype(jnp.bfloat16)
        variables = head.init(jax.random.key(1), hidden)
        out = self.variant(head.apply)(variables, hidden)
        chex.assert_shape(out, (2, 3))
        chex.assert_type(out, jnp.float32)
        np.testing.assert_array_equal(out, 0)

    def test_parameters_are_a_plain_float32_tree(self):
        params = Head(width=8).init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
        shapes = {
            "norm": {"scale": (16,), "bias": (16,)},
            "hidden": {"kernel": (16, 8), "bias": (8,)},
            "out": {"kernel": (8, 1), "bias": (1,)},
        }
        self.assertEqual(jax.tree.map(lambda x: x.shape, params), shapes)
        chex.assert_type(jax.tree.leaves(params), jnp.float32)

    def test_fit_norm_standardises_each_coordinate(self):
        rng = np.random.default_rng(0)
        hidden = rng.normal(size=(50, 4, 16)) * rng.uniform(0.1, 2, 16) + rng.normal(size=16)
        hidden[..., 3] = 30
        mask = rng.integers(0, 2, (50, 4))
        hidden[mask == 0] = np.nan
        params = Head(width=8).init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
        fitted = jax.jit(heads.fit_norm)(params, hidden, mask)
        chex.assert_trees_all_equal_shapes_and_dtypes(fitted, params)
        chex.assert_trees_all_equal(fitted["hidden"], params["hidden"])
        out = nn.LayerNorm().apply({"params": fitted["norm"]}, hidden[mask == 1])
        np.testing.assert_allclose(out.mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(out.std(0), 1, atol=1e-3)

    def test_it_learns_which_steps_matter_from_totals_alone(self):
        """Steps of two kinds; R is the share of good ones.  c must tell them apart."""
        rng = np.random.default_rng(0)
        good = rng.integers(0, 2, (64, 5))
        mask = np.arange(5) < rng.integers(1, 6, (64, 1))
        kinds = rng.normal(size=(2, 16))
        hidden = kinds[good] + 0.3 * rng.normal(size=(64, 5, 16))
        hidden[..., 3] = 30  # a decoder's hidden states have such coordinates
        reward = (good * mask).sum(1) / 5
        head, tx = Head(width=16), optax.adam(3e-3)
        params = head.init(jax.random.key(0), hidden)["params"]

        def loss(p):
            total, count = progress_loss(head.apply({"params": p}, hidden), mask, reward)
            return total / count

        def train(p):
            def update(_, carry):
                p, state = carry
                updates, state = tx.update(jax.grad(loss)(p), state)
                return optax.apply_updates(p, updates), state

            return jax.lax.fori_loop(0, 60, update, (p, tx.init(p)))[0]

        train = jax.jit(train)
        plain, fitted = train(params), train(heads.fit_norm(params, hidden, mask))
        self.assertLess(loss(fitted), 0.1 * np.var(reward))
        self.assertLess(loss(fitted), 0.5 * loss(plain))
        c = np.asarray(head.apply({"params": fitted}, hidden))
        self.assertGreater(c[mask & (good == 1)].mean() - c[mask & (good == 0)].mean(), 0.15)


if __name__ == "__main__":
    absltest.main()
