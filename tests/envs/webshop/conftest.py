"""A generated catalogue that the WebShop tests share."""

from pathlib import Path

import pytest

from spa_jax.envs.webshop.generate import generate
from spa_jax.envs.webshop.store import Catalogue, open_catalogue


@pytest.fixture(scope="session")
def shop_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalogue of 120 products and 150 goals."""
    return generate(tmp_path_factory.mktemp("webshop"), products=120, goals=150, seed=3)


@pytest.fixture(scope="session")
def catalogue(shop_data: Path) -> Catalogue:
    """The catalogue of that folder."""
    return open_catalogue(shop_data)
