"""Every credit of its own, through the stages that make it: estimator, annotation."""

import dataclasses

import numpy as np
import pytest

from spa_jax import store
from spa_jax.errors import UserError
from spa_jax.stage_config import CreditConfig, ProgressConfig
from spa_jax.stages import annotate, train_progress
from tests import runs, tiny

PROGRESS = ((0.0, 0.5, 0.5, 1.0), (0.0, 0.0, 0.25, 0.25), (0.5, 0.0, 0.5, 0.75))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def played(tasks=4, attempts=3):
    """Episodes of three steps: a third of them won; of each, what was done after every step."""
    episodes = []
    for i in range(tasks * attempts):
        t = tiny.random_trajectory(
            np.random.default_rng(i), f"task_{i // attempts}", i % attempts, context=8,
            final_reward=float(i % attempts == 0),
        )
        first, *after = PROGRESS[i % attempts]
        steps = tuple(
            dataclasses.replace(s, progress=p, contribution=None, reward=None)
            for s, p in zip(t.steps, after, strict=True)
        )
        episodes.append(dataclasses.replace(t, steps=steps, initial_progress=first))
    return episodes


def annotated(folder, policy, episodes, credit, **settings):
    """The episodes as a round annotates them."""
    run = runs.make(
        folder,
        progress=ProgressConfig(epochs=1, width=8),
        credit=CreditConfig(credit=credit, beta=0.0, **settings),
    )
    store.write(run.round(0).episodes, episodes)
    train_progress.run(run, 0, trunk=str(policy))
    return annotate.run(run, 0, base=str(policy))


def rewards(episodes):
    return np.array([[s.reward for s in t.steps] for t in episodes])


def test_subgoal_credit_is_what_the_environment_said(policy, tmp_path):
    episodes = played()
    found = annotated(tmp_path, policy, episodes, "subgoal")
    np.testing.assert_allclose(
        rewards(found[:3]), [[0.5, 0, 0.5], [0, 0.25, 0], [-0.5, 0.5, 0.25]], atol=1e-6
    )
    assert all(s.contribution is not None for t in found for s in t.steps)  # the estimator's
    whole = annotated(tmp_path / "whole", policy, episodes, "subgoal", credit_residual=True)
    np.testing.assert_allclose(rewards(whole).sum(1), [t.final_reward for t in whole], atol=1e-6)


def test_subgoal_credit_needs_progress(policy, tmp_path):
    episodes = played()
    episodes[4] = dataclasses.replace(episodes[4], initial_progress=None)
    with pytest.raises(UserError, match="--credit=subgoal.*task_1.*has no progress"):
        annotated(tmp_path, policy, episodes, "subgoal")


def test_a_process_models_credit_adds_up_to_the_rise_of_its_value(policy, tmp_path):
    found = rewards(annotated(tmp_path, policy, played(), "prm4a"))
    assert np.isfinite(found).all() and np.abs(found).max() > 1e-3
    whole = annotated(tmp_path / "whole", policy, played(), "prm4a", credit_residual=True)
    np.testing.assert_allclose(rewards(whole).sum(1), [t.final_reward for t in whole], atol=1e-5)
    np.testing.assert_allclose(rewards(whole)[:, :2], found[:, :2], atol=1e-5)
    with pytest.raises(UserError, match="--credit=prm4a.*one task only.*another --credit"):
        annotated(tmp_path / "one", policy, played(tasks=1), "prm4a")
