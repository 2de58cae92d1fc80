"""What the programs load when they start."""

import json
import subprocess
import sys

from tests import programs

_TRAINER = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch"}
_GAMES = {"textworld", "alfworld", "fast_downward", "jericho"}


def _loaded(*modules: str) -> set[str]:
    code = (
        f"import sys, json\nfor name in {modules!r}: __import__(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=programs.ROOT, capture_output=True, check=True)
    return set(json.loads(done.stdout))


def test_a_server_loads_neither_the_trainer_nor_textworld():
    loaded = _loaded("experiments.serve_env")
    assert "absl" in loaded and not loaded & (_TRAINER | _GAMES)


def test_a_stage_needs_no_server_framework():
    loaded = _loaded("experiments.explore", "experiments.train_ppo")
    assert "jax" in loaded
    assert not loaded & {"fastapi", "uvicorn", "gguf", "torch"}
