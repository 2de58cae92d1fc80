"""Stage 2: the newest policy plays episodes of a split; each is recorded exactly once.

Appends to W/iteration_I/explore/trajectories.jsonl as episodes end.  Killed and run again, it
plays what is missing.  Of several processes each plays its own tasks, in its own environments,
and appends to trajectories.process_P.jsonl; in the end all are in one.
"""

import pathlib

from spa_jax import play
from spa_jax.play import Recorded, Recording
from spa_jax.policy import EXPERT
from spa_jax.run import Run


def run(run: Run, number: int, *, policy: str = "", out: pathlib.Path | None = None) -> Recorded:
    """Plays the games of a round.

    Args:
      run: the run.
      number: of the round.
      policy: who plays, or "expert"; "": the round's policy.
      out: the folder of the episodes; None: the round's.

    Returns:
      The episodes, and how many the environment failed.
    """
    policy = policy or str(run.newest_policy(number))
    return play.record(
        run,
        Recording(
            stage="demos" if policy == EXPERT else "explore",
            folder=out or run.round(number).explore,
            policy=policy,
            games=run.games_of(number),
            sampling=run.settings.sampling,
            title=f"explore {number}" if out is None else f"explore into {out}",
        ),
    )
