"""`check_env` on recordings of our own engine: whole ones pass, and any change is noticed."""

import copy
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from thefuzz import fuzz

from spa_jax.envs.webshop import conformance
from spa_jax.envs.webshop.cases import goal_record
from spa_jax.envs.webshop.catalogue import Product, find_files
from spa_jax.envs.webshop.engine import Shop
from spa_jax.envs.webshop.expert import Expert
from spa_jax.envs.webshop.generate import generate
from spa_jax.envs.webshop.goals import Goal
from spa_jax.envs.webshop.prompt import split_action
from spa_jax.envs.webshop.reward import normalise_colour, nouns, score
from spa_jax.envs.webshop.store import Catalogue, build
from spa_jax.errors import UserError

Cases = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("webshop"), products=60, goals=20, seed=11)


@pytest.fixture(scope="module")
def cases(data: Path) -> Cases:
    """The four case files of our own engine, in the original's words."""
    catalogue = build(find_files(data), "synthetic")
    pairs = [("", "black"), ("black", "matte black"), ("easy use", "easy to use")]
    actions = ("search[a b]", "click[a[b]]", "buy")
    colours = ("navy blue", "grey", "x")
    return {
        "cases_small_tables.json": {
            "token_set_ratio": [[a, b, fuzz.token_set_ratio(a, b)] for a, b in pairs],
            "normalize_color": {colour: normalise_colour(colour) for colour in colours},
            "parse_action": {action: list(split_action(action)) for action in actions},
        },
        "cases_reward.json": {"cases": [_purchase(catalogue, n) for n in range(0, 30, 2)]},
        "cases_search.json": [_query(catalogue, n) for n in range(10)],
        "cases_episodes.json": {
            "seed": "random.seed(0) before construction",
            "prices": {product.asin: product.price for product in catalogue.all_products()},
            "n_goals": catalogue.goals,
            "episodes": [_episode(catalogue, n, n % 3 == 0) for n in range(6)],
        },
    }


def _query(catalogue: Catalogue, number: int) -> dict[str, Any]:
    query = catalogue.goal(number).instruction_text
    return {"query": query, "top50": [[a, round(v, 4)] for a, v in catalogue.search(query)]}


def _purchase(catalogue: Catalogue, number: int) -> dict[str, Any]:
    """A goal's own product with an option left out, or the next goal's."""
    goal = catalogue.goal(number)
    asin = catalogue.goal(number + 1).asin if number % 4 else goal.asin
    product = catalogue.find(asin)
    assert product is not None and isinstance(goal.options, dict)
    options = dict(list(goal.options.items())[1:])
    result = score(product, goal, product.price, options)
    record = goal_record(goal)
    del record["category"], record["weight"]
    return {
        "id": number,
        "kind": "any",
        "product": _product_record(product),
        "goal": record,
        "price": product.price,
        "options": options,
        "reward": result.reward,
        "info": result.info,
        "error": None,
        "purchased_nouns": nouns(product.title),
        "desired_nouns": nouns(goal.name),
        "reward_if_every_token_is_noun": result.reward,
        "tagger_insensitive": True,
    }


def _product_record(product: Product) -> dict[str, Any]:
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


def _episode(catalogue: Catalogue, number: int, wins: bool) -> dict[str, Any]:
    goal: Goal = catalogue.goal(number)
    shop, expert = Shop(catalogue, goal), Expert(catalogue, goal)
    steps = [_step(shop)]
    wander = ["search[red]", "click[nothing]", "click[next >]", "click[< prev]", "search[zz]"]
    for action in wander + ["click[Back to Search]"]:
        done = shop.act(action)
        steps.append({"action": action, "reward": 0.0 if done else 0, "done": False} | _step(shop))
    while wins and shop.score is None:
        action = expert.act(shop.page, shop.item, shop.options)
        shop.act(action)
        reward = shop.score.reward if shop.score else 0.0
        done = shop.score is not None
        steps.append({"action": action, "reward": reward, "done": done} | _step(shop))
    info = shop.score.info if shop.score else {}
    record = goal_record(goal)
    return {"session": number, "goal": record, "info": info, "steps": steps}


def _step(shop: Shop) -> dict[str, Any]:
    available = {
        "has_search_bar": shop.page.has_search_bar,
        "clickables": list(shop.page.clickables),
    }
    return {"obs": shop.page.text, "avail": available}


@pytest.fixture
def data_1000(data: Path, tmp_path: Path) -> Path:
    """The same catalogue under the names of the 1,000-product files."""
    for name, other in (
        ("items_shuffle", "items_shuffle_1000"),
        ("items_ins_v2", "items_ins_v2_1000"),
        ("items_human_ins", "items_human_ins"),
    ):
        (tmp_path / f"{other}.json").symlink_to(data / f"{name}.json")
    return tmp_path


