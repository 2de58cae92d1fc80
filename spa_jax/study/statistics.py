"""What outcomes of several seeds on the same games say: rates, paired differences, intervals.

Everything here is a pure function of outcomes: an array a seed, with a number a game.  An outcome
is 1 (won), 0 (lost) or nan (the environment broke the game, which is nobody's outcome).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from spa_jax.evaluation import Paired

DRAWS = 10_000  # of a bootstrap: the ends of an interval are then good to a fiftieth of its width
# A true difference of this many standard errors is found (two-sided 5%) four times out of five:
# the 97.5% and 80% points of the normal distribution, 1.96 + 0.84.
SEEN = 2.8


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and games, and how well it is known.

    Attributes:
      value: the mean over seeds of each seed's mean over its games; nan without a game.
      low: the lower end of the 95% interval.
      high: the upper end.
      error: the standard error.
      seeds: how many seeds there are.
      games: how many (seed, game) there are.
    """

    value: float
    low: float
    high: float
    error: float
    seeds: int
    games: int

    @property
    def could_see(self) -> float:
        """The least true value that would be told from 0 four times out of five: 2.8 errors.

        nan where all outcomes are the same, which says nothing about their spread.
        """
        return SEEN * self.error if self.error > 0 else math.nan

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against another, seed by seed and game by game.

    Attributes:
      estimate: of the difference of the shares won, arm less reference.
      pairs: who won which (seed, game); the reference is the first of the two.
    """

    estimate: Estimate
    pairs: Paired

    def to_dict(self) -> dict[str, float | int]:
        """The figures as `study.json` has them."""
        found = self.estimate.to_dict()
        return {
            "difference": found.pop("value"),
            **found,
            "could_see": self.estimate.could_see,
            "gained": self.pairs.only_second,
            "lost": self.pairs.only_first,
            "p": self.pairs.p_value,
        }


def hierarchical(outcomes: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean, with the interval of a hierarchical bootstrap over seeds, then games.

        mean = 1/S sum_s m_s        m_s = mean over the games of seed s

    A draw takes S seeds with replacement, and of each seed drawn as many games as it has, with
    replacement again; its value is the mean of these games' means.  The interval is from the 2.5%
    to the 97.5% point of the draws, the error their standard deviation.  Source: Davison and
    Hinkley 1997, section 3.8; for agents, Agarwal et al. 2021 (arXiv 2108.13264) resample runs.

    The variance of seed means holds the games' share already, so resampling games as well makes
    the interval somewhat wide for many seeds; for few seeds this makes up for what a bootstrap of
    few units lacks, and one seed still has an interval, which is of its games alone.

    Args:
      outcomes: S arrays [G_s]; they need not be of one length.  nan is left out, and so is a seed
        without a game.
      draws: of the bootstrap.
      seed: of the draws: the same outcomes have the same interval.

    Returns:
      The estimate; all nan without a game.
    """
    kept = [values[~np.isnan(values)] for values in map(np.asarray, outcomes)]
    kept = [np.asarray(values, np.float64) for values in kept if len(values)]
    if not kept:
        return Estimate(math.nan, math.nan, math.nan, math.nan, seeds=0, games=0)
    rng = np.random.default_rng(seed)
    # Games of a seed that had the same outcome are one cell: a draw of games is a multinomial.
    levels = np.unique(np.concatenate(kept))
    shares = np.array([[np.mean(values == level) for level in levels] for values in kept])
    sizes = np.array([len(values) for values in kept])
    chosen = rng.integers(len(kept), size=(draws, len(kept)))
    counts = rng.multinomial(sizes[chosen], shares[chosen])
    means = (counts @ levels / sizes[chosen]).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(
        value=float(np.mean([values.mean() for values in kept])),
        low=float(low),
        high=float(high),
        error=float(means.std()),
        seeds=len(kept),
        games=int(sizes.sum()),
    )


def difference(
    arm: Sequence[np.ndarray], reference: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """The paired difference of two arms, and the exact McNemar test over all pairs.

    The test counts (seed, game) in which one of the two alone won, as if all were independent;
    games of one seed share their training run, so believe the interval where the two disagree.

    Args:
      arm: S arrays [G], the outcomes of a seed each.
      reference: those of the other arm, for the same seeds and games.
      draws: of the bootstrap.
      seed: of the draws.

    Raises:
      ValueError: the two differ in seeds or games.
    """
    pairs = list(zip(map(np.asarray, arm), map(np.asarray, reference), strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        raise ValueError("the arms differ in their number of games")
    estimate = hierarchical([one - other for one, other in pairs], draws=draws, seed=seed)
    ones = np.concatenate([np.empty(0), *(one for one, _ in pairs)])
    others = np.concatenate([np.empty(0), *(other for _, other in pairs)])
    there = ~np.isnan(ones - others)
    won, other_won = ones[there] == 1, others[there] == 1
    return Difference(
        estimate,
        Paired(
            both=int(np.sum(won & other_won)),
            only_first=int(np.sum(~won & other_won)),
            only_second=int(np.sum(won & ~other_won)),
            neither=int(np.sum(~won & ~other_won)),
        ),
    )
