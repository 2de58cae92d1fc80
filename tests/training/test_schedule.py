"""Which examples an update sees."""

import numpy as np
import pytest

from spa_jax.training import schedule


@pytest.mark.parametrize("count,batch_size", [(1, 1), (5, 2), (6, 2), (7, 7), (3, 8), (100, 16)])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_epoch_covers_every_example_once(count, batch_size, seed):
    per_epoch = -(-count // batch_size)
    for epoch in range(3):
        batches = [
            schedule.batch_of(epoch * per_epoch + i, count, batch_size, seed)
            for i in range(per_epoch)
        ]
        assert all(0 < len(b) <= batch_size for b in batches)
        assert sorted(np.concatenate(batches)) == list(range(count))


def test_the_order_depends_on_the_epoch_and_the_seed_and_on_nothing_else():
    def epoch(number, seed):
        return np.concatenate([schedule.batch_of(number * 5 + i, 50, 10, seed) for i in range(5)])

    first = epoch(0, 0)
    np.testing.assert_array_equal(first, epoch(0, 0))
    assert not (first == epoch(1, 0)).all()
    assert not (first == epoch(0, 1)).all()
    assert not (epoch(1, 0) == epoch(0, 1)).all()


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rate = schedule.warmup_cosine(1e-3, 100, 0.1)
    values = np.array([float(rate(i)) for i in range(100)])
    assert values[0] == pytest.approx(1e-4)
    assert values.argmax() == 10 and values.max() == pytest.approx(1e-3)
    assert (np.diff(values[:10]) > 0).all() and (np.diff(values[10:]) < 0).all()
    assert 0 < values[-1] < 1e-5
