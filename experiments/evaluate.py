"""Stage 6: plays held-out games and says how well.

    python -m experiments.evaluate --workdir=W --alfworld_data=DIR --split=heldout
    python -m experiments.evaluate --env=alfworld --alfworld_data=DIR --split=valid_seen \\
        --policy=expert --max_steps=50 --workdir=W
    python -m experiments.evaluate --workdir=W --rollouts=8          (and pass@1, @2, @4, @8)

Writes W/eval/NAME/{trajectories.jsonl,summary.json}.  Run again, it plays what is missing.  With a
whole run's flagfile the games are the run's held-out ones, as run_spa plays them.
"""

import time
from typing import Any

from absl import flags

from experiments import flags as flags_lib
from experiments import stage
from spa_jax import attempts, evaluation
from spa_jax.config import ChatConfig, ComputeConfig, EnvConfig, SamplingConfig
from spa_jax.run import Run
from spa_jax.stage_config import ExploreConfig
from spa_jax.stages import evaluate


def main(run: Run) -> None:
    started, name = time.time(), flags.FLAGS.name
    settings = run.settings
    played = evaluate.play_games(
        run,
        name,
        policy=flags_lib.stage_policy() or str(run.base),
        games=_games(run),
        sampling=settings.sampling,
    )
    summary = played.summary()
    print(evaluation.table({name: summary}))
    for task_type, won in sorted(summary.by_task_type.items()):
        print(f"  {task_type or 'no type'}: {won.successes} of {won.games}")
    if found := attempts.summarize(played.episodes):
        if found.attempts > 1:  # the table's interval takes a game's attempts for so many games
            print(f"{found.attempts} attempts a game; intervals over games and attempts:")
            print("\n".join(found.lines()))
    print(
        f"RESULT success={summary.success_rate:.4f} grounding={summary.grounding:.4f} "
        f"games={summary.games} failed={summary.env_errors} left_out={summary.left_out} "
        f"seconds={time.time() - started:.1f}"
    )


def _games(run: Run) -> ExploreConfig:
    """The games that this program's flags name, and the run's held-out ones where they do not.

    In a whole run's flagfile --split, --games and --rollouts are exploration's, and so are not
    given here.
    """
    explore, data = run.settings.explore, run.settings.data

    def chosen(name: str, heldout: Any) -> Any:
        return getattr(explore, name) if flags_lib.given(name) else heldout

    return ExploreConfig(
        split=chosen("split", data.heldout_split),
        games=chosen("games", data.heldout_games),
        first_game=chosen("first_game", 0),
        rollouts=chosen("rollouts", 1),
    )


if __name__ == "__main__":
    flags.DEFINE_string("name", "policy", "Folder below W/eval to write.")
    reads = (EnvConfig, SamplingConfig, ExploreConfig, ChatConfig, ComputeConfig)
    stage.run("evaluate", main, reads=(*reads, "heldout_split", "heldout_games"), stage_policy=True)
