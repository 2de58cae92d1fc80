"""Classes that break the contract, each in one way; tests name them, nothing runs them."""

import os
import random

import numpy as np

from spa_jax.envs.protocol import Observation


def said(text: str = "Hm.", **fields: object) -> Observation:
    """An observation of a game that goes on."""
    plain = {"reward": 0.0, "done": False, "success": False, "grounded": True}
    return Observation(text, **(plain | fields))


WON = {"reward": 1.0, "done": True, "success": True}


class Fine:
    """Keeps it: "win" wins."""

    instruction = "Say win."
    splits: object = ("train", "heldout")

    def tasks(self, split: str) -> object:
        return [f"{split}_{i}" for i in range(3)]

    def reset(self, task: str, seed: int) -> object:
        self.task = task
        return f"{task}: go"

    def step(self, action: str) -> object:
        return said("Won.", **WON) if action == "win" else said(grounded=False)

    def expert(self) -> object:
        return "win"


class Shared(Fine):
    def tasks(self, split: str) -> object:
        return ["a", f"{split}_b"]


class Dice(Fine):
    def reset(self, task: str, seed: int) -> object:
        return f"{os.urandom(4).hex()} {random.random()}"


class Hopeless(Fine):
    def expert(self) -> object:
        return "lose"


class Wordy(Fine):
    def expert(self) -> object:
        return "Action: win"

    def step(self, action: str) -> object:
        return super().step(action.removeprefix("Action: "))


class Drifting(Fine):
    def reset(self, task: str, seed: int) -> object:
        self.count = 0
        return said("go", progress=0.0)

    def step(self, action: str) -> object:
        self.count += 1
        if self.count == 3:
            return said("Won.", progress=1.0, **WON)
        return said(grounded=False, progress=self.count / 3)


class Touchy(Fine):
    """Raises at what it does not know."""

    def step(self, action: str) -> object:
        return {"win": super().step(action)}[action]


class Numpy(Fine):
    """What it says is numpy's."""

    def step(self, action: str) -> object:
        won = {"reward": np.float32(1.0), "done": np.bool_(True), "success": np.int64(1)}
        return said(np.str_("Won."), **won, progress=np.array(1.0))


class Half(Fine):
    """Half a pair, as a broken page has it."""

    def reset(self, task: str, seed: int) -> object:
        return "a \ud83d b"

    def step(self, action: str) -> object:
        if action == "fail":
            raise ValueError("no such \ud83d room")
        return super().step(action)


class Leaving(Fine):
    def tasks(self, split: str) -> object:
        raise SystemExit(3)


class Long(Fine):
    """One task opens with more than a context holds."""

    def reset(self, task: str, seed: int) -> object:
        return "A room. " * (500 if task == "train_1" else 1)

    def step(self, action: str) -> object:
        return said("The end.", **WON)


class Failing(Fine):
    """Two of three tasks fail."""

    def reset(self, task: str, seed: int) -> object:
        if task != "train_0":
            raise LookupError(f"no room for {task}")
        return "go"


class Rich(Fine):
    """Pays too much."""

    def step(self, action: str) -> object:
        return said("Won.", **(WON | {"reward": 10}))


class Broken(Fine):
    """No game can be reset."""

    def reset(self, task: str, seed: int) -> object:
        raise LookupError("no room at all")
