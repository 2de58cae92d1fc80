"""What the policy is told, and how its action is read.  No TextWorld here."""

import re

from spa_jax.errors import UserError

# The ALFWorld instruction of ETO and AgentGym, which SPA-RL evaluates with.
_PAPER = """\
Interact with a household to solve a task. Imagine you are an intelligent agent in a household \
environment and your target is to perform actions to complete the task goal. At the beginning \
of your interactions, you will be given the detailed description of the current environment and \
your goal to accomplish.
For each of your turn, you will be given the observation of the last turn. You should first \
think about the current condition and plan for your future actions, and then output your action \
in this turn. Your output must strictly follow this format:"Thought: your thoughts.\\nAction: \
your next action".

The available actions are:
1. go to {recep}
2. take {obj} from {recep}
3. put {obj} in/on {recep}
4. open {recep}
5. close {recep}
6. toggle {obj} {recep}
7. clean {obj} with {recep}
8. heat {obj} with {recep}
9. cool {obj} with {recep}
where {obj} and {recep} correspond to objects and receptacles.
After your each turn, the environment will give you immediate feedback based on which you plan \
your next few steps. if the environment output "Nothing happens", that means the previous action \
is invalid and you should try more options.

Reminder:
1. the action must be chosen from the given available actions. Any actions except provided \
available actions will be regarded as illegal.
2. Think when necessary, try to act directly more in the process."""

# For small models: the action alone, in as few tokens as name every command.
_SHORT = """\
Solve the household task. Answer with one action: go to X, open X, take Y from X, \
put Y in/on X, clean Y with X, heat Y with X, cool Y with X, use Y."""

_INSTRUCTIONS = {"paper": _PAPER, "short": _SHORT}
PROMPTS = tuple(_INSTRUCTIONS)

_ARRIVAL = re.compile(r"^You arrive at [^.]*\. ")
_PUT = re.compile(r"(?:put|move) (.+?) (?:in/on|into|onto|in|on|to) (.+)")
# "toggle desklamp 1" and the paper's "toggle desklamp 1 sidetable 2".
_TOGGLE = re.compile(r"(?:toggle|use) ([a-z]+ \d+)(?: [a-z]+ \d+)?")
_SPACES = re.compile(r"\s+")


def instruction(prompt: str) -> str:
    """The text shown before the first observation; `prompt` is one of `PROMPTS`."""
    if prompt not in _INSTRUCTIONS:
        raise UserError(f"prompt {prompt!r} is unknown; choose one of {', '.join(PROMPTS)}")
    return _INSTRUCTIONS[prompt]


def to_command(action: str) -> str:
    """The engine's wording of an action: `put X in/on Y`, `use X`.

    Both wordings that are in print are understood, `move X to Y` of ALFWorld's current
    grammar and `put X in/on Y` of the published trajectories, and `toggle X` is `use X`.
    Anything else comes back as it is.
    """
    action = _SPACES.sub(" ", action).strip().removesuffix(".")
    if match := _PUT.fullmatch(action):
        return f"put {match.group(1)} in/on {match.group(2)}"
    if match := _TOGGLE.fullmatch(action):
        return f"use {match.group(1)}"
    return action


def shown(feedback: str) -> str:
    """An observation as the paper's prompt shows it: without "You arrive at loc 1. "."""
    return _ARRIVAL.sub("", feedback, count=1).strip()
