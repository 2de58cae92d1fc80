"""Compares this WebShop with recordings of the original one.

Four case files, each plain or .xz, say what the original engine answered:

    cases_small_tables.json   token_set_ratio, normalize_color, parse_action
    cases_reward.json         purchases, with the nouns that a tagger found
    cases_search.json         queries and Lucene's 50 best, with scores
    cases_episodes.json       whole episodes: observations, available actions, rewards

Every recorded value is compared, except labels (`id`, `kind` and what the file says about the
programs that recorded it).  What is random in the original (prices, price bounds) is drawn
again from the seed that the file names.

Two things of the original cannot be had without its Java and its spaCy model, and may
differ within bounds: a ranking (the page is then replayed with the recorded results) and a
product name's nouns (the purchase is then scored with the recorded title score).
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thefuzz import fuzz

from spa_jax.envs.conformance import Report
from spa_jax.envs.webshop import pages
from spa_jax.envs.webshop.cases import (
    goal_record,
    product_record,
    read_cases,
    read_goal,
    read_product,
)
from spa_jax.envs.webshop.catalogue import Product, find_files
from spa_jax.envs.webshop.engine import Shop
from spa_jax.envs.webshop.goals import Goal
from spa_jax.envs.webshop.prompt import split_action
from spa_jax.envs.webshop.reward import normalise_colour, nouns, score, title_score, unscorable
from spa_jax.envs.webshop.store import Catalogue, build
from spa_jax.errors import UserError

OWN_NOUNS = 0.98  # least share of rewards that are equal with our own nouns
OVERLAP = 0.97  # least mean overlap of the ten best
OTHER_RANKING = 0.02  # largest share of queries, or result pages, that may be ranked otherwise
SCORE_TOLERANCE = 2e-4  # of a search score; recorded ones have four decimals
TITLE_TOLERANCE = 0.25  # of a title score that a tagger's nouns gave
SHOWN_PROBLEMS = 20


class _Tally:
    """Counts what agrees, and keeps what does not."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.equal: Counter[str] = Counter()
        self.problems: list[str] = []
        self.notes: list[str] = []

    def compare(self, group: str, what: str, ours: Any, recorded: Any) -> None:
        """Compares a value; it is a problem if it differs."""
        self.expect(
            group, f"{what}: ours {_short(ours)}, recorded {_short(recorded)}", ours == recorded
        )

    def expect(self, group: str, problem: str, holds: bool) -> None:
        """Counts a condition; it is a problem if it does not hold."""
        self.total[group] += 1
        self.equal[group] += holds
        if not holds:
            self.problems.append(f"{group}: {problem}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def check(data: str | Path, cases: str | Path) -> Report:
    """Compares with the case files in `cases`.

    Args:
      data: holds the product files that the cases were recorded with.
      cases: holds the four case files.

    Raises:
      UserError: if files are missing or have another structure.
    """
    tables = read_cases(cases, "cases_small_tables.json")
    rewards = read_cases(cases, "cases_reward.json")
    searches = read_cases(cases, "cases_search.json")
    episodes = read_cases(cases, "cases_episodes.json")
    tally = _Tally()
    try:
        catalogue = _catalogue(data, episodes)
        _check_tables(tally, tables)
        _check_rewards(tally, rewards["cases"], catalogue)
        _check_searches(tally, searches, catalogue)
        _check_recording(tally, episodes, catalogue)
        _Replay(tally, catalogue).run(episodes["episodes"])
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"--cases: a file in {cases} has another structure: {type(error).__name__} {error}"
        ) from error
    lines = [f"{g}: {tally.equal[g]} of {n} agree" for g, n in tally.total.items()] + tally.notes
    lines += [f"DIFFERS {problem}" for problem in tally.problems[:SHOWN_PROBLEMS]]
    if len(tally.problems) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(tally.problems) - SHOWN_PROBLEMS} more")
    agreement = sum(tally.equal.values()) / max(sum(tally.total.values()), 1)
    return Report(tuple(lines), agreement, not tally.problems)


