"""Reading an action out of what a policy wrote."""

import pytest

from spa_jax.envs.text import parse_action


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("go to desk 1", "go to desk 1"),
        ("  go to desk 1\n", "go to desk 1"),
        ("Thought: the desk.\nAction: go to desk 1", "go to desk 1"),
        ("Thought: the desk.\nAction: go to desk 1\nAction: look", "go to desk 1"),
        ("Thought: I act.\n  action:look", "look"),
        ("Thought: no action today", "Thought: no action today"),
        ("Action:", ""),
        ("search[red shoes]", "search[red shoes]"),
        ("Thought: x\nAction: \nclick[a | b]", "click[a | b]"),
        ("action:search[x] \nAction: click[y]", "search[x]"),
        (" click[< Prev]\n", "click[< Prev]"),
        ("", ""),
    ],
)
def test_parse_action(response: str, action: str) -> None:
    assert parse_action(response) == action
