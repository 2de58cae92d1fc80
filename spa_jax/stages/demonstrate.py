"""Stage 0: what the base is cloned from: the expert's episodes, or those of a log.

Writes W/demos/{train,valid}/trajectories.jsonl.
"""

from spa_jax import importers, play, provenance, store
from spa_jax.play import Recording
from spa_jax.policy import EXPERT
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.stage_config import ExploreConfig


def run(run: Run) -> None:
    """Records the demonstrations; nothing if --base gives the base."""
    method, data = run.settings.method, run.settings.data
    if method.base:
        return
    if method.demonstrations:
        _import(run)
        return
    chosen = {
        "train": (data.demo_split, data.demo_games),
        "valid": (data.demo_valid_split, data.demo_valid_games),
    }
    for part, (split, games) in chosen.items():
        play.record(
            run,
            Recording(
                stage="demos",
                folder=run.demonstrations(part).parent,
                policy=EXPERT,
                games=ExploreConfig(rollouts=1, split=split, games=games),
                sampling=run.settings.sampling,
                title=f"demos {part}",
            ),
        )


def _import(run: Run) -> None:
    """Writes the solved episodes of the log at --demonstrations."""
    log, env = run.settings.method.demonstrations, run.settings.env.env
    provenance.check_stage(
        run, "demos", run.demos, inputs={"log's records": provenance.file_digest(log)}
    )

    def write() -> None:
        for part, episodes in importers.demonstrations(log, env=env, seed=run.seed).items():
            store.write(run.demonstrations(part), episodes)

    distributed.first_alone("demonstrations", write)