def _catalogue(data: str | Path, recording: dict[str, Any]) -> Catalogue:
    """The catalogue as it was recorded: its kind of goals, its seed."""
    seed = re.search(r"seed\((\d+)\)", recording["seed"])
    if seed is None:
        raise UserError(f"cases_episodes.json: no random.seed(N) in {recording['seed']!r}")
    options = [episode["goal"]["goal_options"] for episode in recording["episodes"]]
    kind = "human" if options and isinstance(options[0], list) else "synthetic"
    return build(find_files(data, small_first=True), kind, int(seed[1]))


def _check_tables(tally: _Tally, tables: dict[str, Any]) -> None:
    """The three small functions."""
    known: dict[str, Callable[[Any], Any]] = {
        "token_set_ratio": lambda pair: fuzz.token_set_ratio(*pair),
        "normalize_color": normalise_colour,
        "parse_action": lambda action: list(split_action(action)),
    }
    for name, table in tables.items():
        tally.expect("small tables", f"no table is called {name!r}", name in known)
        rows = table.items() if isinstance(table, dict) else (((a, b), v) for a, b, v in table)
        for argument, value in rows if name in known else ():
            tally.compare("small tables", f"{name}({argument!r})", known[name](argument), value)


_CASE_FIELDS = frozenset(
    "id kind product goal price options reward info error purchased_nouns desired_nouns "
    "reward_if_every_token_is_noun tagger_insensitive".split()
)


def _check_rewards(tally: _Tally, cases: list[dict[str, Any]], catalogue: Catalogue) -> None:
    """The reward cases: with the given nouns, and with our own."""
    texts = {}
    if catalogue.kind == "synthetic":
        goals = (catalogue.goal(place) for place in range(catalogue.goals))
        texts = {goal.instruction_text: goal for goal in goals}
    sold = {(product.title, product.bullets) for product in catalogue.all_products()}
    own, refused = 0, 0
    for case in cases:
        what = f"case {case['id']}"
        tally.compare("reward cases' fields", what, set(case), set(_CASE_FIELDS))
        product, goal = read_product(case["product"]), read_goal(case["goal"])
        names = case["product"]["name"], case["goal"]["name"]
        found = case["purchased_nouns"], case["desired_nouns"]
        for name, words in zip(names, found, strict=True):
            tally.expect("nouns", f"{what}: not in order in {name!r}", _in_order(words, name))
        _check_product(tally, what, case, catalogue, sold)
        _check_goal(tally, what, case["goal"], catalogue, texts)
        bought = (product, goal, case["price"], case["options"])
        value, info, error = _scored(*bought, title_score(*found))
        tally.compare("rewards, given nouns", what, value, case["reward"])
        tally.compare("reward details", what, info, case["info"])
        # How it failed is Python's wording; that it cannot be scored is the finding.
        tally.compare("reward errors", what, bool(error), bool(case["error"]))
        refused += bool(error) and bool(case["error"])
        _check_every_token(tally, what, case)
        ours, *_ = _scored(*bought, title_score(*map(nouns, names)))
        own += ours == case["reward"]
    share = own / max(len(cases), 1)
    if refused:
        tally.notes.append(f"rewards: {refused} goals that the original and ours refuse to score")
    tally.notes.append(f"rewards, our own nouns: {own} of {len(cases)} equal ({share:.1%})")
    tally.expect("rewards, own nouns, threshold", f"{share:.1%} equal", share >= OWN_NOUNS)


def _scored(
    product: Product, goal: Goal, price: float, options: dict[str, str], title: float
) -> tuple[float | None, dict[str, Any] | None, str | None]:
    """(reward, details, error): the original fails on some goals, which ours then refuses."""
    if why := unscorable(goal):
        return None, None, why
    result = score(product, goal, price, options, title)
    return result.reward, result.info, None


