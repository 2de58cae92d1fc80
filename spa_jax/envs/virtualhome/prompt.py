"""What the policy is told.  No simulator here: the trainer and the server import it."""

from spa_jax.errors import UserError

# The instruction that SPA-RL evaluates VirtualHome with: 27 of the 42 actions.  Its "envrionment
# output "Nothing happened"" is given as what the environment really says.
_PAPER = """\
Interact with a household to solve a task. Imagine you are an intelligent agent in a household \
environment and your target is to perform actions to complete the task goal. At the beginning \
of your interactions, you will be given the detailed description of the current environment and \
your goal to accomplish. \n\
For each of your turn, you will be given the observation of the last turn. You should first \
think about the current condition and plan for your future actions, and then output your action \
in this turn. Your output must strictly follow this format:"Thought: your thoughts.\nAction: \
your next action".

The available actions are:
walk to {obj}
run to {obj}
grab {obj}
open {obj}
close {obj}
put {obj} on {recep}
put {obj} in {recep}
switch on {obj}
switch off {obj}
drink {obj}
look at {obj}
sit on {obj}
stand up
watch {obj}
wipe {obj}
type on {obj}
wash {obj}
cut {obj}
eat {obj}
sleep
wake up
plug in {obj}
plug out {obj}
pour {obj} into {recep}
move {obj}
release
turn to {obj}

After your each turn, the environment will give you immediate feedback based on which you plan \
your next few steps. if the environment output "Nothing happens", that means the previous action \
is invalid and you should try more options.

Your response should use the following format:

Thought: <your thoughts>
Action: <your next action>"""

# For small models: the action alone, in as few tokens as name the commands that tasks need.
_SHORT = """\
Solve the household task. Answer with one action: walk to X, find X, grab X, put X on Y, \
put X in Y, open X, close X, switch on X, switch off X, plug in X, sit on X, lie on X, turn to X, \
look at X, pour X into Y, drop X, stand up."""

_INSTRUCTIONS = {"paper": _PAPER, "short": _SHORT}
PROMPTS = tuple(_INSTRUCTIONS)


def instruction(prompt: str) -> str:
    """The text shown before the first observation; `prompt` is one of `PROMPTS`."""
    if prompt not in _INSTRUCTIONS:
        raise UserError(f"prompt {prompt!r} is unknown; choose one of {', '.join(PROMPTS)}")
    return _INSTRUCTIONS[prompt]
