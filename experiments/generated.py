"""The commands that generate the games of a whole run, for each environment."""

import pathlib
import sys

from spa_jax.config import RunConfig
from spa_jax.errors import UserError

SPLITS = ("train", "valid", "explore", "heldout")
_PRODUCTS_A_TASK = 4


def commands(env: str, run: RunConfig, root: pathlib.Path) -> list[list[str]]:
    """What makes `root`, with as many games in each split as --generate_<split> says.

    Every split gets a seed of its own; those of WebShop share a catalogue, but no product.

    Args:
      env: the environment.
      run: the counts, and what the games are like.
      root: the data folder.

    Raises:
      UserError: a count is missing, a setting means nothing to this environment, or it has no
        generator.
    """
    if env not in ("alfworld", "webshop", "virtualhome"):
        where = "--env_address" if env == "openenv" else f"--{env}_data"
        raise UserError(f"--env={env} has no generator of games: give {where}")
    counts = {split: getattr(run, f"generate_{split}") for split in SPLITS}
    if run.base or run.demonstrations:
        counts = {split: counts[split] for split in ("explore", "heldout")}
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"--generate_{split}=0 and no --{env}_data: say how many games to generate, "
                "or give a folder of games"
            )
    if env == "webshop":
        return [_webshop(run, root, counts)]
    seeds = {split: str(run.generate_seed + i) for i, split in enumerate(SPLITS)}
    make = {"alfworld": _alfworld, "virtualhome": _virtualhome}[env]
    return [make(run, root / split, count, seeds[split]) for split, count in counts.items()]


def _program(env: str, out: pathlib.Path, seed: str) -> list[str]:
    return [sys.executable, "-m", f"spa_jax.envs.{env}.generate", "--out", str(out), "--seed", seed]


def _alfworld(run: RunConfig, out: pathlib.Path, games: int, seed: str) -> list[str]:
    command = [
        *_program("alfworld", out, seed), "--games", str(games), "--workers", "2",
        "--min_receptacles", str(run.min_receptacles),
        "--max_receptacles", str(run.max_receptacles),
    ]  # fmt: skip
    return command + (["--task_types", run.task_types] if run.task_types else [])


def _virtualhome(run: RunConfig, out: pathlib.Path, tasks: int, seed: str) -> list[str]:
    command = [*_program("virtualhome", out, seed), "--tasks", str(tasks)]
    return command + (["--kinds", run.task_types] if run.task_types else [])


def _webshop(run: RunConfig, root: pathlib.Path, counts: dict[str, int]) -> list[str]:
    if run.task_types:
        raise UserError(f"--task_types={run.task_types}: WebShop has no task types; drop it")
    goals = sum(counts.values())
    products = run.generate_products or _PRODUCTS_A_TASK * goals
    if products < goals:
        raise UserError(
            f"--generate_products={products} is fewer than the {goals} tasks: each buys another "
            "product, so that no split shares one"
        )
    shares = ",".join(f"{split}:{count / goals}" for split, count in counts.items())
    return [
        *_program("webshop", root, str(run.generate_seed)), "--products", str(products),
        "--goals", str(goals), "--splits", shares,
    ]  # fmt: skip
