import numpy as np

from spa_jax.report import figures


def test_running_mean_by_hand():
    np.testing.assert_allclose(figures.running_mean([1, 2, 6, 7]), [1, 3, 5, 6.5])
    np.testing.assert_allclose(figures.running_mean([3.0]), [3.0])
    # 60 values: three on each side.
    mean = figures.running_mean(np.arange(60.0))
    np.testing.assert_allclose(mean[3:-3], np.arange(3.0, 57))
    assert mean[0] == 0 and mean[-1] == 57.5


def test_extremes_can_be_drawn():
    for values in ([0.0], [1e-9, 2e-9], [1e9, -1e9], [5.0] * 100):
        assert figures.curves([[(list(range(len(values))), values)]]).startswith("<svg viewBox")
    assert "<svg" in figures.outcome_histogram([], [0.2])
    assert "<svg" in figures.outcome_histogram([40.0], [-3.0])
    assert "<svg" in figures.running_sums([np.array([0, 1.0])], [])


def test_a_drawing_carries_no_address_and_no_foreign_colour():
    text = figures.curves([[([1, 2], [0.1, 0.2])]], borders=[1.5], percent=True)
    assert "http" not in text and "<metadata" not in text and "#0102" not in text
    assert "100%" in text
