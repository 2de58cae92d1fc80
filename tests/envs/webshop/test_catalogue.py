import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spa_jax.envs.webshop import catalogue
from spa_jax.envs.webshop.catalogue import find_files, make_product, stream
from spa_jax.errors import UserError

_RECORD: dict[str, Any] = {
    "asin": "B000000001",
    "name": "Oak Table",
    "full_description": "Sturdy.",
    "pricing": "$1,250.5",
    "small_description": ["Solid oak"],
    "product_category": "Home › Tables",
    "category": "garden",
    "query": " Oak Tables ",
    "customization_options": {
        "Color": [{"value": " Dark/Red "}, {"value": "Blue"}],
        "Size": None,
    },
}


def _product(**fields: Any) -> catalogue.Product:
    return make_product(_RECORD | fields, {"attributes": ["solid wood"]}, [], Random(0))


def test_a_record_becomes_a_product() -> None:
    product = _product()
    assert product.options == {"color": ("dark | red", "blue")}
    assert (product.price_tag, product.price, product.query) == ("$1250.5", 1250.5, "oak tables")
    assert product.document == "oak table sturdy. solid oak color: dark | red, blue"
    assert _product(small_description="one").bullets == ("one",)


def test_prices_of_a_range_are_drawn_and_missing_ones_are_100() -> None:
    product = _product(pricing="$10.0 to $20.0")
    assert product.price_tag == "$10.0 to $20.0"
    assert product.price == 10 + 10 * Random(0).random()
    assert (_product(pricing="").price_tag, _product(pricing="").price) == ("$100.0", 100.0)


def test_a_broken_record_is_named() -> None:
    for pricing in ("$free", "nan"):
        with pytest.raises(UserError, match="'B000000001' is not in WebShop's format"):
            _product(pricing=pricing)


def test_big_files_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_CHUNK", 3)
    values = [{"a": [1, 22.5, "x]y"]}, 1234567, "wörd", None, []]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(values, indent=1))
    assert list(stream(path)) == values
    path.write_text(json.dumps({"k": 1, "l": {"m": "}"}}))
    assert list(stream(path)) == [("k", 1), ("l", {"m": "}"})]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a"', "", "7", "[1, 2", '{"a" 1}'])
def test_cut_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match="x.json is no whole JSON file"):
        list(stream(path))


def test_files_are_found_and_missing_ones_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no items_shuffle.json"):
        find_files(tmp_path)
    folder = tmp_path / "webshop"
    folder.mkdir()
    for name in ("items_shuffle_1000.recovered.json", "items_human_ins.1k_subset.json"):
        (folder / name).touch()
    with pytest.raises(UserError, match="items_ins_v2_1000"):
        find_files(tmp_path)
    (folder / "items_ins_v2_1000.json").touch()
    assert find_files(tmp_path).human.name == "items_human_ins.1k_subset.json"
