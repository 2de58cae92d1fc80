"""How an action is read out of what a policy wrote; the same in every environment.

`spa_jax.envs.protocol` says who does it.
"""

import re

_ACTION_LINE = re.compile(r"^[ \t]*Action:\s*(.*)$", re.MULTILINE | re.IGNORECASE)


def parse_action(response: str) -> str:
    """The action in what the policy wrote.

    It is on the first line "Action: ..." or, if that is empty, on the next; without such a
    line the whole text is the action.
    """
    line = _ACTION_LINE.search(response)
    return (line.group(1) if line else response).strip()