def _in_order(words: list[str], name: str) -> bool:
    at, name = 0, name.lower()
    for word in words:
        at = name.find(word, at) + len(word)
        if at < len(word):
            return False
    return True


def _check_every_token(tally: _Tally, what: str, case: dict[str, Any]) -> None:
    """What the reward would be if all words were nouns: another r_type, or the same."""
    reward, other = case["reward"], case["reward_if_every_token_is_noun"]
    group = "rewards, every word a noun"
    tally.compare(group, what, reward == other, case["tagger_insensitive"])
    if reward is not None and other is not None and case["info"]["r_type"]:
        full = reward / case["info"]["r_type"]
        close = any(abs(other - full * r_type) < 1e-12 for r_type in (0.0, 0.1, 0.5, 1.0))
        tally.expect(group, f"{what}: {other} fits no r_type", close)


def _check_product(
    tally: _Tally, what: str, case: dict[str, Any], catalogue: Catalogue, sold: set[Any]
) -> None:
    """What a case says about a product of the catalogue is what we read there."""
    record = case["product"]
    product = catalogue.find(record["asin"])
    if product is None:
        unknown = (record["name"], tuple(record["BulletPoints"])) not in sold
        tally.expect("products", f"{what}: {record['asin']} has another id", unknown)
        return
    ours = product_record(product)
    for name in ours.keys() | record.keys():
        mine, theirs = ours.get(name, "nothing"), record.get(name, "nothing")
        tally.compare("products", f"{what} {name}", mine, theirs)
    # Some cases ask for a cent above the bound.
    above = round(case["goal"]["price_upper"] + 0.01, 2)
    known = case["price"] in (product.price, above)
    tally.expect("products", f"{what}: the price is {product.price}", known)


def _check_goal(
    tally: _Tally, what: str, goal: dict[str, Any], catalogue: Catalogue, texts: dict[str, Goal]
) -> None:
    """What a case says about a synthetic goal of the catalogue is what we draw."""
    text = goal["instruction_text"]
    ours = texts.get(text)
    if isinstance(goal["goal_options"], dict) and catalogue.find(goal["asin"]):
        tally.expect("reward cases' goals", f"{what}: no goal says {text!r}", ours is not None)
    for name in goal if ours else ():
        assert ours is not None
        tally.compare("reward cases' goals", f"{what} {name}", goal_record(ours)[name], goal[name])


def _contradicted(case: dict[str, Any], catalogue: Catalogue) -> list[str]:
    """The products of a query whose recorded place or score is not what we compute."""
    recorded = dict(case["top50"])
    ours = catalogue.scores(case["query"], recorded)
    wrong = [a for a, v in recorded.items() if abs(ours.get(a, -1.0) - v) > SCORE_TOLERANCE]
    last = min(recorded.values(), default=0.0)
    for asin, value in catalogue.search(case["query"]):
        if asin not in recorded and value > last + SCORE_TOLERANCE:
            wrong.append(asin)
    return wrong


def _check_searches(tally: _Tally, cases: list[dict[str, Any]], catalogue: Catalogue) -> None:
    """The queries: overlap of the ten best, and every hit's place and score."""
    overlaps: list[float] = []
    identical = 0
    otherwise: list[str] = []
    for case in cases:
        what = f"query {case['query']!r}"
        tally.compare("search cases' fields", what, set(case), {"query", "top50"})
        ours = [asin for asin, _ in catalogue.search(case["query"])]
        recorded = [asin for asin, _ in case["top50"]]
        scores = [value for _, value in case["top50"]]
        best = set(recorded[: pages.PAGE_SIZE])
        same = best & set(ours[: pages.PAGE_SIZE])
        overlaps.append(len(same) / len(best) if best else float(not ours))
        falling = all(a >= b for a, b in zip(scores, scores[1:], strict=False))
        tally.expect("search", f"{what}: scores are not sorted", falling)
        as_many = len(set(recorded)) == len(scores) == len(ours)
        tally.expect("search", f"{what}: {len(scores)} hits, ours {len(ours)}", as_many)
        identical += recorded == ours
        wrong = _contradicted(case, catalogue)
        # An analysis unlike Lucene's moves many hits a little; a few that differ alone, or
        # hits that have nothing in common, are another matter.
        if len(wrong) > len(scores) / 4 and overlaps[-1] >= 0.5:
            otherwise.append(what)
        else:
            tally.expect("search", f"{what}: hits or scores differ: {wrong[:3]}", not wrong)
    _conclude_search(tally, cases, overlaps, identical, otherwise)


