"""What all environment processes share: the fork server imports this before it forks them."""

import contextlib

from spa_jax.envs.virtualhome import engine, simulator
from spa_jax.errors import UserError

__all__ = ["engine"]
with contextlib.suppress(UserError):  # not installed: the first reset says so
    simulator.library()
