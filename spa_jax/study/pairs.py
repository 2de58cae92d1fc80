"""Finished runs against each other, game by game: which policy won what the other lost.

A run is compared by one of its evaluations.  An episode of one is paired with that of the same
(task, seed, attempt) in the other; the interval is a bootstrap's over games, whose attempts stay
together.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from spa_jax import evaluation, store
from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.study import statistics
from spa_jax.study.statistics import Difference, Estimate
from spa_jax.trajectory import Status, Trajectory

Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Compared:
    """A run against the first.

    Attributes:
      name: what was named on the command line.
      success: its share of the games that both played.
      reference: the first run's of the same games.
      difference: its paired difference from the first run.
      only_here: episodes that the first run has not played.
      missing: episodes that the first run has, and this has not.
    """

    name: str
    success: float
    reference: float
    difference: Difference
    only_here: int
    missing: int


def compare(runs: Sequence[str], name: str) -> list[Compared]:
    """Every run but the first against the first.

    Args:
      runs: workdirs, or folders of episodes; two at least.
      name: of the evaluation of a workdir.

    Raises:
      UserError: there are fewer, one has not played, or no game was played by both.
    """
    if len(runs) < 2:
        raise UserError("name two runs at least: compare_runs A B compares B with A")
    first, *others = (_episodes(run, name) for run in runs)
    return [
        _compare(run, other, first, runs[0]) for run, other in zip(runs[1:], others, strict=True)
    ]


def _episodes(run: str, name: str) -> dict[Key, Trajectory]:
    """The episodes by key; those that the environment broke are left out."""
    folder = pathlib.Path(run)
    found = run_lib.at(folder).evaluation(name) / run_lib.EPISODES
    path = folder / run_lib.EPISODES if (folder / run_lib.EPISODES).exists() else found
    if not path.exists():
        evaluations = run_lib.at(folder).evaluations
        there = sorted(p.name for p in evaluations.iterdir()) if evaluations.is_dir() else []
        raise UserError(
            f"{run}: has no evaluation {name!r}"
            + (f"; --evaluation can be {', '.join(there)}" if there else " and no other")
        )
    return {t.key: t for t in store.read(path) if t.status is not Status.ENV_ERROR}


def _compare(
    name: str, here: dict[Key, Trajectory], first: dict[Key, Trajectory], reference: str
) -> Compared:
    both = sorted(here.keys() & first.keys())
    if not both:
        raise UserError(f"{name} and {reference} played no game in common, so nothing is paired")
    pairs = evaluation.paired((first[key] for key in both), (here[key] for key in both))
    assert pairs is not None
    estimate = _by_game(
        (key[0], float(here[key].success) - float(first[key].success)) for key in both
    )
    return Compared(
        name,
        success=float(np.mean([here[key].success for key in both])),
        reference=float(np.mean([first[key].success for key in both])),
        difference=Difference(estimate, pairs),
        only_here=len(here.keys() - first.keys()),
        missing=len(first.keys() - here.keys()),
    )


def _by_game(differences: Iterable[tuple[str, float]]) -> Estimate:
    """The mean over games of the mean over a game's episodes."""
    of_game = collections.defaultdict(list)
    for game, value in differences:
        of_game[game].append(value)
    means = np.array([np.mean(values) for values in of_game.values()])
    return statistics.hierarchical([means])


def table(found: Sequence[Compared]) -> str:
    """The comparisons, for a terminal."""
    cells = [["run", "pairs", "first", "here", "difference", "gained", "lost", "p", "could see"]]
    for one in found:
        estimate, pairs = one.difference.estimate, one.difference.pairs
        count = pairs.both + pairs.neither + pairs.only_first + pairs.only_second
        cells.append(
            [
                one.name,
                str(count),
                f"{one.reference:.1%}",
                f"{one.success:.1%}",
                f"{estimate.value:+.1%} [{estimate.low:+.1%}, {estimate.high:+.1%}]",
                str(pairs.only_second),
                str(pairs.only_first),
                f"{pairs.p_value:.2g}",
                f"{estimate.could_see:.1%}" if np.isfinite(estimate.could_see) else "-",
            ]
        )
    return evaluation.markdown(cells)
