"""Goals: what a user asks for.

Human goals carry an instruction that a person wrote; synthetic ones combine a product's
instruction with every choice of its options.  Both get a price bound: the larger of two
drawn from the next four multiples of $10 above the price.  The order of goals is that of
the original: drawn product by product, then shuffled with seed 233, so that an index
names the same goal everywhere.
"""

import dataclasses
from random import Random

from spa_jax.envs.webshop.catalogue import Product

KINDS = ("human", "synthetic")
NO_BOUND = 1_000_000
_BOUNDS = [10.0 * i for i in range(1, 100)]
_SHUFFLE_SEED = 233


@dataclasses.dataclass(frozen=True)
class GoalKey:
    """Where a goal comes from.

    Attributes:
      row: the product's place in the catalogue.
      choice: which of its goals: the human record, or the combination of options.
      price_upper: the price bound, in dollars; `NO_BOUND` if there is none.
    """

    row: int
    choice: int
    price_upper: float


@dataclasses.dataclass(frozen=True)
class Goal:
    """What to buy.

    Attributes:
      asin: the product that the goal was made of.
      category, query, name, product_category: of that product.
      instruction_text: what the user says.
      attributes: asked for.
      price_upper: the price bound, in dollars.
      options: the options asked for: name -> value, or values alone in human goals.
      weight: how often the original's sampler would take it.
    """

    asin: str
    category: str
    query: str
    name: str
    product_category: str
    instruction_text: str
    attributes: tuple[str, ...]
    price_upper: float
    options: dict[str, str] | tuple[str, ...]
    weight: float = 1.0


def draw_goals(product: Product, kind: str, random: Random) -> list[tuple[int, float]]:
    """A product's goals of a kind as (choice, price bound), in order."""
    if kind == "human":
        return [
            (choice, _draw_bound(product.price, random))
            for choice, record in enumerate(product.human)
            if record["instruction_attributes"]
        ]
    if product.instruction is None:
        return []
    bound = _draw_bound(product.price, random)
    return [(choice, bound) for choice in range(_combinations(product))]


def _draw_bound(price: float, random: Random) -> float:
    above = [bound for bound in _BOUNDS if bound > price][:4]
    return max(random.sample(above, 2)) if len(above) >= 2 else NO_BOUND


def _combinations(product: Product) -> int:
    count = 1
    for values in product.options.values():
        count *= len(values)
    return count


def order(count: int) -> list[int]:
    """The goals' final order: element i is the place before shuffling of goal i."""
    places = list(range(count))
    Random(_SHUFFLE_SEED).shuffle(places)
    return places


def make_goal(product: Product, key: GoalKey, kind: str, counts: dict[str, int]) -> Goal:
    """The goal that a key names.

    Args:
      product: of the key's row.
      key: the goal.
      kind: one of `KINDS`.
      counts: how many goals ask for each of the goal's attributes; for the weight.
    """
    options: dict[str, str] | tuple[str, ...]
    if kind == "human":
        record = product.human[key.choice]
        text = record["instruction"].strip(".")
        attributes, options = tuple(record["instruction_attributes"]), record["instruction_options"]
        options, weight = tuple(options), 1.0
    else:
        assert product.instruction is not None
        options = _combination(product, key.choice)
        text = product.instruction
        if options:
            text += " with " + ", and ".join(f"{name}: {v}" for name, v in options.items())
        attributes = product.instruction_attributes
        # The original divides by nothing here, and does not start.
        shares = [1.0 / counts[attribute] for attribute in attributes]
        weight = sum(shares) / len(shares) if shares else 1.0
    if key.price_upper != NO_BOUND:
        text += f", and price lower than {key.price_upper:.2f} dollars"
    return Goal(
        asin=product.asin,
        category=product.category,
        query=product.query,
        name=product.title,
        product_category=product.product_category,
        instruction_text=text,
        attributes=attributes,
        price_upper=key.price_upper,
        options=options,
        weight=weight,
    )


def _combination(product: Product, choice: int) -> dict[str, str]:
    """The `choice`-th combination of option values, names sorted, the last varying fastest."""
    names = sorted(product.options)
    values: list[str] = []
    for name in reversed(names):
        choice, digit = divmod(choice, len(product.options[name]))
        values.append(product.options[name][digit])
    return dict(zip(names, reversed(values), strict=True))
