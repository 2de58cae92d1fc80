"""An environment that does what a bad day does; `python -m` never runs it, tests serve it."""

import dataclasses
import os
import time

from spa_jax.envs.protocol import Observation


class Odd:
    """Its actions: echo WORDS, sleep SECONDS, eat MEGABYTES, die, fail, win."""

    instruction = "Do something odd."
    splits = ("train",)

    def tasks(self, split: str) -> list[str]:
        return [f"{split}_{i}" for i in range(20)]

    def reset(self, task: str, seed: int) -> str:
        self._eaten: list[bytes] = []
        self._said: list[str] = []
        return f"{task} with seed {seed}"

    def step(self, action: str) -> Observation:
        verb, _, rest = action.partition(" ")
        self._said.append(rest)
        text = f"{len(self._said)}: {rest}"
        match verb:
            case "sleep":
                time.sleep(float(rest))
            case "eat":
                self._eaten.append(b"x" * 2**20 * int(rest))
            case "gorge":  # and never answers
                while True:
                    self._eaten.append(b"x" * 2**24)
                    time.sleep(0.01)
            case "die":
                os._exit(1)
            case "fail":
                raise RuntimeError("out of luck")
        won = verb == "win"
        return Observation(text, float(won), won, won, verb in ("echo", "sleep", "win"))

    def expert(self) -> str:
        return "win"


class Doomed(Odd):
    """Dies at every step of every task but one."""

    def reset(self, task: str, seed: int) -> str:
        self._task = task
        return super().reset(task, seed)

    def step(self, action: str) -> Observation:
        if self._task != "train_13":
            os._exit(1)
        return super().step("win")


class Counting(Odd):
    """Ends after three actions and pays the share of them with an even number of letters."""

    def reset(self, task: str, seed: int) -> str:
        self._even: list[bool] = []
        return super().reset(task, seed)

    def step(self, action: str) -> Observation:
        self._even.append(len(action) % 2 == 0)
        done = len(self._even) == 3
        share = sum(self._even) / 3 if done else 0.0
        text = f"{len(action)} letters"
        return Observation(text, share, done, share == 1, self._even[-1])


class Split(Counting):
    """The same with a split to hold out."""

    splits = ("train", "other")


class Marching(Odd):
    """Is done after four actions, whatever they are, and says after each how far it is."""

    def reset(self, task: str, seed: int) -> Observation:
        self._steps = 0
        return Observation(f"{task}: march", 0.0, False, False, True, progress=0.0)

    def step(self, action: str) -> Observation:
        self._steps += 1
        done = self._steps == 4
        share = self._steps / 4
        return Observation(f"step {self._steps}", float(done), done, done, True, progress=share)


class Listing(Marching):
    """Marching that lists what could be done, and has an expert."""

    def reset(self, task: str, seed: int) -> Observation:
        first = super().reset(task, seed)
        return dataclasses.replace(first, admissible=("left", "march", "right"))

    def step(self, action: str) -> Observation:
        after = super().step(action)
        return dataclasses.replace(after, admissible=("left", "march", "right"))

    def expert(self) -> str:
        return "march"


class Slow(Odd):
    """Takes 30 ms for a step."""

    def step(self, action: str) -> Observation:
        time.sleep(0.03)
        return super().step(action)


class Parts(Counting):
    """A split for every part of a run; won if the second action has an even number of letters."""

    splits = ("train", "valid", "explore", "heldout")

    def tasks(self, split: str) -> list[str]:
        return [f"{split}_{i}" for i in range(8)]

    def step(self, action: str) -> Observation:
        self._even.append(len(action) % 2 == 0)
        done = len(self._even) == 2
        won = done and self._even[-1]
        return Observation(f"{len(action)} letters", float(won), done, won, len(action) < 9)

    def expert(self) -> str:
        return "even"
