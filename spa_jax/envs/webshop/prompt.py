"""What the policy is told, and how its action is read."""

import re

from spa_jax.errors import UserError

# The WebShop instruction of AgentBench and ETO, as SPA-RL's exploration uses it.
_PAPER = """\
You are web shopping.
I will give you instructions about what to do.
You have to follow the instructions.
Every round I will give you an observation and a list of available actions, you have to respond \
an action based on the state and instruction.
You can use search action if search is available.
You can click one of the buttons in clickables.
An action should be of the following structure:
search[keywords]
click[value]
If the action is not valid, perform nothing.
Keywords in search are up to you, but the value in click must be a value in the list of available \
actions.
Remember that your keywords in search should be carefully designed.
Your response should use the following format:

Thought: I think ...
Action: click[something]"""

# For small models: the action alone.
_SHORT = """\
Buy what the instruction asks for. Answer with one action: search[words], or click[X] where X is \
on the page. Click the product, its options, then Buy Now."""

_INSTRUCTIONS = {"paper": _PAPER, "short": _SHORT}
PROMPTS = tuple(_INSTRUCTIONS)

_ACTION = re.compile(r"(.+)\[(.+)\]")


def instruction(prompt: str) -> str:
    """The text shown before the first observation; `prompt` is one of `PROMPTS`."""
    if prompt not in _INSTRUCTIONS:
        raise UserError(f"prompt {prompt!r} is unknown; choose one of {', '.join(PROMPTS)}")
    return _INSTRUCTIONS[prompt]


def split_action(action: str) -> tuple[str, str | None]:
    """("search", "red shoes") of "search[red shoes]"; (action, None) if it has no argument."""
    match = _ACTION.match(action)
    return (match.group(1), match.group(2)) if match else (action, None)
