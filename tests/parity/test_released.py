"""The released code's arithmetic by hand, one quirk a test."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from spa_jax.parity import released

f32 = functools.partial(np.asarray, dtype=np.float32)


class MaskedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_mean_and_variance(self):
        x, mask = f32([1, 2, 6, 100]), np.array([1, 1, 1, 0])
        np.testing.assert_allclose(self.variant(released.masked_mean)(x, mask), 3.0)
        np.testing.assert_allclose(self.variant(released.masked_var)(x, mask), 7.0)
        biased = functools.partial(released.masked_var, unbiased=False)
        np.testing.assert_allclose(self.variant(biased)(x, mask), 14 / 3, rtol=1e-6)

    def test_a_single_token_is_not_a_number(self):
        """Q25: the correction divides by 0, and the whitened advantages are nan."""
        mask = np.array([0, 1, 0])
        self.assertTrue(np.isnan(released.masked_var(f32([1, 2, 3]), mask)))
        self.assertTrue(np.isnan(released.whiten(f32([1, 2, 3]), mask)).all())

    def test_whitening_also_moves_what_the_mask_leaves_out(self):
        x, mask = f32([1, 3, 10]), np.array([1, 1, 0])
        scale = 1 / np.sqrt(2)
        np.testing.assert_allclose(released.whiten(x, mask), [-scale, scale, 8 * scale], rtol=1e-6)
        kept = released.whiten(x, mask, shift_mean=False)
        np.testing.assert_allclose(kept, [2 - scale, 2 + scale, 2 + 8 * scale], rtol=1e-6)


class RewardTest(parameterized.TestCase):
    def test_the_mask_is_a_token_earlier_and_does_not_know_padding(self):
        """Q9."""
        frag = np.array([[0, 1, 1, 0], [1, 0, 0, 1]])
        np.testing.assert_array_equal(released.policy_mask(frag), [[1, 1, 0], [0, 0, 1]])

    @parameterized.parameters(("kl", [0.5, -0.5]), ("abs", [0.5, 0.5]), ("mse", [0.125, 0.125]))
    def test_kl_of_tokens(self, kind, expected):
        p, q = f32([-1.0, -2.0]), f32([-1.5, -1.5])
        np.testing.assert_allclose(released.kl_penalty(p, q, kind), expected)

    def test_kl_of_the_vocabulary(self):
        p, q = np.log(f32([[0.5, 0.5]])), np.log(f32([[0.25, 0.75]]))
        expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
        np.testing.assert_allclose(released.kl_penalty(p, q, "full"), [expected], rtol=1e-5)

    def test_no_other_kl(self):
        with self.assertRaisesRegex(ValueError, "kl, abs, mse, full"):
            released.kl_penalty(f32([0]), f32([0]), "k3")

    @parameterized.named_parameters(  # mask, scores of the row, rewards with the factor, without
        ("three", [0, 1, 1, 0, 1, 0, 1], [5, 7, 9], [0, 0, 10, 0, 7, 0, 0], [0, 0, 5, 0, 7, 0, 9]),
        ("one_step_earns_nothing", [0, 1, 1, 0], [5], [0, 0, 0, 0], [0, 0, 5, 0]),
        ("first_steps_without_score", [1, 0, 1, 0, 1], [7, 9], [0, 0, 7, 0, 0], [0, 0, 7, 0, 9]),
        ("surplus_falls_off_the_front", [1, 0, 1], [5, 7, 9], [7, 0, 0], [7, 0, 9]),
        ("touching_steps_are_one", [1, 1, 1, 0, 1], [5, 7, 9], [0, 0, 7, 0, 0], [0, 0, 7, 0, 9]),
        ("nothing_trained", [0, 0, 0], [5, 7], [0, 0, 0], [0, 0, 0]),
        ("all_trained", [1, 1, 1], [5, 7], [0, 0, 0], [0, 0, 7]),
    )
    def test_scores(self, mask, scores, weighted, plain):
        """Q2, Q3: the number of later steps is the factor, whatever was dropped."""
        run = functools.partial(
            released.score_rewards, f32([[*scores, 99]]), np.array([len(scores)]), np.array([mask])
        )
        np.testing.assert_array_equal(run(), [weighted])
        np.testing.assert_array_equal(run(weighted=False), [plain])

    def test_rows_are_apart(self):
        got = released.score_rewards(
            f32([[1, 2], [3, 0]]),
            np.array([2, 1]),
            np.array([[1, 0, 1], [0, 1, 0]]),
            weighted=False,
        )
        np.testing.assert_array_equal(got, [[1, 0, 2], [0, 3, 0]])

    def test_half_precision(self):
        """Q15: 1.35 is 1.349609 in float16, and twice that is 2.699219."""
        got = released.score_rewards(
            np.array([[1.35, 0, 0]], np.float16), np.array([3]), np.array([[1, 0, 1, 0, 1]])
        )
        self.assertEqual(got.dtype, jnp.float32)
        np.testing.assert_array_equal(got[0, 0], np.float32(2.69921875))


class TokenGaeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        """Q5: the token that was read has value 0, and what comes after it fades across it."""
        run = functools.partial(released.token_gae, gamma=0.5, lam=0.5)
        got = self.variant(run)(f32([[1, 9, 2]]), f32([[1, 9, 4]]), np.array([[1, 0, 1]]))
        # delta = [1 + 0 - 1, 0 + .5 * 2 - 0, 4 - 2] = [0, 1, 2]; A = delta + A' / 4.
        np.testing.assert_allclose(got.values, [[1, 0, 2]])
        np.testing.assert_allclose(got.raw, [[0.375, 1.5, 2.0]])
        np.testing.assert_allclose(got.returns, [[1.375, 1.5, 4.0]])
        np.testing.assert_allclose(
            np.asarray(got.whitened)[0, [0, 2]], [-(0.5**0.5), 0.5**0.5], rtol=1e-6
        )

    def test_whitened_rewards_are_no_longer_zero_where_nothing_was_written(self):
        got = released.token_gae(
            np.zeros((1, 3), np.float32),
            f32([[1, 9, 3]]),
            np.array([[1, 0, 1]]),
            gamma=0.0,
            lam=0.0,
            whiten_rewards=True,
        )
        scale = 1 / np.sqrt(2)  # mean 2, variance 2
        np.testing.assert_allclose(got.raw, [[2 - scale, 2 - 2 * scale, 2 + scale]], rtol=1e-6)


class KlCoefficientTest(parameterized.TestCase):
    @parameterized.parameters((6.6, 1.1), (60.0, 1.2), (-3.0, 0.8), (6.0, 1.0))
    def test_moves_by_a_fifth_at_most(self, kl, factor):
        config = released.Config(4, 2, target=6.0, horizon=4.0)
        self.assertAlmostEqual(released.next_kl_coef(0.3, kl, config), 0.3 * factor)

    def test_or_stays(self):
        config = released.Config(4, 2, adap_kl_ctrl=False, horizon=4.0)
        self.assertEqual(released.next_kl_coef(0.3, 60.0, config), 0.3)


def minibatch(**changes):
    """Two tokens that count, and one that does not."""
    zero = f32([[0, 0, 0]])
    batch = released.Minibatch(
        tokens=np.zeros((1, 4), int),
        attention_mask=np.ones((1, 4), int),
        mask=np.array([[1, 1, 0]]),
        log_probs=zero,
        values=zero,
        advantages=f32([[1, -1, 50]]),
        returns=f32([[1, 0, 50]]),
    )
    return batch._replace(**changes)


class LossTest(chex.TestCase):
    def outputs(self, ratios, values):
        return released.Outputs(np.log(f32([ratios])), f32([values]), f32([[1, 2, 50]]))

    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        config = released.Config(1, 1, vf_coef=0.1)
        run = self.variant(functools.partial(released.losses, config=config))
        loss, stats = run(self.outputs([1.5, 0.5, 9], [0.5, 0.1, 9]), minibatch())
        # Policy: max(-1.5, -1.2) = -1.2 and max(.5, .8) = .8.  Value: old 0, so .5 is clipped to
        # .2: max(.25, .64), and .1 stays: .01.
        np.testing.assert_allclose(stats["loss/policy"], -0.2, rtol=1e-5)
        np.testing.assert_allclose(stats["loss/value"], 0.5 * (0.64 + 0.01) / 2, rtol=1e-5)
        np.testing.assert_allclose(loss, -0.2 + 0.1 * 0.1625, rtol=1e-5)
        expected = {
            "policy/entropy": 1.5,
            "policy/clipfrac": 1.0,
            "val/clipfrac": 0.5,
            "val/error": 0.13,
            "val/vpred": 0.3,
            "returns/mean": 0.5,
            "returns/var": 0.5,
            "policy/advantages_mean": 0.0,
            "val/mean": 0.0,
            "policy/policykl": -(np.log(1.5) + np.log(0.5)) / 2,
            "policy/approxkl": (np.log(1.5) ** 2 + np.log(0.5) ** 2) / 4,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(stats[name], value, atol=1e-6, err_msg=name)

    def test_above_the_ratio_threshold_there_is_no_loss(self):
        new = self.outputs([1.5, 1.1, 1], [0.5, 0.1, 0])
        for threshold, kept in ((1.29, False), (1.31, True)):
            config = released.Config(1, 1, ratio_threshold=threshold)
            loss, stats = released.losses(new, minibatch(), config)
            self.assertEqual(bool(loss != 0), kept)
            self.assertEqual(bool(stats["loss/value"] != 0), kept)
            gradient = jax.grad(
                lambda v, c=config: released.losses(new._replace(values=v), minibatch(), c)[0]
            )(new.values)
            self.assertEqual(bool(jnp.any(gradient != 0)), kept)
            self.assertGreater(float(stats["val/error"]), 0)  # is told all the same


def forward(params, tokens, attention_mask):
    """A model that looks at one token: logits and a value from tables."""
    del attention_mask
    return params["logits"][tokens], params["values"][tokens]


def case(config):
    """A toy model, its trainer and four rows of five tokens."""
    rng = np.random.default_rng(0)
    trained = {"logits": f32(rng.normal(size=(6, 6))), "values": f32(rng.normal(size=6))}
    reference = {"logits": f32(rng.normal(size=(6, 6))), "values": np.zeros(6, np.float32)}
    frag = np.array([[0, 1, 1, 0, 1], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    batch = released.Batch(
        jnp.asarray(rng.integers(0, 6, (4, 5))),
        jnp.ones((4, 5), int),
        released.policy_mask(frag),
        jnp.asarray(f32(rng.normal(size=(4, 3)))),
        jnp.array([2, 3, 1, 2]),
    )
    return released.start(trained, config, 0.3), reference, batch


def run(config, orders=((3, 1, 0, 2),) * 4):
    state, reference, batch = case(config)
    return state, *released.step(
        forward, state, {}, reference, batch, permutations=orders, config=config
    )


class StepTest(parameterized.TestCase):
    def close(self, a, b, **tolerance):
        chex.assert_trees_all_close(a, b, **{"rtol": 1e-5, "atol": 1e-7} | tolerance)

    def test_minibatches_follow_the_orders(self):
        config = released.Config(4, 2, ppo_epochs=2)
        _, _, trace = run(config, ((3, 1, 0, 2), (0, 1, 2, 3)))
        self.assertEqual(trace.minibatches, [(3, 1), (0, 2), (0, 1), (2, 3)])

    def test_an_update_takes_the_mean_of_its_minibatches_own_means(self):
        """Q19: not the mean over all of its tokens."""
        _, _, parts = run(released.Config(4, 2, ppo_epochs=1, gradient_accumulation_steps=2))
        state, _, whole = run(released.Config(4, 4, ppo_epochs=1))
        seen, batch = parts.experience, case(released.Config(4, 2))[2]
        all_rows = released.Minibatch(
            tokens=batch.tokens,
            attention_mask=batch.attention_mask,
            mask=batch.mask,
            log_probs=seen.log_probs,
            values=seen.advantages.values,
            advantages=seen.advantages.whitened,
            returns=seen.advantages.returns,
        )
        config = released.Config(4, 2)
        one, two = (
            released.minibatch_gradient(
                forward, state.trained, {}, jax.tree.map(lambda x, r=rows: x[r], all_rows), config
            )[0]
            for rows in (np.array([3, 1]), np.array([0, 2]))
        )
        self.close(parts.first_gradient, jax.tree.map(lambda g: g / 2, one))
        self.close(parts.first_update, jax.tree.map(lambda a, b: (a + b) / 2, one, two))
        apart = jax.tree.map(jnp.subtract, parts.first_update, whole.first_update)
        self.assertGreater(float(optax.global_norm(apart)), 1e-4)

    def test_only_the_first_update_is_clipped(self):
        """Q18."""
        settings = {"ppo_epochs": 1, "learning_rate": 0.0}  # so that all see the same weights
        _, free, trace = run(released.Config(4, 2, **settings))
        _, clipped, _ = run(released.Config(4, 2, max_grad_norm=1e-3, **settings))
        scale = 1e-3 / (optax.global_norm(trace.first_update) + 1e-6)
        # Adam's first moment is 0.9 * 0.1 g_1 + 0.1 g_2.
        lost = jax.tree.map(lambda g: 0.09 * g * (1 - scale), trace.first_update)
        self.close(clipped.adam[0].mu, jax.tree.map(jnp.subtract, free.adam[0].mu, lost), atol=1e-6)
        _, second, again = run(released.Config(4, 4, max_grad_norm=1e-3, **settings))
        norm = float(optax.global_norm(second.adam[0].mu))
        self.assertAlmostEqual(norm, 1e-4, delta=1e-6)
        self.assertGreater(float(optax.global_norm(again.first_gradient)), 1e-2)

    def test_a_later_step_of_the_trainer_is_not_clipped_at_all(self):
        config = released.Config(4, 4, ppo_epochs=1, max_grad_norm=1e-3, learning_rate=0.0)
        state, reference, batch = case(config)
        again = {"permutations": [(0, 1, 2, 3)], "config": config}
        first, _ = released.step(forward, state, {}, reference, batch, **again)
        second, trace = released.step(forward, first, {}, reference, batch, **again)
        added = jax.tree.map(lambda a, b: b - 0.9 * a, first.adam[0].mu, second.adam[0].mu)
        self.close(added, jax.tree.map(lambda g: 0.1 * g, trace.first_update), atol=1e-6)

    def test_adam_is_that_of_pytorch(self):
        """w - lr m / (sqrt(v) + eps), both bias-corrected: the first move is lr * sign(g)."""
        state, after, trace = run(released.Config(4, 4, ppo_epochs=1, learning_rate=0.1))
        moved = jax.tree.map(lambda g: -0.1 * g / (jnp.abs(g) + 1e-8), trace.first_update)
        self.close(after.trained, jax.tree.map(jnp.add, state.trained, moved), atol=1e-5)

    def test_stops_after_the_epoch_whose_last_minibatch_is_too_far(self):
        settings = {"ppo_epochs": 4, "learning_rate": 0.5}
        _, _, trace = run(released.Config(4, 2, **settings))
        kls = [float(s["policy/policykl"]) for s in trace.stats]
        self.assertGreater(kls[1], 0.1)
        _, _, early = run(released.Config(4, 2, early_stopping=True, target_kl=0.02, **settings))
        self.assertLen(early.stats, 2)
        _, _, late = run(released.Config(4, 2, early_stopping=True, target_kl=1e3, **settings))
        self.assertLen(late.stats, 8)

    def test_the_coefficient_moves_after_the_updates(self):
        state, after, trace = run(released.Config(4, 2, horizon=100.0))
        kls = np.asarray(trace.experience.kl) * case(released.Config(4, 2))[2].mask
        kl = np.mean(np.sum(kls, 1))
        expected = released.next_kl_coef(0.3, float(kl), released.Config(4, 2, horizon=100.0))
        self.assertAlmostEqual(after.kl_coef, expected, places=6)
        self.assertNotEqual(after.kl_coef, state.kl_coef)
        np.testing.assert_allclose(
            trace.experience.non_score_rewards, -0.3 * np.asarray(trace.experience.kl), rtol=1e-6
        )

    def test_statistics(self):
        """Scores are those of the last steps; means are over minibatches, not tokens."""
        config = released.Config(4, 2, ppo_epochs=1)
        state, _, trace = run(config)
        batch = case(config)[2]
        stats = released.statistics(state, trace, batch, np.array([1, 2, 3, 4]), config)
        last = np.asarray(batch.scores)[np.arange(4), [1, 2, 0, 1]]
        np.testing.assert_allclose(stats["ppo/mean_scores"], last.mean(), rtol=1e-6)
        np.testing.assert_allclose(stats["ppo/std_scores"], last.std(ddof=1), rtol=1e-6)
        np.testing.assert_allclose(stats["tokens/queries_len_mean"], 2.5)
        np.testing.assert_allclose(stats["tokens/responses_dist"], [4, 3, 2, 1])
        each = np.array([float(s["loss/total"]) for s in trace.stats])
        np.testing.assert_allclose(stats["ppo/loss/total"], each.mean(), rtol=1e-5)
        errors = np.mean([float(s["val/error"]) for s in trace.stats])
        variances = np.mean([float(s["returns/var"]) for s in trace.stats])
        np.testing.assert_allclose(
            stats["ppo/val/var_explained"], 1 - errors / variances, rtol=1e-5
        )


class ProgressTest(absltest.TestCase):
    def test_by_hand(self):
        """Q4: a linear head on the logits at the last token of each turn; no turn, no value."""
        ends = released.turn_ends(np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]))
        np.testing.assert_array_equal(ends, [[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
        logits = f32(np.arange(20).reshape(2, 5, 2))
        values = released.turn_values(logits, f32([[1, -1]]), f32([0.5]))
        np.testing.assert_allclose(values, np.full((2, 5), -0.5))
        predictions = released.progress_predictions(values, ends)
        np.testing.assert_allclose(predictions, [-1.0, 0.0])
        np.testing.assert_allclose(released.progress_loss(predictions, f32([1, 2])), 4.0)


if __name__ == "__main__":
    absltest.main()
