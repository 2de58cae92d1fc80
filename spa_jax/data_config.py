"""The games of a run: which splits play which part, how they are generated, how long they are."""

import dataclasses
from collections.abc import Collection
from typing import Any

from spa_jax.config import EnvConfig
from spa_jax.errors import UserError
from spa_jax.horizons import HORIZONS, Horizon
from spa_jax.settings import MAY, MUST, Checked, setting


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """The games of a whole run: which splits play which part, and how games are generated."""

    demo_split: str = setting("train", "The split whose games the expert demonstrates.")
    demo_games: int = setting(
        0, "How many of that split's games are demonstrated; 0: all.", minimum=0
    )
    demo_valid_split: str = setting("valid", "The split of the held-out demonstrations.")
    demo_valid_games: int = setting(
        0, "How many of that split's games are held out; 0: all.", minimum=0
    )
    demo_slips: float = setting(
        0.0,
        "Share of the steps of a demonstration at which the expert does something else that could "
        "be done: a base that is cloned from it wavers, and rewards can teach it more.",
        minimum=0,
        below=1,
    )
    heldout_split: str = setting("heldout", "The split that is evaluated in the end.", group=MAY)
    heldout_games: int = setting(
        0, "How many of that split's games are evaluated; 0: all.", minimum=0, group=MAY
    )
    generate_train: int = setting(
        0, "Games that are generated for the demonstrations.", minimum=0, group=MUST
    )
    generate_valid: int = setting(
        0, "Games that are generated for held-out demonstrations.", minimum=0, group=MUST
    )
    generate_explore: int = setting(
        0, "Games that are generated for exploration, over all rounds.", minimum=0, group=MUST
    )
    generate_heldout: int = setting(
        0, "Games that are generated for the evaluation.", minimum=0, group=MUST
    )
    generate_seed: int = setting(
        1, "Seed of the generated games; each split gets the next one.", minimum=0
    )
    task_types: str = setting(
        "", "Task types to generate, comma-separated; empty: all. WebShop has none."
    )
    min_receptacles: int = setting(
        4, "Fewest receptacles of a generated room (ALFWorld).", minimum=1
    )
    max_receptacles: int = setting(8, "Most receptacles of a generated room (ALFWorld).", minimum=1)
    closed_rooms: bool = setting(
        False,
        "Generated rooms are filled with places that must be opened and may hold what is wanted: "
        "longer searches (ALFWorld).",
    )
    horizon: Horizon = setting(
        "none",
        "Games whose episodes take about so many steps: sets --min_receptacles, --max_receptacles, "
        "--closed_rooms, --task_types and --max_steps, and refuses others beside it (ALFWorld).",
        group=MAY,
    )
    generate_products: int = setting(
        0, "Products of the generated catalogue (WebShop); 0: four a task.", minimum=0
    )

    def check(self) -> None:
        """Refuses rooms that have fewer than the fewest receptacles."""
        if self.min_receptacles > self.max_receptacles:
            raise UserError(
                f"--min_receptacles={self.min_receptacles} exceeds "
                f"--max_receptacles={self.max_receptacles}; give fewer"
            )


def at_horizon(
    data: DataConfig, env: EnvConfig, given: Collection[str] = ()
) -> tuple[DataConfig, EnvConfig]:
    """The settings with what --horizon sets.

    Args:
      data: names the horizon; with "none" both come back as they are.
      env: the environment.
      given: flags that somebody gave: they must say what the horizon says.

    Raises:
      UserError: one says something else, or the environment has no such rooms.
    """
    if data.horizon == "none":
        return data, env
    if env.env != "alfworld":
        raise UserError(
            f"--horizon={data.horizon} with --env={env.env}: it is made of ALFWorld's rooms; drop "
            "it, and choose tasks and --max_steps yourself"
        )
    wanted = HORIZONS[data.horizon]
    has = dataclasses.asdict(env) | dataclasses.asdict(data)
    for flag, value in wanted.items():
        if flag in given and has[flag] != value:
            raise UserError(
                f"--horizon={data.horizon} sets --{flag}={value}, and it is {has[flag]}: drop one "
                "of them"
            )
    steps: dict[str, Any] = {"max_steps": wanted["max_steps"]}
    rooms = {flag: value for flag, value in wanted.items() if flag not in steps}
    return dataclasses.replace(data, **rooms), dataclasses.replace(env, **steps)
