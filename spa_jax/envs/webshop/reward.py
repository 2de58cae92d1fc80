"""What a purchase is worth, as WebShop computes it (`web_agent_site/engine/goal.py`).

    R = r_type * (n_attributes + n_options + [price <= bound])
        / (|attributes| + |options| + 1)

The original lists the nouns of the two product names with a spaCy model; `nouns` does
without.
"""

import dataclasses
import re
from typing import Any

from thefuzz import fuzz

from spa_jax.envs.webshop.catalogue import Product
from spa_jax.envs.webshop.goals import Goal

# The first of these that an option holds stands for it (from the original's normalize.py, MIT).
COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan "
    "taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()
_SIMILAR = 85

_WORD = re.compile(r"[^\W_]+")
# A number's unit is a word of its own to spaCy, if it is one of these; "7inch" is one word.
_UNIT = re.compile(r"\d+(km|m|cm|mm|in|ft|kg|g|mg|lb|oz|gb|mb|tb|kb|ml|l|yd|mph|hz|w|v|s)s?")
_POSSESSIVE = re.compile(r"['\u2019]s\b", re.IGNORECASE)
# In a product's name nearly every word is a noun to a tagger: what is left out are the words
# that join them.
_JOINING_WORDS = (
    "a about above after all also am an and any are as at be been before both but by can could "
    "did do does during each either every few for from good had has have he her here his how i if "
    "in into is it its just many may me more most much must my neither no nor not of off on one "
    "only onto or other our out over own per she should so some such than that the their them "
    "then there these they this those three to too two under until up upon us very via was we "
    "were what when where which while who whose why will with within without would x you your"
)
_NO_NOUNS = frozenset(_JOINING_WORDS.split())


@dataclasses.dataclass(frozen=True)
class Score:
    """A purchase's reward and how it came about.

    Attributes:
      reward: in [0, 1].
      info: the original's `verbose_info`.
    """

    reward: float
    info: dict[str, Any]


def nouns(name: str) -> list[str]:
    """The nouns of a product's name, lower case, in order; close to what a tagger lists."""
    found = []
    for word in _WORD.findall(_POSSESSIVE.sub(" ", name.lower())):
        if unit := _UNIT.fullmatch(word):
            found.append(unit[1])
        elif word.isalpha() and word not in _NO_NOUNS:
            found.append(word)
    return found


def normalise_colour(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first colour of the list that an option holds; the option itself if it holds none.

    The options of synthetic goals are (name, value) pairs, of which an element has to be the
    colour itself: the original asks `colour in pair`.
    """
    return next((colour for colour in COLOURS if colour in option), option)


def title_score(bought: list[str], wanted: list[str]) -> float:
    """The share of the wanted name's nouns that the bought name has; 0.2 if it has none."""
    return len(set(bought) & set(wanted)) / len(wanted) if wanted else 0.2


def unscorable(goal: Goal) -> str:
    """Why the original fails when anything is bought for a goal; "" if it does not."""
    if not goal.attributes:
        return "ZeroDivisionError: the goal names no attribute"
    if not goal.price_upper > 0:
        return "TypeError: the goal has no price bound above 0"
    return ""


def score(
    product: Product, goal: Goal, price: float, options: dict[str, str], title: float | None = None
) -> Score:
    """Scores a purchase.

    A goal for which the original fails (`unscorable`) can be played all the same: what it does not
    ask for is fulfilled.

    Args:
      product: what was bought.
      goal: what was wanted.
      price: what was paid, in dollars.
      options: the chosen options.
      title: the title score; None: that of `nouns`.
    """
    if title is None:
        title = title_score(nouns(product.title), nouns(goal.name))
    kind = _type_score(product, goal, title)
    attributes = sum(_has_attribute(product, attribute) for attribute in goal.attributes)
    matched = _matched_options(goal, list(options.values()))
    affordable = price <= goal.price_upper if goal.price_upper > 0 else True
    parts = len(goal.attributes) + len(goal.options) + 1
    total = (attributes + matched + affordable) / parts * kind["r_type"]
    info = {
        "r_type": kind["r_type"],
        "r_att": attributes / len(goal.attributes) if goal.attributes else 1.0,
        "w_att": len(goal.attributes) / parts,
        "query_match": kind["query_match"],
        "category_match": kind["category_match"],
        "title_score": title,
    }
    if goal.options:
        info["r_option"] = matched / len(goal.options)
        info["w_option"] = len(goal.options) / parts
    info["r_price"] = affordable
    info["w_price"] = 1 / parts
    return Score(total, info)


def _type_score(product: Product, goal: Goal, title: float) -> dict[str, Any]:
    """Whether the product is of the kind that was asked for."""
    query_match = product.query == goal.query
    shared = _categories(product.product_category) & _categories(goal.product_category)
    category_match = len(shared) >= 2
    r_type = 1.0 if query_match or category_match or title > 0.2 else 0.5
    if title < 0.1:
        r_type = 0.1
    if title == 0.0:
        r_type = 0.0
    return {"r_type": r_type, "query_match": query_match, "category_match": category_match}


def _categories(path: str) -> set[str]:
    return {category.strip() for category in path.split("›")}


def _has_attribute(product: Product, wanted: str) -> bool:
    """Whether the product is annotated with the attribute, or its texts mention it."""
    return (
        any(fuzz.token_set_ratio(own, wanted) > _SIMILAR for own in product.attributes)
        or wanted in product.title.lower()
        or wanted in " ".join(product.bullets).lower()
        or wanted in product.description.lower()
    )


def _matched_options(goal: Goal, chosen: list[str]) -> int:
    """How many of the goal's options one of the chosen values matches."""
    options = goal.options
    wanted = options.items() if isinstance(options, dict) else options
    values = [normalise_colour(value) for value in chosen]
    # str: the original compares the text of a (name, value) pair.
    return sum(
        any(
            fuzz.token_set_ratio(str(value), str(normalise_colour(option))) > _SIMILAR
            for value in values
        )
        for option in wanted
    )
