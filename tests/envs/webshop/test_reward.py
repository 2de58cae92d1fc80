import re
from typing import Any

import pytest

from spa_jax.envs.webshop.catalogue import Product
from spa_jax.envs.webshop.goals import Goal
from spa_jax.envs.webshop.reward import normalise_colour, nouns, score, title_score, unscorable


def _product(**fields: Any) -> Product:
    values = {
        "asin": "B000000001",
        "title": "Acme Wireless Mouse",
        "description": "Works on glass.",
        "bullets": ("Quiet keys", "usb receiver"),
        "price_tag": "$10.0",
        "price": 10.0,
        "options": {},
        "attributes": ("wireless", "long lasting"),
        "category": "electronics",
        "query": "mice",
        "product_category": "Electronics › Computers › Mice",
    }
    return Product(**(values | fields))


def _goal(**fields: Any) -> Goal:
    values = {
        "asin": "B000000001",
        "category": "electronics",
        "query": "mice",
        "name": "Acme Wireless Mouse",
        "product_category": "Electronics › Computers › Mice",
        "instruction_text": "",
        "attributes": ("wireless", "quiet keys"),
        "price_upper": 20.0,
        "options": ("navy blue", "large"),
    }
    return Goal(**(values | fields))


def test_the_full_reward_and_what_is_missing() -> None:
    chosen = {"color": "light blue", "size": "large"}  # both colours are "blue"
    assert score(_product(), _goal(), 20.0, chosen).reward == 1.0
    assert score(_product(), _goal(), 20.01, chosen).reward == 4 / 5
    assert score(_product(), _goal(), 20.0, {"size": "small"}).reward == 3 / 5
    missing = _goal(attributes=("wireless", "waterproof"))
    assert score(_product(), missing, 20.0, chosen).reward == 4 / 5
    result = score(_product(), _goal(options=()), 20.0, {})
    assert result.reward == 1.0 and "r_option" not in result.info


def test_pairs_of_synthetic_goals_hold_a_colour_only_as_an_element() -> None:
    assert normalise_colour("dark red") == "dark"
    assert normalise_colour(("color", "red")) == "red"
    assert normalise_colour(("color", "rose red")) == ("color", "rose red")


@pytest.mark.parametrize(
    ("title", "query", "path", "r_type"),
    [
        (0.0, "mice", "Electronics › Computers › Mice", 0.0),
        (0.09, "mice", "Electronics › Computers › Mice", 0.1),
        (0.15, "mice", "Garden", 1.0),
        (0.15, "hats", "Electronics ›Computers", 1.0),
        (0.15, "hats", "Electronics › Hats", 0.5),
        (0.21, "hats", "Garden", 1.0),
    ],
)
def test_the_kind_of_product(title: float, query: str, path: str, r_type: float) -> None:
    product = _product(query=query, product_category=path)
    result = score(product, _goal(options=()), 20.0, {}, title)
    assert result.info["r_type"] == result.reward == r_type


def test_nouns_of_a_name() -> None:
    name = "2 Pack Women's T-Shirt with 16GB Card for the iPhone 12, 7inch"
    assert nouns(name) == ["pack", "women", "t", "shirt", "gb", "card", "iphone"]
    assert title_score(["card", "pack"], ["pack", "card", "card", "shirt"]) == 0.5
    assert title_score(["card"], []) == 0.2


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ({"price_upper": 0}, "TypeError.*no price bound"),
        ({"attributes": ()}, "ZeroDivisionError.*no attribute"),
    ],
)
def test_a_goal_that_the_original_cannot_score_is_played(lacks, why) -> None:
    """What it does not ask for is fulfilled; the check of recordings knows that it fails there."""
    goal = _goal(**lacks)
    assert re.match(why, unscorable(goal)) and not unscorable(_goal())
    found = score(_product(), goal, 1.0, {}, 1.0)
    assert 0 <= found.reward <= 1
    assert found.info["r_price"] is True and 0 <= found.info["r_att"] <= 1
