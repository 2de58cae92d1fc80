"""How long an episode is: rooms, task types and step limits for about 8, 16 and 32 steps.

The expert, which searches as a policy must, takes on generated games (100 of each horizon):

    horizon   mean steps   90% take at most   longest   step limit
    8         8.6          12                 14        16
    16        16.7         25                 30        32
    32        31.1         46                 53        64

A longer episode is a longer search: more places, those that must be opened first, and goals that
need a second object or another appliance.  The step limit is twice the horizon.
"""

from typing import Any, Literal

Horizon = Literal["none", "8", "16", "32"]

_TWO = "pick_two_obj_and_place"
_LONG = (
    "pick_clean_then_place_in_recep,pick_heat_then_place_in_recep,"
    f"pick_cool_then_place_in_recep,{_TWO}"
)
# By the flags that they set; task types "" are all six.
HORIZONS: dict[str, dict[str, Any]] = {
    "8": {
        "min_receptacles": 4,
        "max_receptacles": 5,
        "closed_rooms": False,
        "task_types": "",
        "max_steps": 16,
    },
    "16": {
        "min_receptacles": 11,
        "max_receptacles": 13,
        "closed_rooms": True,
        "task_types": _LONG,
        "max_steps": 32,
    },
    "32": {
        "min_receptacles": 20,
        "max_receptacles": 24,
        "closed_rooms": True,
        "task_types": _TWO,
        "max_steps": 64,
    },
}
