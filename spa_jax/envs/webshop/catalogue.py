"""WebShop's files: which there are, how their records become products, and reading big ones.

    items_shuffle.json     a list of products (items_shuffle_1000*.json: the first 1,000)
    items_ins_v2.json      asin -> attributes and the synthetic instruction
    items_human_ins.json   asin -> instructions written by people

The official files are one JSON value each, up to 5 GB: they are read as a stream.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from spa_jax.errors import UserError

STORE = "webshop_store"  # a prepared store's folder, beside the files it was made of
NO_PRICE = 100.0
_CHUNK = 1 << 20
_LONGEST = 1 << 26  # characters of one value; what is longer is broken
_SPACE = re.compile(r"[ \t\n\r,]*")


@dataclasses.dataclass(frozen=True)
class Product:
    """What the engine knows about a product.

    Attributes:
      asin: its id.
      title: its name.
      description: its description; may be empty.
      bullets: its features.
      price_tag: the price as shown, such as "$7.8" or "$10.99 to $18.99".
      price: what it costs in this catalogue, in dollars: drawn from the tag's range.
      options: option name -> values, in the page's order, lower case.
      attributes: what it is annotated with; they score a purchase.
      category: one of five ("beauty", ...).
      query: the search that it was found with when the data were collected.
      product_category: the path of categories, separated by "›".
      instruction: the synthetic goals' text; None if it has no such goals.
      instruction_attributes: the attributes that they ask for.
      human: the records of human goals.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price_tag: str
    price: float
    options: dict[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    category: str
    query: str
    product_category: str
    instruction: str | None = None
    instruction_attributes: tuple[str, ...] = ()
    human: tuple[dict[str, Any], ...] = ()

    @property
    def document(self) -> str:
        """The text that is searched."""
        options = ", and ".join(
            f"{name}: {', '.join(values)}" for name, values in self.options.items()
        )
        return " ".join([self.title, self.description, *self.bullets[:1], options]).lower()


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a data folder."""

    products: Path
    attributes: Path
    human: Path


_NAMES = (
    ("items_shuffle.json", "items_ins_v2.json"),
    ("items_shuffle_1000*.json", "items_ins_v2_1000*.json"),
)


def find_files(data: str | Path, small_first: bool = False) -> Files:
    """The files in `data` or its subfolder "webshop".

    Args:
      data: the folder.
      small_first: whether the 1,000-product files come before the full ones.

    Raises:
      UserError: if one is missing.
    """
    root = Path(data)
    if not root.is_dir():
        raise UserError(
            f"{root} is no folder; give the one that holds WebShop's items_shuffle.json, or "
            "make a catalogue with python -m spa_jax.envs.webshop.generate"
        )
    for folder in (root, root / "webshop"):
        for products, attributes in reversed(_NAMES) if small_first else _NAMES:
            if found := sorted(folder.glob(products)):
                return Files(
                    found[0], _needed(folder, attributes), _needed(folder, "items_human_ins*.json")
                )
    raise UserError(
        f"{root} holds no items_shuffle.json or items_shuffle_1000.json; download WebShop's data, "
        "or make a catalogue with python -m spa_jax.envs.webshop.generate"
    )


def _needed(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder} holds products but no {pattern}; download it as well")
    return found[0]


def stream(path: Path) -> Iterator[Any]:
    """The elements of a file that is one JSON list, or (key, value) of one that is an object.

    Raises:
      UserError: if the file is something else or cut short.
    """
    try:
        with path.open(encoding="utf-8") as file:
            reader = _Reader(file)
            opening = reader.take("[{")
            while reader.peek() not in "]}":
                value = reader.value()
                if opening == "{":
                    reader.take(":")
                    yield value, reader.value()
                else:
                    yield value
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no whole JSON file ({error}); download it again") from error


class _Reader:
    """Reads JSON values from a file piece by piece."""

    def __init__(self, file: Any):
        self._file, self._text, self._at = file, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        piece = self._file.read(_CHUNK)
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is no space or comma."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                raise ValueError("it ends too early")

    def take(self, allowed: str) -> str:
        character = self.peek()
        if character not in allowed:
            raise ValueError(f"{character!r} where one of {allowed!r} should be")
        self._at += 1
        return character

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > _LONGEST or not self._more():
                    raise
                continue
            # A number at the very end may go on in the next piece.
            if end < len(self._text) or not self._more():
                self._at = end
                return value


def read_object(path: Path) -> dict[str, Any]:
    """A whole file that is one JSON object."""
    return dict(stream(path))


def is_usable(record: dict[str, Any]) -> bool:
    """Whether the original engine loads this record; it skips broken ids."""
    return record["asin"] != "nan" and len(record["asin"]) <= 10


def make_product(
    record: dict[str, Any],
    notes: dict[str, Any] | None,
    human: list[dict[str, Any]],
    random: Random,
) -> Product:
    """A product of the three files' records.

    Args:
      record: of the product file.
      notes: of the attribute file; None if it has none.
      human: its human instructions.
      random: draws the price of a product that has a range of prices.

    Raises:
      UserError: if the record lacks a field or has no readable price.
    """
    try:
        price_tag, price = _price(record.get("pricing"), random)
        bullets = record["small_description"]
        return Product(
            asin=record["asin"],
            title=record["name"],
            description=record["full_description"],
            bullets=tuple(bullets) if isinstance(bullets, list) else (bullets,),
            price_tag=price_tag,
            price=price,
            options=_options(record["customization_options"]),
            attributes=tuple((notes or {}).get("attributes", ["DUMMY_ATTR"])),
            category=record["category"],
            query=record["query"].lower().strip(),
            product_category=record["product_category"],
            instruction=(notes or {}).get("instruction"),
            instruction_attributes=tuple((notes or {}).get("instruction_attributes") or ()),
            human=tuple(human),
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"product {record.get('asin')!r} is not in WebShop's format: "
            f"{type(error).__name__} {error}"
        ) from error


def _price(pricing: str | None, random: Random) -> tuple[str, float]:
    """The price tag and the price; of a range the price is drawn."""
    if not pricing:
        return f"${NO_PRICE}", NO_PRICE
    prices = [float(re.sub(r"[^\d.]", "", part)) for part in pricing.split("$")[1:]][:2]
    if len(prices) == 1:
        return f"${prices[0]}", prices[0]
    return f"${prices[0]} to ${prices[1]}", random.uniform(prices[0], prices[1])


def _options(customisation: Any) -> dict[str, tuple[str, ...]]:
    if not customisation:
        return {}
    return {
        name.lower(): tuple(value["value"].strip().replace("/", " | ").lower() for value in values)
        for name, values in customisation.items()
        if values is not None
    }
