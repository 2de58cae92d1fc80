"""The comparison with PyTorch: what it measures is the same work, and a peer must be there."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.bench import models
from tests import programs, tiny


def test_the_policy_wrote_its_share_of_every_row():
    sizes = models.Sizes(rows=3, length=512)
    rows = models.pack(sizes, 0.15, 384)
    assert rows.tokens.shape == (3, 512) and (rows.segment_ids == 1).all()
    assert rows.token_mask.mean() == 1
    assert rows.token_mask.sum() / rows.tokens.size == pytest.approx(0.15, abs=0.002)


def test_sides_that_compute_something_else_are_not_timed():
    models.check_same({"ours": 1.0, "theirs": 1.0005})
    with pytest.raises(AssertionError, match="different losses"):
        models.check_same({"ours": 1.0, "theirs": 1.002})


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_it_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "models", "--rehearsal"],
        cwd=programs.ROOT,
        env=programs.environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2
    assert "make setup-peers" in done.stderr and "Traceback" not in done.stderr


def test_all_sides_take_the_same_steps():
    """Losses of three updates agree, so every side computes the same gradient and optimiser."""
    pytest.importorskip("torch")
    config = tiny.tiny_config()
    params = jax.tree.map(lambda x: 0.2 * x, tiny.random_params(config))
    rows = models.pack(models.Sizes(rows=2, length=64), 0.15, config.vocab_size)
    sides = [
        models.OurUpdate(config, params, rows, rate=1e-2),
        models.TheirUpdate(config, params, rows, True, rate=1e-2),
        models.TheirUpdate(config, params, rows, False, rate=1e-2),
    ]
    losses = np.array([[side() for side in sides] for _ in range(3)])
    np.testing.assert_allclose(losses, losses[:, :1].repeat(3, 1), atol=1e-4)
    assert losses[2, 0] < losses[0, 0] - 0.01


@pytest.mark.slow
def test_the_rehearsal_runs_to_its_result():
    pytest.importorskip("torch")
    said = programs.succeed("bench", "models", "--rehearsal", "--policy=none")
    last = said.splitlines()[-1]
    assert last.startswith("RESULT update_tokens_per_second=")
    found = dict(part.split("=") for part in last.split()[1:])
    assert float(found["peak_gib_chunked"]) < float(found["peak_gib_whole"])
    assert all(float(value) > 0 for value in found.values())
