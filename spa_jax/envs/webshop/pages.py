"""WebShop's pages in text mode.

The original renders HTML and reads the visible text back out: the pieces of text, stripped
and joined by " [SEP] ".  The pieces are made here at once; `_pieces` knows what the way
through HTML does to blank ones.
"""

import dataclasses
import json
from collections.abc import Iterable

from spa_jax.envs.webshop.catalogue import Product

PAGE_SIZE = 10
SEARCH, RESULTS, ITEM, DETAIL, DONE = "search", "results", "item", "detail", "done"
DETAILS = ("Description", "Features", "Reviews")
BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
_HTML_SPACE = " \n\t\f\r"
# The fixed parts of the page after a purchase.
_THANKS = "Thank you for shopping with us!|Your code:|None|(Paste it in your MTurk interface.)"
_UNSET = "attrs|None|category|None|query|None|product category|None|Target"
_TARGET = "asin|options|attrs|price upper|instuction text|category|product category|query|Goal|None"


@dataclasses.dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
      kind: one of the constants above.
      text: the observation.
      clickables: what can be clicked, lower case.
      has_search_bar: whether the original shows a search bar; searching works everywhere.
    """

    kind: str
    text: str
    clickables: tuple[str, ...]
    has_search_bar: bool = False


def _pieces(texts: Iterable[str]) -> str:
    """Joins pieces of text as they come back out of the original's HTML.

    An empty piece is no piece; a blank one is dropped if it has a line break, else it
    leaves an empty piece.
    """
    shown = [text for text in texts if text and not (_blank(text) and "\n" in text)]
    return " [SEP] ".join(text.strip() for text in shown)


def _blank(text: str) -> bool:
    return not text.strip(_HTML_SPACE)


def _lower(*texts: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.lower() for text in texts))


def search_page(instruction: str) -> Page:
    """Where an episode starts."""
    text = _pieces(["WebShop", "Instruction:", instruction, "Search"])
    return Page(SEARCH, text, ("search",), has_search_bar=True)


def results_page(instruction: str, products: list[Product], number: int, total: int) -> Page:
    """A page of search results.

    Args:
      instruction: the goal's text.
      products: on this page, at most `PAGE_SIZE`.
      number: of the page, from 1.
      total: how many results there are on all pages.
    """
    buttons = [PREVIOUS, NEXT] if number > 1 else [NEXT]
    title = f"Page {number} (Total results: {total})"
    texts = ["Instruction:", instruction, BACK, title, *buttons]
    for product in products:
        texts += [product.asin, product.title, product.price_tag]
    clickables = _lower(BACK, *buttons, *(product.asin for product in products))
    return Page(RESULTS, _pieces(texts), clickables)


def item_page(instruction: str, product: Product) -> Page:
    """A product's page.  It does not show which options are chosen."""
    texts = ["Instruction:", instruction, BACK, PREVIOUS]
    for name, values in product.options.items():
        texts += [name, *values]
    texts += [product.title, f"Price: {product.price_tag}", "Rating: N.A.", *DETAILS, BUY]
    choices = [value for values in product.options.values() for value in values]
    clickables = dict.fromkeys([*_lower(BACK, PREVIOUS, *DETAILS, BUY), *choices])
    return Page(ITEM, _pieces(texts), tuple(clickables))


def detail_page(instruction: str, product: Product, detail: str) -> Page:
    """One of a product's `DETAILS`.  There are no reviews in the data."""
    texts = ["Instruction:", instruction, BACK, PREVIOUS]
    if detail == "Description":
        texts.append(product.description)
    elif detail == "Features":
        texts += [f" {bullet}" for bullet in product.bullets]
    return Page(DETAIL, _pieces(texts), _lower(BACK, PREVIOUS))


def done_page(asin: str, options: dict[str, str], reward: float) -> Page:
    """What a purchase ends with."""
    chosen = json.dumps(options, sort_keys=True)
    for character in "<>&'":  # as Flask writes JSON into HTML
        chosen = chosen.replace(character, f"\\u{ord(character):04x}")
    texts = [*_THANKS.split("|"), "Purchased", "asin", asin, "options", chosen]
    texts += [*_UNSET.split("|"), *_TARGET.split("|")]
    texts += ["Reward", "Your score (min 0.0, max 1.0)", str(reward), "Reward Details", "None"]
    return Page(DONE, _pieces(texts), ())
