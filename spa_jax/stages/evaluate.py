"""Stage 6: a policy plays held-out games, and how well is written down.

Writes W/eval/NAME/{trajectories.jsonl,summary.json}.  Run again, it plays what is missing.
"""

import dataclasses
from collections.abc import Mapping

from spa_jax import attempts, files, play
from spa_jax.config import SamplingConfig
from spa_jax.evaluation import Summary
from spa_jax.play import Recorded, Recording
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
            split=data.heldout_split,
            games=data.heldout_games if games is None else games,
            rollouts=1,
        ),
        sampling=dataclasses.replace(sampling, temperature=method.eval_temperature),
        flags={
            "split": "heldout_split",
            "games": "heldout_games",
            "temperature": "eval_temperature",
        },
    ).summary()


def play_games(
    run: Run,
    name: str,
    *,
    policy: str,
    games: ExploreConfig,
    sampling: SamplingConfig,
    flags: Mapping[str, str] | None = None,
) -> Recorded:
    """Plays the chosen games, each as often as `games.rollouts`, and writes the summary.

    With several episodes of a game summary.json holds pass@k too, as `attempts`.

    Args:
      run: the run.
      name: below W/eval.
      policy: who plays.
      games: which games, and how often each.
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
            games=games,
            sampling=sampling,
            title=f"evaluate {name}",
            flags=flags or {},
        ),
    )
    content = played.summary().to_dict()
    if games.rollouts > 1 and (found := attempts.summarize(played.episodes)):
        content["attempts"] = found.to_dict()
    files.write_json(folder / "summary.json", content)
    return played
