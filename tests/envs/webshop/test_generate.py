import json
from pathlib import Path

import pytest

from spa_jax.envs.webshop import generate as generator
from spa_jax.envs.webshop.store import Catalogue
from spa_jax.errors import UserError


def test_the_same_seed_makes_the_same_catalogue(shop_data: Path, tmp_path: Path) -> None:
    generator.generate(tmp_path / "again", products=120, goals=150, seed=3)
    generator.generate(tmp_path / "other", products=120, goals=150, seed=4)
    files = {path.name: path.read_bytes() for path in shop_data.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    others = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert not any(others[name] == text for name, text in files.items())


def test_splits_share_no_product(shop_data: Path, catalogue: Catalogue) -> None:
    asins, goals = [], []
    for split in ("train", "valid", "test"):
        numbers = json.loads((shop_data / f"{split}_indices.json").read_text())
        goals += numbers
        asins.append({catalogue.goal(number).asin for number in numbers})
    assert sorted(goals) == list(range(150))
    assert sum(map(len, asins)) == len(set.union(*asins)) == 120


def test_ids_are_unique_and_of_the_official_form() -> None:
    asins = {generator.make_asin(5, row) for row in range(20_000)}
    assert len(asins) == 20_000
    assert all(len(asin) == 10 and asin.isalnum() and asin.upper() == asin for asin in asins)


def test_a_catalogue_that_is_there_is_kept(tmp_path: Path) -> None:
    settings = {"products": 3, "goals": 2, "seed": 1}
    generator.generate(tmp_path, **settings)
    before = (tmp_path / "items_shuffle.json").stat().st_mtime_ns
    generator.generate(tmp_path, **settings)
    assert (tmp_path / "items_shuffle.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another catalogue"):
        generator.generate(tmp_path, **settings | {"seed": 2})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(tmp_path), "--products", "4", "--goals", "9", "--seed", "5"]
    assert generator.main([*flags, "--splits", "explore:0.5,heldout:0.5"]) == 0
    assert "RESULT products=4 goals=9 " in capsys.readouterr().out
    assert (tmp_path / "heldout_indices.json").exists()
    assert generator.main([*flags, "--splits", "a:0.5,b:0.6"]) == 2
    assert "--splits" in capsys.readouterr().err
    assert generator.main([*flags[:2], "--products", "0", "--goals", "1", "--seed", "1"]) == 2
