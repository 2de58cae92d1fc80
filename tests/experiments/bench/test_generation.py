"""What is timed is the engine's own reading: it finds nothing of the prompts in its caches."""

import numpy as np
import pytest

from experiments.bench import generation
from tests import programs, tiny


def test_prompts_that_the_caches_hold_are_not_timed():
    config = tiny.tiny_config()
    engine = generation.make_engine(config, tiny.random_params(config))
    warm, prompts = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16, 64))
    generation.measure(engine, warm)
    generation.measure(engine, prompts)
    with pytest.raises(AssertionError, match="caches held"):
        generation.measure(engine, prompts)


def test_the_subject_runs_to_its_result(tmp_path):
    said = programs.succeed("bench", "generation", f"--policy={tiny.tiny_policy(tmp_path / 'p')}")
    assert "RESULT decode_tokens_per_second=" in said.splitlines()[-1]