def _conclude_search(
    tally: _Tally, cases: list[Any], overlaps: list[float], identical: int, otherwise: list[str]
) -> None:
    mean = sum(overlaps) / max(len(overlaps), 1)
    tally.notes.append(
        f"search: mean overlap of the ten best {mean:.4f}, {identical} of {len(cases)} rankings "
        f"identical, {len(otherwise)} ranked otherwise"
    )
    tally.expect("search, threshold", f"mean overlap {mean:.4f}", mean >= OVERLAP)
    few = len(otherwise) <= OTHER_RANKING * len(cases)
    tally.expect("search, threshold", f"ranked otherwise: {otherwise[:3]}", few)


def _check_recording(tally: _Tally, recording: dict[str, Any], catalogue: Catalogue) -> None:
    """All prices and the number of goals."""
    fields = {"seed", "prices", "n_goals", "episodes"}
    tally.compare("recording", "fields", set(recording), fields)
    tally.compare("recording", "number of goals", catalogue.goals, recording["n_goals"])
    ours = {product.asin: product.price for product in catalogue.all_products()}
    for asin in ours.keys() | recording["prices"].keys():
        recorded = recording["prices"].get(asin)
        tally.compare("prices", asin, ours.get(asin), recorded)


class _RecordedSearch:
    """Our search, but for a page whose recorded products are others.

    Attributes:
      page: (number, ids) of the page that is replayed; None: our own ranking.
    """

    def __init__(self, catalogue: Catalogue):
        self._catalogue = catalogue
        self.page: tuple[int, list[str]] | None = None

    def __call__(self, query: str) -> list[str]:
        found = [asin for asin, _ in self._catalogue.search(query)]
        if self.page is not None:
            number, asins = self.page
            first = (number - 1) * pages.PAGE_SIZE
            found[first : first + len(asins)] = asins
        return found


