"""The ten lines of Python: a policy plays a class of one's own, an estimator gives credit."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest

import spa_jax as spa
from spa_jax import provenance, store
from spa_jax.errors import UserError
from spa_jax.stage_config import MethodConfig, ProgressConfig
from spa_jax.stages import annotate, train_progress
from tests import programs, runs, tiny


@pytest.fixture(scope="module")
def guess(tmp_path_factory):
    """The class of docs/environments.md, as its reader would have it."""
    folder = tmp_path_factory.mktemp("guess")
    page = (programs.ROOT / "docs" / "environments.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    (folder / "guess_here.py").write_text(example[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("guess_here").Guess


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a base policy, an estimator of it and annotated episodes."""
    base = tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")
    run = runs.make(
        tmp_path_factory.mktemp("run"),
        method=MethodConfig(base=str(base)),
        progress=ProgressConfig(epochs=1, width=8),
    )
    episodes = [
        tiny.random_trajectory(
            np.random.default_rng(i), f"task_{i}", 0, context=8, final_reward=float(i % 2)
        )
        for i in range(8)
    ]
    store.write(run.round(0).episodes, episodes)
    train_progress.run(run, 0)
    annotate.run(run, 0)
    provenance.record_run(run, "run_spa", ["run_spa"])
    return run


@pytest.fixture(scope="module")
def episode(run, guess):
    policy = spa.load(run.settings.method.base, max_new_tokens=8, context_length=512)
    return policy.play(guess, "number_7", max_steps=3)


def test_a_policy_plays_a_class_in_this_process(episode, guess):
    t = episode.trajectory
    assert (t.task, t.split, t.env) == ("number_7", "train", "custom")
    assert t.instruction.startswith("Find a number from 1 to 100")
    assert t.steps[0].observation == "I think of a number." and len(t.steps) <= 3
    assert "number_7" in repr(episode)
    with pytest.raises(UserError, match="Guess has no task 'number_7' in 'valid'"):
        spa.load(t.policy, context_length=512).play(guess, "number_7", split="valid")
    with pytest.raises(UserError, match="give the class of the environment"):
        spa.load(t.policy, context_length=512).play(guess(), "number_7")


def test_an_estimator_gives_it_credit(episode, run):
    with pytest.raises(UserError, match="no credit yet"):
        episode.plot()
    given = spa.credit(episode, run.workdir)
    assert len(given.contributions) == len(episode.steps)
    assert np.isfinite(given.contributions).all() and np.any(given.contributions)
    assert given.trajectory.expected is not None
    assert spa.credit(episode, run.round(0).progress).contributions == given.contributions
    html = given._repr_html_()
    assert "I think of a number." in html and f"{given.contributions[0]:+.3f}" in html
    axes = given.plot()
    assert len(axes.patches) == len(given.steps)
    assert "no credit" not in episode._repr_html_()  # shown without


def test_credit_is_that_of_the_stage(run):
    """The same episode, annotated by the run's stage and by hand."""
    for t in store.read(run.round(0).annotated)[:2]:
        again = spa.credit(spa.Episode(t), run.workdir)
        expected = [step.contribution for step in t.steps]
        assert again.contributions == pytest.approx(expected, abs=2e-5)


def test_a_run_is_read_as_a_table(run, tmp_path):
    pytest.importorskip("pandas")
    table = spa.read(run.workdir)
    assert len(table) == 8 and set(table.played_by) == {"round_0"}
    assert table.success.mean() == 0.5 and table.predicted.notna().all()
    assert table.trajectory[0].key == (table.task[0], table.seed[0], table.attempt[0])
    with pytest.raises(UserError, match="holds no episode of a run"):
        spa.read(tmp_path)


def test_importing_the_package_imports_no_jax():
    code = "import sys, spa_jax; assert 'jax' not in sys.modules; spa_jax.load; import jax"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=programs.ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        spa.nothing  # noqa: B018
