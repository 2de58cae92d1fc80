"""Branches: the environment is played again exactly, the policy goes on from what was recorded."""

import dataclasses
import json
import os

import numpy as np
import pytest

from spa_jax import branching, continuations, play, policy, replay, rollout, store, truth
from spa_jax.config import EnvConfig, RowsConfig, SamplingConfig
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.report.page import write_report
from spa_jax.run import Run
from spa_jax.stage_config import CreditConfig, ExploreConfig, MethodConfig, ProgressConfig
from spa_jax.stages import annotate, evaluate, explore, train_progress
from tests import programs, runs, tiny

BRANCHES, EPISODES = 12, 4
ASKED = {"split": "heldout", "episodes": EPISODES, "branches": BRANCHES}


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The server that a run starts finds the environments of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{programs.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def _run(workdir, base, env: str = "Forks") -> Run:
    return runs.make(
        workdir,
        method=MethodConfig(base=str(base)),
        env=EnvConfig(env="custom", custom_data=f"tests.envs.forks:{env}", max_steps=4),
        sampling=SamplingConfig(slots=1, max_new_tokens=8, context_length=512),
        rows=RowsConfig(row_length=512, policy_slots=128, step_slots=16, rows_per_device=1),
    )


@pytest.fixture(scope="module")
def judged(base, tmp_path_factory) -> tuple[Run, branching.Judged]:
    run = _run(tmp_path_factory.mktemp("judged"), base)
    return run, branching.run(run, **ASKED)


def _played(run: Run):
    return store.read(run.evaluation("sft") / "trajectories.jsonl")


def test_advantages_are_what_the_branches_say(judged):
    run, found = judged
    episodes = {t.key: t for t in _played(run)}
    assert len(episodes) == 6 and len(found.told) == EPISODES
    branches = truth.read_branches(run.branches)
    starts, opened, shut = [], [], []
    for key, steps in found.told.items():
        t = episodes[key]
        rewards = [
            [b.final_reward for b in branches if b.key[:4] == (*key, k)]
            for k in range(len(t.steps))
        ]
        assert [len(r) for r in rewards] == [BRANCHES] * len(steps)
        value = [*(sum(r) / BRANCHES for r in rewards), t.final_reward]
        said = [*(s.observation for s in t.steps[1:]), t.final_observation]
        for k, step in enumerate(steps):
            assert step.value == pytest.approx(value[k])
            assert step.advantage == pytest.approx(value[k + 1] - value[k])
            (opened if "it opens" in said[k] else shut).append(step.advantage)
            if k == 2 and "it is shut" in said[0] and "it is shut" in said[1]:
                # One door is left, and two must open: no branch wins, whatever it writes.
                assert step.value == step.advantage == step.advantage_error == 0
        assert sum(s.advantage for s in steps) == pytest.approx(t.final_reward - value[0])
        starts += rewards[0]
    assert 0.2 < np.mean(starts) < 0.8  # two heads of three coins
    assert min(opened) > -0.3 and max(shut) < 0.3 and np.mean(opened) - np.mean(shut) > 0.3
    assert 0.3 < found.reliability < 1 and 0 <= found.decided_at_start < 1


def test_credits_are_judged_and_kept(judged, tmp_path):
    run, found = judged
    assert json.loads(run.credits.read_text())["credits"].keys() == found.figures.keys()
    # There is no estimator here, and the other placebos share what one gave.
    assert found.figures.keys() == {"ridge critic", "terminal", "true advantage"}
    critic, best = found.figures["ridge critic"], found.figures["true advantage"]
    assert critic["advantage_episodes"] == EPISODES
    assert -1 <= critic["advantage_correlation_low"] <= critic["advantage_correlation_high"] <= 1
    assert "advantage_correlation" not in best and critic["judged_episodes"] == 0
    assert "| ridge critic" in branching.table(found.figures)
    write_report(run.workdir, tmp_path / "report.html")


def test_a_branch_goes_on_from_the_recorded_context(judged, base):
    """A branch with the random numbers of its episode writes what the episode did."""
    run, _ = judged
    episodes = [t for t in _played(run) if len(t.steps) == 3][:2]
    jobs = [
        rollout.Job(Task(t.task, t.split, "", ""), t.seed, t.attempt, prefix=replay.cut(t, k))
        for t in episodes
        for k in range(3)
    ]
    player, again = policy.load(str(base)), []
    env, sampling = run.settings.env, run.settings.sampling
    with play.open_env(env, 2, run.truth / "server.log") as client:
        playing = rollout.Rollout(
            play.make_engine(player, sampling, 2, seed=0),
            player.chat,
            client,
            player=play.make_player(env, player),
            on_done=again.append,
        )
        playing.play(jobs)
    assert len(again) == 6
    for t in again:
        (own,) = [e for e in episodes if e.key == t.key]
        assert t.log_probs == pytest.approx(own.log_probs, abs=1e-4)
        assert dataclasses.replace(t, log_probs=own.log_probs) == own


def test_what_is_there_is_not_played_again(judged):
    run, _ = judged
    before = run.branches.read_bytes()
    assert len(branching.run(run, **ASKED | {"episodes": 2}).told) == 2
    assert run.branches.read_bytes() == before
    more = branching.run(run, **ASKED | {"branches": BRANCHES + 1})
    assert len(more.told) == EPISODES
    added = run.branches.read_bytes()[len(before) :].splitlines()
    assert run.branches.read_bytes().startswith(before)
    assert {json.loads(line)["branch"] for line in added} == {BRANCHES}


def test_other_settings_are_refused(judged):
    run, _ = judged
    deeper = dataclasses.replace(run.settings.env, give_up_after=2)
    other = dataclasses.replace(run, settings=dataclasses.replace(run.settings, env=deeper))
    with pytest.raises(UserError, match="--give_up_after was 0, is 2.*--redo=evaluate:sft"):
        branching.run(other, **ASKED)
    with pytest.raises(UserError, match="--split was heldout, is other.*--redo=truth"):
        branching.run(run, **ASKED | {"split": "other"})
    assert len(store.read(run.evaluation("sft_other") / "trajectories.jsonl")) == 6
    greedy = dataclasses.replace(run.settings.method, eval_temperature=0.0)
    other = dataclasses.replace(run, settings=dataclasses.replace(run.settings, method=greedy))
    with pytest.raises(UserError, match="--eval_temperature=0: a greedy policy"):
        branching.run(other, **ASKED)
    with pytest.raises(UserError, match="--branches=1 must be at least 2"):
        branching.run(run, **ASKED | {"branches": 1})


def test_an_environment_that_is_another_one_each_time_is_refused(base, tmp_path, monkeypatch):
    run = _run(tmp_path, base, "Moody")
    evaluate.run(run, "sft", policy=str(base))
    monkeypatch.setenv("MOOD", "1")
    said = (
        r"task 'heldout_\d' \(seed 0\): the environment is not deterministic: the same actions "
        r"played again, after step 2 of 2 it says 'the door is gone'"
    )
    with pytest.raises(UserError, match=said):
        branching.run(run, **ASKED)


def test_branches_are_a_credit_too(base, tmp_path):
    run = _run(tmp_path, base)
    settings = dataclasses.replace(
        run.settings,
        explore=ExploreConfig(split="heldout", rollouts=1),
        progress=ProgressConfig(epochs=1, width=8),
        credit=CreditConfig(credit="branching", branches=3, beta=0.0),
    )
    run = dataclasses.replace(run, settings=settings)
    explore.run(run, 0)
    train_progress.run(run, 0)
    found = annotate.run(run, 0)
    branches = truth.read_branches(run.round(0).branches)
    assert len(branches) == 3 * sum(len(t.steps) for t in found)
    for t in found:
        value = [
            np.mean([b.final_reward for b in branches if b.key[:4] == (*t.key, step)])
            for step in range(len(t.steps))
        ]
        rises = np.diff([*value, t.final_reward])
        np.testing.assert_allclose([step.reward for step in t.steps], rises, atol=1e-6)
    assert any(step.reward for t in found for step in t.steps)
    before = run.round(0).branches.read_bytes()
    run.round(0).annotated.unlink()
    assert annotate.run(run, 0) == found and run.round(0).branches.read_bytes() == before


def test_the_number_of_a_branch_says_where_it_leaves_which_episode():
    numbers = set()
    for attempt in (0, 1, 7):
        for step in (0, 1, 40):
            for branch in (0, 15):
                number = continuations._attempt(attempt, step, branch)
                job = rollout.Job(Task("t", "train", "", ""), 3, number)
                assert continuations._leaves(job) == ("t", 3, attempt, step, branch)
                numbers.add(number)
    assert len(numbers) == 18 and min(numbers) > 100  # no rollout from the start has it
