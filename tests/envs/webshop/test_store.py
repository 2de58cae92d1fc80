import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from spa_jax.envs.webshop import store
from spa_jax.envs.webshop.catalogue import find_files
from spa_jax.envs.webshop.store import Catalogue, build, open_catalogue, prepare
from spa_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "webshop_store"
    # What a stopped run leaves.
    (folder.parent / ".webshop_store.partial").mkdir()
    prepare(find_files(shop_data), folder, "human")
    return folder


def test_a_store_on_disk_plays_as_the_files_do(prepared: Path, catalogue: Catalogue) -> None:
    opened = open_catalogue(prepared.parent)
    assert [path.name for path in prepared.parent.iterdir()] == ["webshop_store"]
    assert (opened.products, opened.goals, opened.kind) == (120, 150, "human")
    assert list(opened.all_products()) == list(catalogue.all_products())
    assert all(opened.goal(i) == catalogue.goal(i) for i in range(opened.goals))
    for query in ("red lamp", catalogue.goal(5).instruction_text, "", "zzzz"):
        assert opened.search(query) == catalogue.search(query)


def test_a_store_is_not_overwritten(prepared: Path, shop_data: Path) -> None:
    with pytest.raises(UserError, match="exists; remove it"):
        prepare(find_files(shop_data), prepared, "human")


def test_a_broken_store_is_named(prepared: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(prepared, tmp_path / "webshop_store")
    (broken / "indptr.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="no whole WebShop store"):
        open_catalogue(broken)
    shutil.copy(prepared / "indptr.npy", broken)
    with sqlite3.connect(broken / "catalogue.sqlite") as database:
        database.execute("UPDATE meta SET value = 0 WHERE name = 'version'")
    with pytest.raises(UserError, match="another version"):
        open_catalogue(broken)


def test_big_files_have_to_be_prepared(shop_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_IN_MEMORY", 1000)
    with pytest.raises(UserError, match="prepare_webshop --data="):
        open_catalogue(shop_data)


def test_synthetic_goals_and_their_weights(shop_data: Path) -> None:
    synthetic = build(find_files(shop_data), "synthetic")
    goals = [synthetic.goal(place) for place in range(synthetic.goals)]
    combinations = 0
    for product in synthetic.all_products():
        count = 1
        for values in product.options.values():
            count *= len(values)
        combinations += count
    assert len(goals) == len({(goal.asin, str(goal.options)) for goal in goals}) == combinations
    attribute = goals[0].attributes[0]
    others = sum(attribute in goal.attributes for goal in goals)
    share = 1 / sum(goals[0].attributes[1] in goal.attributes for goal in goals)
    assert goals[0].weight == pytest.approx((1 / others + share) / 2)


def test_other_seeds_draw_other_prices(shop_data: Path, catalogue: Catalogue) -> None:
    other = build(find_files(shop_data), "human", price_seed=1)
    pairs = list(zip(other.all_products(), catalogue.all_products(), strict=True))
    ranged = [a.price != b.price for a, b in pairs if " to " in a.price_tag]
    assert ranged and all(ranged)
    assert all(a.price == b.price for a, b in pairs if " to " not in a.price_tag)


def test_repeated_and_broken_ids_are_skipped(shop_data: Path, tmp_path: Path) -> None:
    for path in shop_data.glob("items_*.json"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "items_shuffle.json"
    records = json.loads(path.read_text())[:3]
    records.insert(1, records[0] | {"name": "again"})
    records.insert(1, records[0] | {"asin": "nan"})
    path.write_text(json.dumps(records))
    names = [product.title for product in open_catalogue(tmp_path).all_products()]
    assert names == [records[0]["name"], records[3]["name"], records[4]["name"]]
