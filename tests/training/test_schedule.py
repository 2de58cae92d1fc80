"""Which examples an update sees."""

import numpy as np
import pytest

from spa_jax.training import schedule


@pytest.mark.parametrize("count,batch_size", [(1, 1), (5, 2), (6, 2), (7, 7), (3, 8), (100, 16)])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_epoch_covers_every_example_once(count, batch_size, seed):
    lengths = np.random.default_rng(seed).integers(1, 600, count)
    per_epoch = -(-count // batch_size)
    for epoch in range(3):
        batches = [
            schedule.batch_of(epoch * per_epoch + i, lengths, batch_size, seed)
            for i in range(per_epoch)
        ]
        assert all(0 < len(b) <= batch_size for b in batches)
        assert sorted(np.concatenate(batches)) == list(range(count))


def test_the_order_depends_on_the_epoch_and_the_seed_and_on_nothing_else():
    def epoch(number, seed):
        updates = range(number * 5, number * 5 + 5)
        return np.concatenate([schedule.batch_of(i, [1] * 50, 10, seed) for i in updates])

    first = epoch(0, 0)
    np.testing.assert_array_equal(first, epoch(0, 0))
    assert not (first == epoch(1, 0)).all()
    assert not (first == epoch(0, 1)).all()
    assert not (epoch(1, 0) == epoch(0, 1)).all()


def test_batches_of_an_epoch_have_about_the_same_number_of_tokens():
    lengths = np.random.default_rng(0).integers(200, 500, 60)
    totals = [
        sum(lengths[schedule.batch_of(update, lengths, 3, seed)])
        for seed in range(5)
        for update in range(20)
    ]
    drawn = np.random.default_rng(1).permuted(np.tile(lengths, (5, 1)), axis=1).reshape(-1, 3)
    assert np.std(totals) < 0.5 * np.std(drawn.sum(1))


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rate = schedule.warmup_cosine(1e-3, 100, 0.1)
    values = np.array([float(rate(i)) for i in range(100)])
    assert values[0] == pytest.approx(1e-4)
    assert values.argmax() == 10 and values.max() == pytest.approx(1e-3)
    assert (np.diff(values[:10]) > 0).all() and (np.diff(values[10:]) < 0).all()
    assert 0 < values[-1] < 1e-5


def test_a_constant_rate_warms_up_and_stays():
    rate = schedule.warmup_constant(1e-4, 100, 0.04)
    assert [float(rate(n)) for n in (0, 2, 4, 50, 150)] == pytest.approx(
        [0.25e-4, 0.625e-4, 1e-4, 1e-4, 1e-4]
    )
