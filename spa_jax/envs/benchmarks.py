"""The environments that a server can serve, and where their parts are.

Each has three parts: an engine, an index of its data (`spa_jax.envs.contract` says what both must
do), and a module whose `PROMPTS` are the names of its instructions.  They are named here and
imported where they are needed: the server loads no engine, the trainer neither engine nor index.
"""

import dataclasses
import importlib
from typing import Any

from spa_jax.envs.contract import Engine, Index
from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
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


_ALL = (
    Benchmark(
        name="alfworld",
        description="ALFWorld's text games on TextWorld's PDDL engine",
        engine="spa_jax.envs.alfworld.engine:AlfworldEngine",
        index="spa_jax.envs.alfworld.games:GameIndex",
        prompts="spa_jax.envs.alfworld.prompt",
        preload="spa_jax.envs.alfworld.preload",
        games_per_worker=40,  # the planner's memory grows with each game
        worker_mb=200,
        limit_mb=1000,
        install="pip install 'spa_jax[alfworld]'",
    ),
    Benchmark(
        name="webshop",
        description="WebShop in text mode",
        engine="spa_jax.envs.webshop.engine:WebshopEngine",
        index="spa_jax.envs.webshop.tasks:GoalIndex",
        prompts="spa_jax.envs.webshop.prompt",
        preload="spa_jax.envs.webshop.preload",
        games_per_worker=1000,
        worker_mb=40,
        limit_mb=1000,
        install="pip install 'spa_jax[webshop]'",
    ),
    Benchmark(
        name="virtualhome",
        description="VirtualHome on the evolving-graph simulator, without Unity",
        engine="spa_jax.envs.virtualhome.engine:VirtualhomeEngine",
        index="spa_jax.envs.virtualhome.tasks:TaskIndex",
        prompts="spa_jax.envs.virtualhome.prompt",
        preload="spa_jax.envs.virtualhome.preload",
        games_per_worker=1000,
        worker_mb=25,
        limit_mb=1000,
        install="pip install --no-deps virtualhome==2.3.0",
    ),
    Benchmark(
        name="custom",
        description="an environment of your own: one class of three methods (docs/environments.md)",
        engine="spa_jax.envs.custom:CustomEngine",
        index="spa_jax.envs.custom:CustomIndex",
        prompts="spa_jax.envs.custom",
        preload="",
        games_per_worker=1000,
        worker_mb=200,
        limit_mb=2000,
        install="install it beside this package",
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def make_engine(benchmark: Benchmark) -> Engine:
    """The environment's engine.

    Raises:
      UserError: if a package that it needs is not installed.
    """
    return _load(benchmark, benchmark.engine)()


def open_index(benchmark: Benchmark, data: str) -> Index:
    """The index of an environment's data, the value of --<env>_data.

    Raises:
      UserError: if there is no such data, or a package that it needs is not installed.
    """
    return _load(benchmark, benchmark.index)(data)


def prompt_names(benchmark: Benchmark) -> tuple[str, ...]:
    """The names of the environment's instructions, values of --prompt."""
    return _load(benchmark, benchmark.prompts).PROMPTS


def _load(benchmark: Benchmark, part: str) -> Any:
    """The class or module that a part names, such as `_load(b, b.engine)`.

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
