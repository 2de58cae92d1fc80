"""Environments whose way on is scripted: tests let a policy branch in them."""

import os
import zlib

from spa_jax.envs.protocol import Observation


class Forks:
    """Three doors: how an action's text hashes says whether it opens one; two opened doors win.

    Everything follows from the actions, so a beginning is played again exactly.
    """

    instruction = "Open two of three doors."
    splits = ("train", "heldout", "other")

    def tasks(self, split: str) -> list[str]:
        return [f"{split}_{i}" for i in range(6)]

    def reset(self, task: str, seed: int) -> str:
        self._task, self._opened, self._tried = task, 0, 0
        return f"{task}: a door"

    def step(self, action: str) -> Observation:
        opens = zlib.crc32(action.encode()) % 2 == 0
        self._opened, self._tried = self._opened + opens, self._tried + 1
        won, done = self._opened == 2, self._opened == 2 or self._tried == 3
        text = "it opens" if opens else "it is shut"
        return Observation(
            f"{text}, {self._tried}", float(won), done, won, True, progress=self._opened / 2
        )

    def expert(self) -> str:
        return next(f"door {i}" for i in range(99) if zlib.crc32(f"door {i}".encode()) % 2 == 0)


class Moody(Forks):
    """Says something else each time that its process is another one."""

    def step(self, action: str) -> Observation:
        now = super().step(action)
        if self._tried > 1 and os.environ.get("MOOD"):
            return Observation("the door is gone", 0.0, False, False, True, progress=0.0)
        return now
