"""Stage 6: a policy plays held-out games once each, and how well is written down.

Writes W/eval/NAME/{trajectories.jsonl,summary.json}.  Run again, it plays what is missing.
"""

import dataclasses
from collections.abc import Mapping

from spa_jax import files, play
from spa_jax.config import SamplingConfig
from spa_jax.evaluation import Summary
from spa_jax.play import Recording
from spa_jax.run import Run
from spa_jax.stage_config import ExploreConfig


def run(run: Run, name: str, *, policy: str, games: int | None = None) -> Summary:
    """Plays the run's held-out games at --eval_temperature.

    Args:
      run: the run.
      name: below W/eval.
      policy: who plays.
      games: so many of them, the first; None: as --heldout_games says.
    """
    method, data, sampling = run.settings.method, run.settings.data, run.settings.sampling
    return play_games(
        run,
        name,
        policy=policy,
        games=ExploreConfig(
            split=data.heldout_split, games=data.heldout_games if games is None else games
        ),
        sampling=dataclasses.replace(sampling, temperature=method.eval_temperature),
        flags={
            "split": "heldout_split",
            "games": "heldout_games",
            "temperature": "eval_temperature",
        },
    )


def play_games(
    run: Run,
    name: str,
    *,
    policy: str,
    games: ExploreConfig,
    sampling: SamplingConfig,
    flags: Mapping[str, str] | None = None,
) -> Summary:
    """Plays one episode of each chosen game, and writes the summary.

    Args:
      run: the run.
      name: below W/eval.
      policy: who plays.
      games: which games.
      sampling: how the policy writes.
      flags: the flags that set these, see `play.Recording`.
    """
    folder = run.evaluation(name)
    played = play.record(
        run,
        Recording(
            stage="evaluate",
            folder=folder,
            policy=policy,
            games=dataclasses.replace(games, rollouts=1),
            sampling=sampling,
            title=f"evaluate {name}",
            flags=flags or {},
        ),
    )
    summary = played.summary()
    files.write_json(folder / "summary.json", summary.to_dict())
    return summary
