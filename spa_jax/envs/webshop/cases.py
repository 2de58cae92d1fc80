"""The case files of WebShop's conformance check, and their records as our products and goals."""

import json
import lzma
from pathlib import Path
from typing import Any

from spa_jax.envs.webshop.catalogue import Product
from spa_jax.envs.webshop.goals import Goal
from spa_jax.errors import UserError


def read_cases(folder: str | Path, name: str) -> Any:
    """A case file, plain or .xz, in `folder` or its subfolder "webshop".

    Raises:
      UserError: if there is none, or it is broken.
    """
    for path in (Path(folder) / name, Path(folder) / "webshop" / name):
        packed = path.with_name(path.name + ".xz")
        try:
            if path.exists():
                return json.loads(path.read_text(encoding="utf-8"))
            if packed.exists():
                return json.loads(lzma.decompress(packed.read_bytes()))
        except (OSError, ValueError, lzma.LZMAError) as error:
            raise UserError(f"{path} is no whole JSON file ({error})") from error
    raise UserError(f"--cases: {folder} holds no {name} and no {name}.xz")


def read_product(record: dict[str, Any]) -> Product:
    """The product of a reward case."""
    return Product(
        asin=record["asin"],
        title=record["Title"],
        description=record["Description"],
        bullets=tuple(record["BulletPoints"]),
        price_tag="",
        price=0.0,
        options={name: tuple(values) for name, values in record["options"].items()},
        attributes=tuple(record["Attributes"]),
        category="",
        query=record["query"],
        product_category=record["product_category"],
    )


def read_goal(record: dict[str, Any]) -> Goal:
    """The goal of a case."""
    options = record["goal_options"]
    return Goal(
        asin=record["asin"],
        category=record.get("category", ""),
        query=record["query"],
        name=record["name"],
        product_category=record["product_category"],
        instruction_text=record["instruction_text"],
        attributes=tuple(record["attributes"]),
        price_upper=record["price_upper"],
        options=options if isinstance(options, dict) else tuple(options),
        weight=record.get("weight", 1.0),
    )


def product_record(product: Product) -> dict[str, Any]:
    """A product in the original's words."""
    return {
        "asin": product.asin,
        "name": product.title,
        "Title": product.title,
        "query": product.query,
        "product_category": product.product_category,
        "Attributes": list(product.attributes),
        "BulletPoints": list(product.bullets),
        "Description": product.description,
        "options": {name: list(values) for name, values in product.options.items()},
    }


def goal_record(goal: Goal) -> dict[str, Any]:
    """A goal in the original's words."""
    options = dict(goal.options) if isinstance(goal.options, dict) else list(goal.options)
    return {
        "asin": goal.asin,
        "category": goal.category,
        "query": goal.query,
        "name": goal.name,
        "product_category": goal.product_category,
        "instruction_text": goal.instruction_text,
        "attributes": list(goal.attributes),
        "price_upper": goal.price_upper,
        "goal_options": options,
        "weight": goal.weight,
    }
