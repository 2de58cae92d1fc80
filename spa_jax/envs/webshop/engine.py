"""Plays WebShop in text mode, without a browser, a web server or Java."""

from collections.abc import Callable
from pathlib import Path

from spa_jax.envs.contract import Engine
from spa_jax.envs.protocol import Observation
from spa_jax.envs.webshop import pages
from spa_jax.envs.webshop import prompt as prompts
from spa_jax.envs.webshop.catalogue import Product
from spa_jax.envs.webshop.expert import Expert
from spa_jax.envs.webshop.goals import Goal
from spa_jax.envs.webshop.reward import Score, score
from spa_jax.envs.webshop.store import Catalogue, open_catalogue
from spa_jax.envs.webshop.tasks import goal_number

Search = Callable[[str], list[str]]


class Shop:
    """One visit to the shop: pages, what is chosen, and the purchase that ends it.

    Args:
      catalogue: what there is to buy.
      goal: what is to be bought.
      search: finds the ids of products, best first; None: the catalogue's search.
      title: the title score of a purchase; None: that of our nouns.

    Attributes:
      page: the page that is shown.
      query: the last search.
      options: the chosen options, name -> value.
      score: of the purchase; None before it.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        goal: Goal,
        search: Search | None = None,
        title: float | None = None,
    ):
        self.goal = goal
        self.options: dict[str, str] = {}
        self.score: Score | None = None
        self._catalogue, self._title = catalogue, title
        self._search = search or (lambda query: [asin for asin, _ in catalogue.search(query)])
        self.query, self._number = "", 1
        self._item: Product | None = None
        self.page = pages.search_page(goal.instruction_text)

    @property
    def item(self) -> Product | None:
        """The product whose page or detail is open."""
        return self._item

    @property
    def worth(self) -> float:
        """The reward of buying what is open now, as it is chosen; after the purchase its reward.

        0 with no product open.  A detail of a product has no button that buys: there it is still
        what the product would pay.
        """
        if self.score is None:
            return self._score(self._item).reward if self._item is not None else 0.0
        return self.score.reward

    def _score(self, item: Product) -> Score:
        return score(item, self.goal, item.price, self.options, self._title)

    def act(self, action: str) -> bool:
        """Does "search[...]" or "click[...]"; returns whether it could be done."""
        name, argument = prompts.split_action(action)
        if argument is None or self.score is not None:
            return False
        argument = argument.lower()
        if name == "search":
            self._show_results(argument, 1)
            return True
        if name == "click" and argument in self.page.clickables and argument != "search":
            self._click(argument)
            return True
        return False

    def _click(self, name: str) -> None:
        """Follows the original's order of rules; an option may be called like a button."""
        text, kind, item = self.goal.instruction_text, self.page.kind, self._item
        detail = next((detail for detail in pages.DETAILS if detail.lower() == name), None)
        if name == pages.BUY.lower() and item is not None:
            self.score = self._score(item)
            self.page = pages.done_page(item.asin, self.options, self.score.reward)
        elif name == pages.BACK.lower():
            self.query, self._number, self._item, self.options = "", 1, None, {}
            self.page = pages.search_page(text)
        elif name == pages.NEXT.lower() and kind == pages.RESULTS:
            self._show_results(self.query, self._number + 1)
        elif name == pages.PREVIOUS.lower() and kind == pages.RESULTS:
            self._show_results(self.query, self._number - 1)
        elif name == pages.PREVIOUS.lower() and kind == pages.ITEM:
            self._show_results(self.query, self._number)
        elif detail is not None and item is not None:
            self.page = pages.detail_page(text, item, detail)
        else:
            self._show_item(name)

    def _show_results(self, query: str, number: int) -> None:
        self.query, self._number, self._item, self.options = query, number, None, {}
        found = self._search(query)
        shown = found[(number - 1) * pages.PAGE_SIZE : number * pages.PAGE_SIZE]
        products = [product for asin in shown if (product := self._catalogue.find(asin))]
        text = self.goal.instruction_text
        self.page = pages.results_page(text, products, number, len(found))

    def _show_item(self, name: str) -> None:
        """Opens a product, chooses one of its options, or comes back from a detail."""
        if self.page.kind == pages.RESULTS:
            self._item = self._catalogue.find(name.upper())
        assert self._item is not None  # only such names can be clicked
        if self.page.kind == pages.ITEM:
            # A value of several options is the last one's, as in the original.
            owners = [option for option, values in self._item.options.items() if name in values]
            self.options[owners[-1]] = name
        self.page = pages.item_page(self.goal.instruction_text, self._item)


class WebshopEngine(Engine[Path]):
    """Plays goals one after the other; `reset`, then `step` until done."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._catalogue: Catalogue | None = None
        self._expert: Expert | None = None

    def reset(
        self,
        place: Path,
        *,
        task: str,
        prompt: str = "paper",
        expert: bool = False,
        seed: int = 0,
    ) -> Observation:
        """Starts the visit for a goal.

        Args:
          place: a prepared store, or a folder with the files of a small catalogue.  It is
            opened at the first reset and kept.
          task: the goal's name, such as "goal_12".
          prompt: which instruction the policy is given, one of `prompt.PROMPTS`.
          expert: whether each observation carries the expert's next action.
          seed: not looked at: a shop has nothing random.

        Raises:
          UserError: if the catalogue or the goal is missing, or the prompt is unknown.
        """
        instruction = prompts.instruction(prompt)
        if self._catalogue is None or self._folder != place:
            self._catalogue, self._folder = open_catalogue(place), place
        goal = self._catalogue.goal(goal_number(task))
        self._shop = Shop(self._catalogue, goal)
        self._task = task
        self._expert = Expert(self._catalogue, goal) if expert else None
        return self._observation(0.0, True, instruction)

    def step(self, action: str) -> Observation:
        """Plays an action.  What is none shows the same page again."""
        grounded = self._shop.act(action)
        bought = self._shop.score if grounded else None
        return self._observation(bought.reward if bought else 0.0, grounded)

    def _observation(self, reward: float, grounded: bool, instruction: str = "") -> Observation:
        shop = self._shop
        done = shop.score is not None
        expert_action = ""
        if self._expert is not None and not done:
            expert_action = self._expert.act(shop.page, shop.item, shop.options)
        return Observation(
            text=shop.page.text,
            reward=reward,
            done=done,
            success=shop.score is not None and shop.score.reward == 1.0,
            grounded=grounded,
            instruction=instruction,
            task=self._task,
            task_type=shop.goal.category,
            expert_action=expert_action,
            progress=shop.worth,
        )
