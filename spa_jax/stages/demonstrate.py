"""Stage 0: what the base is cloned from: the expert's episodes, or those of a log.

Writes W/demos/{train,valid}/trajectories.jsonl.
"""

from spa_jax import importers, play, provenance, store
from spa_jax import run as run_lib
from spa_jax.play import Recording
from spa_jax.policy import EXPERT
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.stage_config import ExploreConfig
from spa_jax.trajectory import Trajectory


def run(run: Run) -> None:
    """Records the demonstrations.

    Nothing if --base gives the base, or if the base is made and its demonstrations were removed.
    """
    method, data = run.settings.method, run.settings.data
    if method.base or distributed.broadcast("demonstrations", lambda: _served(run)):
        return
    if method.demonstrations:
        import_log(run, method.demonstrations)
        return
    chosen = {
        "train": ("demo", data.demo_split, data.demo_games),
        "valid": ("demo_valid", data.demo_valid_split, data.demo_valid_games),
    }
    for part, (flag, split, games) in chosen.items():
        play.record(
            run,
            Recording(
                stage="demos",
                folder=run.demonstrations(part).parent,
                policy=EXPERT,
                games=ExploreConfig(rollouts=1, split=split, games=games),
                sampling=run.settings.sampling,
                title=f"demos {part}",
                slips=data.demo_slips,
                flags={"split": f"{flag}_split", "games": f"{flag}_games"},
            ),
        )


def _served(run: Run) -> bool:
    return run_lib.done(run.sft).exists() and not run.demos.exists()


def import_log(
    run: Run, log: str, *, valid_share: float = importers.VALID_SHARE
) -> dict[str, list[Trajectory]]:
    """Writes the solved episodes of a log; returns them by part.

    Args:
      run: the run.
      log: the file, as `importers.demonstrations` takes it.
      valid_share: of its tasks, held out.

    Raises:
      UserError: the file is no such log, or the demonstrations that are there are not its.
    """
    demos = importers.demonstrations(
        log, env=run.settings.env.env, seed=run.seed, valid_share=valid_share
    )
    for part in demos:
        folder = run.demonstrations(part).parent
        digest = provenance.file_digest(log)
        provenance.check_stage(run, "demos", folder, inputs={"log's records": digest})

    def write() -> None:
        for part, episodes in demos.items():
            store.write(run.demonstrations(part), episodes)

    distributed.first_alone("demonstrations", write)
    return demos