def _write(folder: Path, cases: Cases, packed: bool = False) -> Path:
    folder.mkdir(parents=True)
    for name, value in cases.items():
        text = json.dumps(value)
        if packed:
            (folder / f"{name}.xz").write_bytes(lzma.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def test_the_program_passes_whole_cases_and_fails_changed_ones(
    data_1000: Path, cases: Cases, tmp_path: Path
) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        flags = ["--env=webshop", f"--data={data_1000}", f"--cases={folder}"]
        program = [sys.executable, "-m", "experiments.check_env", *flags]
        return subprocess.run(program, capture_output=True, text=True)

    _write(tmp_path / "packed" / "webshop", cases, packed=True)
    whole = run(tmp_path / "packed")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert whole.stdout.splitlines()[-1] == "RESULT agreement=1.000000 ok=1"
    changed = copy.deepcopy(cases)
    changed["cases_episodes.json"]["episodes"][1]["steps"][1]["obs"] += "."
    other = run(_write(tmp_path / "changed", changed))
    assert other.returncode == 1
    assert "DIFFERS observations: episode 1 step 1" in other.stdout
    assert other.stdout.splitlines()[-1].startswith("RESULT agreement=0.99")
    missing = run(tmp_path)
    assert missing.returncode == 2 and "holds no cases_small_tables.json" in missing.stderr


def _set(*path: Any) -> Callable[[Cases], None]:
    *way, key, value = path

    def change(cases: Cases) -> None:
        place: Any = cases
        for step in way:
            place = place[step]
        assert not isinstance(place, dict) or place.get(key) != value
        place[key] = value

    return change


def _swap_hits(cases: Cases) -> None:
    hits = cases["cases_search.json"][2]["top50"]
    hits[0][0], hits[1][0] = hits[1][0], hits[0][0]


def _swap_results(cases: Cases) -> None:
    step = cases["cases_episodes.json"]["episodes"][0]["steps"][1]
    pieces = step["obs"].split(" [SEP] ")
    pieces[5:8], pieces[8:11] = pieces[8:11], pieces[5:8]
    step["obs"] = " [SEP] ".join(pieces)
    names = step["avail"]["clickables"]
    names[2], names[3] = names[3], names[2]


_REWARD = ("cases_reward.json", "cases", 0)
_EPISODE = ("cases_episodes.json", "episodes", 0)


@pytest.mark.parametrize(
    "change",
    [
        _set("cases_small_tables.json", "normalize_color", "grey", "gray"),
        _set("cases_small_tables.json", "token_set_ratio", 0, 2, 1),
        _set("cases_small_tables.json", "other", []),
        _set(*_REWARD, "reward", 0.123),
        _set(*_REWARD, "info", "w_price", 0.5),
        _set(*_REWARD, "error", "TypeError: x"),
        _set(*_REWARD, "price", 1.23),
        _set(*_REWARD, "desired_nouns", 0, "other"),
        _set(*_REWARD, "reward_if_every_token_is_noun", 0.123),
        _set(*_REWARD, "product", "Description", "Other."),
        _set(*_REWARD, "product", "asin", "B000000000"),
        _set(*_REWARD, "goal", "instruction_text", "Other."),
        _set(*_REWARD, "goal", "attributes", ["other"]),
        _set("cases_search.json", 0, "top50", 3, 1, 99.0),
        _set("cases_search.json", 0, "top50", 3, 0, "B000000000"),
        _set("cases_search.json", 0, "query", "another thing"),
        _set("cases_search.json", 0, "top50", []),
        _swap_hits,
        _set("cases_episodes.json", "n_goals", 1),
        _set(*_EPISODE, "session", 1),
        _set(*_EPISODE, "goal", "price_upper", 15.0),
        _set(*_EPISODE, "goal", "weight", 0.5),
        _set(*_EPISODE, "info", "r_att", 0.5),
        _set(*_EPISODE, "info", "title_score", 0.5),
        _set(*_EPISODE, "steps", -1, "reward", 0.123),
        _set(*_EPISODE, "steps", -1, "done", False),
        _set(*_EPISODE, "steps", 1, "reward", 0.5),
        _set(*_EPISODE, "steps", 2, "reward", 0.0 + 1e-9),
        _set(*_EPISODE, "steps", 2, "action", "click[next >]"),
        _set(*_EPISODE, "steps", 0, "avail", "has_search_bar", False),
        _set(*_EPISODE, "steps", 1, "avail", "clickables", []),
        _swap_results,
    ],
)
def test_every_change_is_noticed(
    data_1000: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch, change: Callable[[Cases], None]
) -> None:
    changed = copy.deepcopy(cases)
    change(changed)
    monkeypatch.setattr(conformance, "read_cases", lambda _, name: changed[name])
    try:
        report = conformance.check(data_1000, "")
    except UserError:
        return  # refused altogether
    assert not report.ok and report.agreement < 1
