"""Generated games that the environment tests share."""

from pathlib import Path

import pytest

from spa_jax.envs.alfworld.generate import generate


@pytest.fixture(scope="session")
def games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a split "train" of 12 games, two of each task type."""
    root = tmp_path_factory.mktemp("alfworld")
    generate(root / "train", games=12, seed=7)
    return root