class _Replay:
    """Replays recorded episodes."""

    def __init__(self, tally: _Tally, catalogue: Catalogue):
        self._tally, self._catalogue = tally, catalogue
        self._results, self._otherwise, self._given_titles, self._purchases = 0, 0, 0, 0

    def run(self, episodes: list[dict[str, Any]]) -> None:
        """Replays them all."""
        rewards = [step["reward"] for e in episodes for step in e["steps"][1:]]
        # The original answers an action that it cannot do with an integer 0.
        self._tells_executable = {int, float} <= {type(reward) for reward in rewards}
        for number, episode in enumerate(episodes):
            self._episode(f"episode {number}", episode)
        self._tally.notes.append(
            f"episodes: {self._results} result pages, {self._otherwise} replayed with the "
            f"recorded ranking; {self._purchases} purchases, {self._given_titles} scored with "
            "the recorded title score"
        )
        few = self._otherwise <= OTHER_RANKING * max(self._results, 1)
        self._tally.expect("result pages, threshold", f"{self._otherwise} ranked otherwise", few)

    def _episode(self, what: str, episode: dict[str, Any]) -> None:
        tally, goal = self._tally, self._catalogue.goal(episode["session"])
        tally.compare("episodes' fields", what, set(episode), {"session", "goal", "steps", "info"})
        ours = goal_record(goal)
        for name in ours.keys() | episode["goal"].keys():
            recorded = episode["goal"].get(name, "nothing")
            tally.compare("goals", f"{what} {name}", ours.get(name, "nothing"), recorded)
        search = _RecordedSearch(self._catalogue)
        shop = Shop(self._catalogue, goal, search, self._title(goal, episode))
        first = {"obs", "avail"}
        for place, step in enumerate(episode["steps"]):
            where = f"{what} step {place}"
            fields = first if place == 0 else first | {"action", "reward", "done"}
            tally.compare("steps' fields", where, set(step), fields)
            if place > 0:
                search.page = self._recorded_page(where, shop, step)
                executed = shop.act(step["action"])
                search.page = None
                if self._tells_executable:
                    recorded = isinstance(step["reward"], float)
                    tally.compare("executable actions", where, executed, recorded)
                reward = shop.score.reward if shop.score else 0.0
                tally.compare("rewards in episodes", where, reward, step["reward"])
                tally.compare("ends", where, shop.score is not None, step["done"])
            tally.compare("observations", where, shop.page.text, step["obs"])
            available = {
                "has_search_bar": shop.page.has_search_bar,
                "clickables": list(shop.page.clickables),
            }
            tally.compare("available actions", where, available, step["avail"])
        self._check_info(what, shop, episode["info"] or {})

    def _title(self, goal: Goal, episode: dict[str, Any]) -> float | None:
        """The recorded title score, if ours would give another r_type; the purchase decides."""
        info = episode["info"]
        bought = re.search(r" asin \[SEP\] (\S+) \[SEP\] options ", episode["steps"][-1]["obs"])
        product = self._catalogue.find(bought[1]) if bought else None
        if not info or product is None:
            return None
        self._purchases += 1
        ours = score(product, goal, product.price, {}).info
        if ours["r_type"] == info["r_type"]:
            return None
        given = score(product, goal, product.price, {}, info["title_score"]).info
        self._given_titles += 1
        what = f"r_type {info['r_type']} with title score {info['title_score']}"
        self._tally.compare("purchases", what, given["r_type"], info["r_type"])
        return info["title_score"]

    def _check_info(self, what: str, shop: Shop, recorded: dict[str, Any]) -> None:
        """How the purchase was scored; a tagger's title score may differ a little."""
        ours = shop.score.info if shop.score else {}
        for name in ours.keys() | recorded.keys():
            mine, theirs = ours.get(name), recorded.get(name)
            if name == "title_score" and mine is not None and theirs is not None:
                near = 0 <= theirs <= 1 and abs(mine - theirs) <= TITLE_TOLERANCE
                problem = f"{what}: title score {theirs}, ours {mine}"
                self._tally.expect("purchases", problem, near)
            else:
                self._tally.compare("purchases", f"{what} {name}", mine, theirs)

    def _recorded_page(self, what: str, shop: Shop, step: dict[str, Any]) -> Any:
        """The products of a recorded result page, if our ranking has others there."""
        pieces = step["obs"].split(" [SEP] ")
        match = re.search(r" \[SEP\] Page (\d+) \(Total results: \d+\) \[SEP\] ", step["obs"])
        if match is None or pages.NEXT not in pieces:
            return None
        self._results += 1
        number = int(match[1])
        recorded = [name.upper() for name in step["avail"]["clickables"] if len(name) == 10]
        recorded = [asin for asin in recorded if self._catalogue.find(asin)]
        name, argument = split_action(step["action"])
        query = argument.lower() if name == "search" and argument else shop.query
        first = (number - 1) * pages.PAGE_SIZE
        found = self._catalogue.search(query)
        if recorded == [asin for asin, _ in found[first : first + pages.PAGE_SIZE]]:
            return None
        self._otherwise += 1
        # Only products that our ranking has as well may stand elsewhere in it, and close by.
        scores = dict(found)
        values = [scores.get(asin, 0.0) for asin in recorded]
        falling = all(a >= b - SCORE_TOLERANCE for a, b in zip(values, values[1:], strict=False))
        self._tally.expect("result pages", f"{what}: out of order {recorded}", falling)
        return number, recorded
