"""Several attempts at each game: success and pass@k, with intervals over games and attempts.

Arrays in, numbers out.  A game's attempts have the game in common, so an interval that took them
for independent games would be too narrow.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spa_jax.trajectory import Status, Trajectory

DRAWS = 2000  # of the bootstrap
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of games, with its 95% interval."""

    rate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Attempts:
    """What K attempts at each of N games say.

    Attributes:
      games: N, those with an attempt that the environment did not break.
      attempts: K, the most attempts at a game.
      pass_at_k: k -> the share of games that k attempts win at least once; k is 1, 2, 4, ..., K,
        as far as every game has k attempts.
    """

    games: int
    attempts: int
    pass_at_k: dict[int, Share]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "games": self.games,
            "attempts": self.attempts,
            "pass_at_k": {str(k): share.to_dict() for k, share in self.pass_at_k.items()},
        }

    def lines(self) -> list[str]:
        """For a terminal: a line for each k."""
        return [
            f"  pass@{k}: {100 * share.rate:.1f}% ({100 * share.low:.1f} - {100 * share.high:.1f}%)"
            for k, share in self.pass_at_k.items()
        ]


def summarize(trajectories: Iterable[Trajectory], *, draws: int = DRAWS) -> Attempts | None:
    """What the attempts say; None without an episode that the environment did not break.

    The intervals are percentiles of a bootstrap that draws games with replacement, and then of each
    game's attempts as many with replacement: what another set of games and other tokens would give.

    Args:
      trajectories: episodes; those of one task and seed are attempts at one game.
      draws: of the bootstrap.
    """
    won: dict[tuple[str, int], list[bool]] = {}
    for t in trajectories:
        if t.status is not Status.ENV_ERROR:
            won.setdefault((t.task, t.seed), []).append(t.success)
    if not won:
        return None
    games = [won[key] for key in sorted(won)]
    tries = np.array([len(game) for game in games])
    wins = np.array([sum(game) for game in games])
    generator = np.random.default_rng(_SEED)
    drawn = generator.integers(len(games), size=(draws, len(games)))
    again = generator.binomial(tries[drawn], (wins / tries)[drawn])
    found = {}
    for k in _ks(int(tries.min())):
        means = pass_at_k(tries[drawn], again, k).mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        found[k] = Share(float(pass_at_k(tries, wins, k).mean()), float(low), float(high))
    return Attempts(len(games), int(tries.max()), found)


def pass_at_k(
    tries: Sequence[int] | np.ndarray, wins: Sequence[int] | np.ndarray, k: int
) -> np.ndarray:
    """The chance that k of a game's attempts, drawn without replacement, have a win among them.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)

    Source: Chen et al., arXiv 2107.03374, equation 1: unbiased, unlike 1 - (1 - c / n)^k.

    Args:
      tries: [...] n, attempts at each game; at least k.
      wins: [...] c, how many of them won.
      k: how many are drawn.

    Returns:
      [...] float64, in [0, 1].

    Raises:
      ValueError: a game has fewer than k attempts.
    """
    n, c = np.broadcast_arrays(np.asarray(tries), np.asarray(wins))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} of {int(n.min())} attempts")
    most = int(n.max())
    i = np.arange(1, most + 1)
    counted = (i > (n - c)[..., None]) & (i <= n[..., None])
    return 1.0 - np.prod(np.where(counted, np.maximum(1.0 - k / i, 0.0), 1.0), axis=-1)


def _ks(most: int) -> list[int]:
    """1, 2, 4, ... and the most itself."""
    powers = [2**p for p in range(most.bit_length()) if 2**p <= most]
    return sorted({*powers, most})
