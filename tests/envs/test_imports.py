"""What environment servers, their clients and the stages must not load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_TRAINER = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch"}
_GAMES = {"textworld", "alfworld", "fast_downward", "jericho"}


def _loaded(*modules: str) -> set[str]:
    code = (
        f"import sys, json\nfor name in {modules!r}: __import__(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, cwd=_REPOSITORY)
    return set(json.loads(done.stdout))


def test_server_and_client_load_neither_the_trainer_nor_textworld() -> None:
    loaded = _loaded(
        "spa_jax.envs.protocol",
        "spa_jax.envs.client",
        "spa_jax.envs.server",
        "spa_jax.envs.worker",
        "spa_jax.envs.alfworld.prompt",
        "spa_jax.envs.alfworld.games",
        "spa_jax.envs.alfworld.expert",
        "spa_jax.envs.serve",
    )
    assert "fastapi" in loaded
    assert not loaded & (_TRAINER | _GAMES)


def test_a_client_needs_no_server_framework() -> None:
    assert not _loaded("spa_jax.envs.client") & {"fastapi", "uvicorn"}


def test_what_each_environment_process_imports_of_its_server_is_light() -> None:
    loaded = _loaded("spa_jax.envs.serve")
    assert not loaded & (_TRAINER | _GAMES | {"fastapi", "uvicorn", "absl", "experiments"})


def test_a_stage_needs_no_server_framework() -> None:
    loaded = _loaded("spa_jax.stages.explore", "spa_jax.stages.train_ppo")
    assert "jax" in loaded
    assert not loaded & {"fastapi", "uvicorn", "gguf", "torch"}


@pytest.mark.parametrize("module", ["generate", "preload"])
def test_the_engine_side_does_not_load_the_trainer(module: str) -> None:
    loaded = _loaded(f"spa_jax.envs.alfworld.{module}")
    assert "textworld" in loaded
    assert not loaded & _TRAINER
