"""A number is guessed: the environment of docs/environments.md, which the tour plays."""

import math
import random
from collections.abc import Sequence

from spa_jax.envs.protocol import Observation

_MOST = 100


class Guess:
    """An environment of one's own (see `custom`) that says how much of its task is done."""

    instruction = 'Find a number from 1 to 100. Answer with one line such as "Action: guess 50".'
    splits = ("train", "valid", "explore", "heldout")

    def tasks(self, split: str) -> Sequence[str]:
        """Names of the tasks of a split; no split has a task of another."""
        first = 400 * self.splits.index(split)
        return [f"number_{i}" for i in range(first, first + 400)]

    def reset(self, task: str, seed: int) -> Observation:
        """Starts a task; its name alone says which number it is."""
        del seed
        self._low, self._high = 1, _MOST
        self._number = random.Random(task).randint(1, _MOST)
        return self._answer("I think of a number.")

    def step(self, action: str) -> Observation:
        """Plays "guess N"."""
        word, _, number = action.partition(" ")
        if word != "guess" or not number.isdecimal() or not 0 < int(number) <= _MOST:
            return self._answer("Nothing happens.", grounded=False)
        guess = int(number)
        if guess == self._number:
            self._low = self._high = guess
            return self._answer("That is it!", won=True)
        if guess < self._number:
            self._low = max(self._low, guess + 1)
            return self._answer("More.")
        self._high = min(self._high, guess - 1)
        return self._answer("Less.")

    def expert(self) -> str:
        """The middle of what it can still be."""
        return f"guess {(self._low + self._high) // 2}"

    def _answer(self, text: str, *, grounded: bool = True, won: bool = False) -> Observation:
        """An observation; progress is the share of the bits of the number that are known."""
        left = math.log(self._high - self._low + 1) / math.log(_MOST)
        progress = 1.0 if won else min(1.0 - left, 0.99)
        return Observation(text, float(won), won, won, grounded, progress=progress)
