"""The commands that generate the games of a whole run, for each environment.

A generator is a program of its own, because it loads the environment, and the trainer never does.
"""

import pathlib
import sys

from spa_jax.data_config import DataConfig
from spa_jax.errors import UserError
from spa_jax.stage_config import MethodConfig

SPLITS = ("train", "valid", "explore", "heldout")
_PRODUCTS_A_TASK = 4


def commands(
    env: str, data: DataConfig, method: MethodConfig, root: pathlib.Path
) -> list[list[str]]:
    """What makes `root`, with as many games in each split as --generate_<split> says.

    Every split gets a seed of its own; those of WebShop share a catalogue, but no product.

    Args:
      env: the environment.
      data: the counts, and what the games are like.
      method: whether there is anything to demonstrate.
      root: the data folder.

    Raises:
      UserError: a count is missing, a setting means nothing to this environment, or it has no
        generator.
    """
    if env not in ("alfworld", "webshop", "virtualhome"):
        where = "--env_address" if env == "openenv" else f"--{env}_data"
        raise UserError(f"--env={env} has no generator of games: give {where}")
    counts = {split: getattr(data, f"generate_{split}") for split in SPLITS}
    if method.base or method.demonstrations:
        counts = {split: counts[split] for split in ("explore", "heldout")}
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"--generate_{split}=0 and no --{env}_data: say how many games to generate, "
                "or give a folder of games"
            )
    if env == "webshop":
        return [_webshop(data, root, counts)]
    seeds = {split: str(data.generate_seed + i) for i, split in enumerate(SPLITS)}
    make = {"alfworld": alfworld, "virtualhome": _virtualhome}[env]
    return [make(data, root / split, count, seeds[split]) for split, count in counts.items()]


def _program(env: str, out: pathlib.Path, seed: str) -> list[str]:
    return [sys.executable, "-m", f"spa_jax.envs.{env}.generate", "--out", str(out), "--seed", seed]


def alfworld(data: DataConfig, out: pathlib.Path, games: int, seed: str) -> list[str]:
    """What generates `games` games of ALFWorld into the folder `out`."""
    least, most = str(data.min_receptacles), str(data.max_receptacles)
    command = [*_program("alfworld", out, seed), "--games", str(games), "--workers", "2"]
    command += ["--min_receptacles", least, "--max_receptacles", most]
    command += ["--closed"] if data.closed_rooms else []
    return command + (["--task_types", data.task_types] if data.task_types else [])


def _virtualhome(data: DataConfig, out: pathlib.Path, tasks: int, seed: str) -> list[str]:
    command = [*_program("virtualhome", out, seed), "--tasks", str(tasks)]
    return command + (["--kinds", data.task_types] if data.task_types else [])


def _webshop(data: DataConfig, root: pathlib.Path, counts: dict[str, int]) -> list[str]:
    if data.task_types:
        raise UserError(f"--task_types={data.task_types}: WebShop has no task types; drop it")
    goals = sum(counts.values())
    products = data.generate_products or _PRODUCTS_A_TASK * goals
    if products < goals:
        raise UserError(
            f"--generate_products={products} is fewer than the {goals} tasks: each buys another "
            "product, so that no split shares one"
        )
    shares = ",".join(f"{split}:{count / goals}" for split, count in counts.items())
    command = _program("webshop", root, str(data.generate_seed))
    return [*command, "--products", str(products), "--goals", str(goals), "--splits", shares]
