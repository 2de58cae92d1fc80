"""An expert that buys what the goal was made of.

It searches with the words of the instruction, as a policy can, if that finds the product;
else with words of the product's name, which only the expert knows.  Then it opens the
product, chooses the options and buys.
"""

import re

from thefuzz import fuzz

from spa_jax.envs.webshop import pages
from spa_jax.envs.webshop.catalogue import Product
from spa_jax.envs.webshop.goals import Goal
from spa_jax.envs.webshop.pages import Page
from spa_jax.envs.webshop.store import Catalogue

_PRICE = re.compile(r",? and price lower than .*$")
_OPENING = re.compile(r"^(?:find me|i am looking for|i need|i want|i would like) (?:an? )?", re.I)
_MAX_PAGES = 2  # a query that shows the product later than this is not used
_NAME_LENGTH = 60  # characters of the product's name


class Expert:
    """Plays one goal: `act` says the next action.

    Args:
      catalogue: where the goal's product is.
      goal: what is to be bought.
    """

    def __init__(self, catalogue: Catalogue, goal: Goal):
        self._goal = goal
        self._query = self._choose_query(catalogue)

    def _choose_query(self, catalogue: Catalogue) -> str:
        """The first query that finds the product early, or the one that finds it first."""
        asked = _OPENING.sub("", _PRICE.sub("", self._goal.instruction_text))
        values = self._goal.options
        options = list(values.values() if isinstance(values, dict) else values)
        # Square brackets would end the action.
        queries = [
            re.sub(r"[\[\]\s]+", " ", query).strip()
            for query in (
                asked.partition(" with ")[0] if options else asked,
                asked,
                f"{self._goal.query} {self._goal.name[:_NAME_LENGTH]}",
                self._goal.name,
            )
        ]
        ranks = []
        for query in queries:
            found = [asin for asin, _ in catalogue.search(query.lower())]
            rank = found.index(self._goal.asin) if self._goal.asin in found else len(found) + 50
            if rank < _MAX_PAGES * pages.PAGE_SIZE:
                return query
            ranks.append(rank)
        return queries[ranks.index(min(ranks))]

    def act(self, page: Page, item: Product | None, options: dict[str, str]) -> str:
        """The next action.

        Args:
          page: the page that is shown.
          item: the product that is open, if any.
          options: its options that are chosen.
        """
        if page.kind == pages.SEARCH:
            return f"search[{self._query}]"
        if page.kind == pages.RESULTS:
            wanted = self._goal.asin.lower() in page.clickables
            return f"click[{self._goal.asin if wanted else pages.NEXT}]"
        if page.kind == pages.DETAIL:
            return f"click[{pages.PREVIOUS}]"
        if item is None or item.asin != self._goal.asin:
            return f"click[{pages.BACK}]"
        for name, value in wanted_options(item, self._goal).items():
            if options.get(name) != value:
                return f"click[{value}]"
        return f"click[{pages.BUY}]"


def wanted_options(item: Product, goal: Goal) -> dict[str, str]:
    """Which options of the goal's product to choose: name -> value."""
    if isinstance(goal.options, dict):
        return goal.options
    chosen: dict[str, str] = {}
    for wanted in goal.options:
        values = [
            (fuzz.token_set_ratio(value, wanted), value == wanted.lower(), name, value)
            for name, values in item.options.items()
            if name not in chosen
            for value in values
            if value
        ]
        if values:
            *_, name, value = max(values, key=lambda found: (found[1], found[0]))
            chosen[name] = value
    return chosen
