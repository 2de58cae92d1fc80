import dataclasses
from pathlib import Path

import pytest

from spa_jax.envs.boundary import observation_from_wire
from spa_jax.envs.protocol import observation_to_wire
from spa_jax.envs.text import parse_action
from spa_jax.envs.webshop import pages
from spa_jax.envs.webshop.engine import Shop, WebshopEngine
from spa_jax.envs.webshop.store import Catalogue
from spa_jax.errors import UserError


def _with_options(catalogue: Catalogue) -> int:
    """A goal whose product has two options, of two values or more."""
    for place in range(catalogue.goals):
        product = catalogue.find(catalogue.goal(place).asin)
        if product and len(product.options) == 2:
            return place
    raise AssertionError("no such goal")


def _open(catalogue: Catalogue) -> Shop:
    goal = catalogue.goal(_with_options(catalogue))
    shop = Shop(catalogue, goal)
    assert shop.act(f"search[{goal.name}]") and shop.act(f"click[{goal.asin}]")
    return shop


def test_what_cannot_be_done_changes_nothing(catalogue: Catalogue) -> None:
    shop = Shop(catalogue, catalogue.goal(0))
    before = shop.page
    for action in ("click[Search]", "click[Buy Now]", "search[]", "buy", " search[x]", "CLICK[x]"):
        assert not shop.act(action) and shop.page == before


def test_searching_works_everywhere_and_pages_turn(catalogue: Catalogue) -> None:
    shop = _open(catalogue)
    assert shop.act("search[lamp LIGHT blanket shirt]") and shop.query == "lamp light blanket shirt"
    first = shop.page
    assert shop.act("click[Next >]") and "Page 2 (Total results: " in shop.page.text
    assert shop.act("click[< Prev]") and shop.page == first
    for _ in range(7):  # there is always a next page, at last an empty one
        assert shop.act("click[next >]")
    assert shop.page.clickables == ("back to search", "< prev", "next >")
    assert shop.act("click[Back to Search]") and shop.page.kind == pages.SEARCH


def test_options_stay_on_details_and_are_cleared_by_going_back(catalogue: Catalogue) -> None:
    shop = _open(catalogue)
    assert shop.item is not None
    (first, values), (second, others) = shop.item.options.items()
    for value in (values[0], values[1], others[0]):
        assert shop.act(f"click[{value.upper()}]")
    assert shop.options == {first: values[1], second: others[0]}
    for detail in pages.DETAILS:
        assert shop.act(f"click[{detail}]") and shop.page.kind == pages.DETAIL
        assert shop.act("click[< Prev]") and shop.page.kind == pages.ITEM
    assert shop.options == {first: values[1], second: others[0]}
    assert shop.act("click[< Prev]") and shop.page.kind == pages.RESULTS
    assert shop.options == {} and shop.item is None


def test_a_purchase_ends_the_episode(shop_data: Path, catalogue: Catalogue) -> None:
    place = _with_options(catalogue)
    goal = catalogue.goal(place)
    engine = WebshopEngine()
    observation = engine.reset(shop_data, task=f"goal_{place}", prompt="short")
    assert observation.instruction and observation.task == f"goal_{place}"
    assert observation.task_type == goal.category and observation.grounded
    engine.step(f"search[{goal.name}]")
    engine.step(parse_action(f"Thought: mine\nAction: click[{goal.asin}]"))
    observation = engine.step("click[no such thing]")
    assert not observation.grounded and not observation.done and observation.reward == 0.0
    observation = engine.step("click[Buy Now]")
    parts = len(goal.attributes) + len(goal.options) + 1
    assert observation.reward == (len(goal.attributes) + 1) / parts  # no option chosen
    assert observation.done and not observation.success and observation.grounded
    assert observation_from_wire(observation_to_wire(observation)) == observation
    after = engine.step("click[Buy Now]")
    assert (after.reward, after.done, after.grounded) == (0.0, True, False)


def test_progress_is_what_buying_now_would_pay(shop_data: Path, catalogue: Catalogue) -> None:
    place = _with_options(catalogue)
    goal, engine = catalogue.goal(place), WebshopEngine()
    first, second = goal.options  # the values that the goal asks for
    product = catalogue.find(goal.asin)
    others = next(values for values in product.options.values() if first in values)
    parts = len(goal.attributes) + 3
    bare = (len(goal.attributes) + 1) / parts  # no option chosen

    def told(action: str) -> float:
        now = engine.step(action)
        assert now.grounded and (now.done or now.reward == 0)
        return now.progress

    assert engine.reset(shop_data, task=f"goal_{place}").progress == 0
    assert told(f"search[{goal.name}]") == 0
    assert told(f"click[{goal.asin}]") == bare
    assert told(f"click[{first}]") == pytest.approx(bare + 1 / parts)
    assert told("click[Features]") == pytest.approx(bare + 1 / parts)  # no button there buys
    assert engine.step("click[Buy Now]").progress == pytest.approx(bare + 1 / parts)  # not grounded
    assert told("click[< Prev]") == pytest.approx(bare + 1 / parts)
    assert told("click[< Prev]") == 0  # results: nothing is open, nothing chosen
    assert told(f"click[{goal.asin}]") == bare
    assert told(f"click[{second}]") == pytest.approx(bare + 1 / parts)
    assert told(f"click[{first}]") == 1
    wrong = next(value for value in others if value != first)
    assert told(f"click[{wrong}]") == pytest.approx(bare + 1 / parts)
    bought = engine.step("click[Buy Now]")
    assert bought.done and bought.progress == bought.reward == pytest.approx(bare + 1 / parts)
    assert engine.step("click[Buy Now]").progress == bought.reward


def test_the_policy_is_never_shown_the_available_actions(shop_data: Path) -> None:
    observation = WebshopEngine().reset(shop_data, task="goal_0")
    assert "clickables" not in dataclasses.asdict(observation)
    assert "back to search" not in observation.text


def test_the_expert_buys_every_goal_at_full_reward(shop_data: Path, catalogue: Catalogue) -> None:
    engine = WebshopEngine()
    for place in range(catalogue.goals):
        observation = engine.reset(shop_data, task=f"goal_{place}", expert=True)
        for _ in range(10):
            observation = engine.step(observation.expert_action)
            assert observation.grounded
            if observation.done:
                break
        assert observation.success and observation.reward == 1.0
        assert observation.expert_action == ""


def test_the_expert_finds_its_way_back(shop_data: Path) -> None:
    engine = WebshopEngine()
    observation = engine.reset(shop_data, task="goal_1", expert=True)
    text = engine.step("search[for]").text + engine.step("search[lamp light shirt cream]").text
    wrong = next(name for name in text.split(" [SEP] ") if name[:2] == "B0")
    engine.step(f"click[{wrong}]")
    observation = engine.step("click[Features]")
    for _ in range(12):
        if observation.done:
            break
        observation = engine.step(observation.expert_action)
    assert observation.success


def test_wrong_requests_are_refused(shop_data: Path) -> None:
    engine = WebshopEngine()
    for task, prompt, message in (
        ("goal_9999", "paper", "no goal 9999"),
        ("9", "paper", "no WebShop task"),
        ("goal_1", "long", "prompt 'long'"),
    ):
        with pytest.raises(UserError, match=message):
            engine.reset(shop_data, task=task, prompt=prompt)
    with pytest.raises(UserError, match="no folder"):
        WebshopEngine().reset(shop_data / "none", task="goal_1")
