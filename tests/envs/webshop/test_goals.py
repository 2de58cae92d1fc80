from random import Random

from spa_jax.envs.webshop.catalogue import Product
from spa_jax.envs.webshop.goals import NO_BOUND, GoalKey, draw_goals, make_goal, order
from spa_jax.envs.webshop.reward import score

_PRODUCT = Product(
    asin="B000000001",
    title="Oak Table",
    description="",
    bullets=("b",),
    price_tag="$12.0",
    price=12.0,
    options={"size": ("s", "l"), "color": ("red", "blue", "tan")},
    attributes=("solid wood",),
    category="garden",
    query="tables",
    product_category="Home › Tables",
    instruction="Find me tables",
    instruction_attributes=("solid wood", "easy clean"),
    human=(
        {"instruction_attributes": [], "instruction": "x", "instruction_options": []},
        {
            "instruction_attributes": ["oak"],
            "instruction": "a table.",
            "instruction_options": ["red"],
        },
    ),
)


def test_synthetic_goals_are_all_combinations_with_names_sorted() -> None:
    drawn = draw_goals(_PRODUCT, "synthetic", Random(1))
    assert [choice for choice, _ in drawn] == list(range(6))
    counts = {"solid wood": 6, "easy clean": 3}
    goals = [
        make_goal(_PRODUCT, GoalKey(0, choice, bound), "synthetic", counts)
        for choice, bound in drawn
    ]
    assert [goal.options for goal in goals[:3]] == [
        {"color": "red", "size": "s"},
        {"color": "red", "size": "l"},
        {"color": "blue", "size": "s"},
    ]
    bound = goals[0].price_upper
    assert bound in (30.0, 40.0, 50.0)  # the larger of two of 20, 30, 40, 50
    assert goals[0].instruction_text == (
        f"Find me tables with color: red, and size: s, and price lower than {bound:.2f} dollars"
    )
    assert goals[0].weight == (1 / 6 + 1 / 3) / 2


def test_a_synthetic_goal_without_attributes_is_made_and_played() -> None:
    """The original divides by nothing when it weighs it, and when anything is bought for it."""
    product = Product(**(_PRODUCT.__dict__ | {"instruction_attributes": ()}))
    (choice, bound), *_ = draw_goals(product, "synthetic", Random(1))
    goal = make_goal(product, GoalKey(0, choice, bound), "synthetic", {})
    assert goal.attributes == () and goal.weight == 1.0
    assert isinstance(goal.options, dict)
    assert score(product, goal, product.price, goal.options).reward == 1.0
    assert score(product, goal, product.price, {}).reward == 1 / 3


def test_human_goals_without_attributes_are_left_out() -> None:
    ((choice, bound),) = draw_goals(_PRODUCT, "human", Random(1))
    goal = make_goal(_PRODUCT, GoalKey(0, choice, bound), "human", {})
    assert goal.options == ("red",) and goal.attributes == ("oak",)
    assert goal.instruction_text == f"a table, and price lower than {bound:.2f} dollars"


def test_the_dearest_products_have_no_bound() -> None:
    product = Product(**(_PRODUCT.__dict__ | {"price": 985.0}))
    ((_, bound),) = draw_goals(product, "human", Random(1))
    assert bound == NO_BOUND
    goal = make_goal(product, GoalKey(0, 1, bound), "human", {})
    assert goal.instruction_text == "a table"


def test_the_order_is_the_originals_shuffle() -> None:
    names = [f"goal {i}" for i in range(20)]
    shuffled = names[:]
    Random(233).shuffle(shuffled)
    assert [names[place] for place in order(20)] == shuffled
