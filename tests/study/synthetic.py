"""Studies whose runs are written and not run."""

import pathlib
from typing import Any

from spa_jax import files
from spa_jax.stage_config import MethodConfig, PpoConfig
from spa_jax.study import arms, plan, workdir
from spa_jax.study.plan import Study
from tests import runs

GAMES = [f"game_{i}" for i in range(10)]


def study(root: pathlib.Path, *names: str, **options: Any) -> Study:
    """A study of two seeds with a base that is given, in root/W."""
    (root / "base").mkdir(exist_ok=True)
    (root / "base" / "model.safetensors").write_bytes(b"weights")
    (root / "base" / "config.json").write_text("{}")
    preset = runs.make(
        root / "W", method=MethodConfig(base=str(root / "base")), ppo=PpoConfig(critic="ridge")
    )
    chosen = tuple(arms.choose(names, preset.settings))
    return Study(preset, chosen, (0, 1), **options)


def leave(
    study: Study,
    folder: str,
    seed: int,
    won: int,
    *,
    at: pathlib.Path | None = None,
    **more: Any,
) -> None:
    """Writes the result of a run that won so many of the games.

    Args:
      study: the study.
      folder: of the arm.
      seed: of the run.
      won: games.
      at: the file; None: the run's.
      **more: fields with other values.
    """
    arm = folder not in workdir.ARMS_OF_ALL
    run = study.run(study.arm(folder), seed) if arm else study.start(seed)
    outcome = {"won": GAMES[:won], "lost": GAMES[won:]}
    points = [
        {
            "round": number,
            "episodes": 64 * number,
            "tokens": 1000 * number,
            "seconds": 10.0 * number,
            "estimator_seconds": 1.0 * number,
            **outcome,
        }
        for number in range(2 if arm else 1)
    ]
    result = {
        **outcome,
        "grounding": 0.9,
        "steps": 8.0,
        "curve": points,
        "credit": None,
        "wall_s": 20.0,
        "machine": {"processor": "p", "cores": 1, "memory_gib": 1, "devices": 1, "device": "cpu"},
        "made_from": plan.made_from(study, run),
    }
    files.write_json(at or workdir.result(run.workdir), result | more)
