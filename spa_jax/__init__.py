"""SPA-RL (Stepwise Progress Attribution) for LLM agents, in JAX and Flax.

`load`, `credit`, `read`, `Agent` and `Episode` are those of `spa_jax.api`, which is imported when
one of them is first used: an environment server imports this package and never JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa_jax.api import Agent, Episode, credit, load, read

__all__ = ["Agent", "Episode", "credit", "load", "read"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("spa_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
