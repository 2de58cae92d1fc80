import pytest

from spa_jax.envs.webshop.prompt import PROMPTS, instruction, split_action
from spa_jax.errors import UserError


def test_actions_are_split_as_in_the_original() -> None:
    assert split_action("click[a[b]]") == ("click[a", "b]")
    assert split_action("search[]") == ("search[]", None)
    assert split_action("buy") == ("buy", None)


def test_the_prompts_name_both_actions() -> None:
    assert all("search[" in instruction(name) and "click[" in instruction(name) for name in PROMPTS)
    with pytest.raises(UserError, match="choose one of paper, short"):
        instruction("long")
