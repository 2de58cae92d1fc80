import pytest

from spa_jax.envs.webshop.prompt import PROMPTS, instruction, parse_action, split_action
from spa_jax.errors import UserError


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("search[red shoes]", "search[red shoes]"),
        ("Thought: I think.\nAction: click[Buy Now]", "click[Buy Now]"),
        ("Thought: x\nAction: \nclick[a | b]", "click[a | b]"),
        ("action:search[x] \nAction: click[y]", "search[x]"),
        (" click[< Prev]\n", "click[< Prev]"),
        ("Action:", ""),
    ],
)
def test_actions_are_found_in_what_was_written(response: str, action: str) -> None:
    assert parse_action(response) == action


def test_actions_are_split_as_in_the_original() -> None:
    assert split_action("click[a[b]]") == ("click[a", "b]")
    assert split_action("search[]") == ("search[]", None)
    assert split_action("buy") == ("buy", None)


def test_the_prompts_name_both_actions() -> None:
    assert all("search[" in instruction(name) and "click[" in instruction(name) for name in PROMPTS)
    with pytest.raises(UserError, match="choose one of paper, short"):
        instruction("long")
