"""The environments that a server can serve, and where their parts are.

Each has three parts: an engine (`reset(folder, *, task, prompt, expert)`, with `seed` too if it
is `seeded`, and `step(text)`, both giving an `Observation`), an index of a data folder (`root`,
`splits()`, `folder(split, task)` and `tasks(split)`), and a module of prompts (`PROMPTS`,
`instruction(name)`).  They are named here and imported where they are needed: the server loads no
engine, the trainer neither engine nor index.
"""

import dataclasses
import importlib
from typing import Any

from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One environment.

    Attributes:
      name: what --env calls it; its data folder is given by --<name>_data.
      description: one line for people.
      engine: "module:class" of the engine, which only worker processes import.
      index: "module:class" of the data folder's index.
      prompts: the module of its instructions.
      preload: a module that the fork server imports before it forks workers; empty: none.
      games_per_worker: games after which a worker process is replaced.
      worker_mb: memory that a worker process adds to the machine's load at the most, as measured.
      limit_mb: memory without mapped files above which a worker process is ended.
      install: how to get what it needs beside this package.
      seeded: whether a reset takes the client's seed.
    """

    name: str
    description: str
    engine: str
    index: str
    prompts: str
    preload: str
    games_per_worker: int
    worker_mb: int
    limit_mb: int
    install: str
    seeded: bool = False


_ALL = (
    Benchmark(
        "alfworld",
        "ALFWorld's text games on TextWorld's PDDL engine",
        "spa_jax.envs.alfworld.engine:AlfworldEngine",
        "spa_jax.envs.alfworld.games:GameIndex",
        "spa_jax.envs.alfworld.prompt",
        "spa_jax.envs.alfworld.preload",
        40,  # the planner's memory grows with each game
        200,
        1000,
        "pip install 'spa_jax[alfworld]'",
    ),
    Benchmark(
        "webshop",
        "WebShop in text mode",
        "spa_jax.envs.webshop.engine:WebshopEngine",
        "spa_jax.envs.webshop.tasks:GoalIndex",
        "spa_jax.envs.webshop.prompt",
        "spa_jax.envs.webshop.preload",
        1000,
        40,
        1000,
        "pip install 'spa_jax[webshop]'",
    ),
    Benchmark(
        "virtualhome",
        "VirtualHome on the evolving-graph simulator, without Unity",
        "spa_jax.envs.virtualhome.engine:VirtualhomeEngine",
        "spa_jax.envs.virtualhome.tasks:TaskIndex",
        "spa_jax.envs.virtualhome.prompt",
        "spa_jax.envs.virtualhome.preload",
        1000,
        25,
        1000,
        "pip install --no-deps virtualhome==2.3.0",
    ),
    Benchmark(
        "custom",
        "an environment of your own: one class of three methods (docs/environments.md)",
        "spa_jax.envs.custom:CustomEngine",
        "spa_jax.envs.custom:CustomIndex",
        "spa_jax.envs.custom",
        "",
        1000,
        200,
        2000,
        "install it beside this package",
        seeded=True,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def load(benchmark: Benchmark, part: str) -> Any:
    """The class or module that a part names, such as `load(b, b.engine)`.

    Raises:
      UserError: if a package that it needs is not installed.
    """
    module, _, name = part.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--env={benchmark.name} needs the package {error.name}, which is not installed: "
            f"{benchmark.install}"
        ) from error
    return getattr(found, name) if name else found
