"""Steps are judged by branches: played from the recorded context, exactly once, and kept."""

import json
import re

import numpy as np
import pytest

from spa_jax import store, truth
from spa_jax.report.page import write_report
from spa_jax.run import Run
from tests import programs, runs, tiny

BRANCHES, EPISODES = 12, 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    policy = tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")
    return (
        "--env=custom",
        "--custom_data=tests.envs.forks:Forks",
        f"--base={policy}",
        "--slots=4",
        "--max_steps=4",
        "--max_new_tokens=8",
        "--context_length=512",
        "--row_length=512",
        "--policy_slots=128",
    )


def _command(run: Run, *flags: str) -> tuple[str, ...]:
    sizes = (f"--episodes={EPISODES}", f"--branches={BRANCHES}", "--split=heldout")
    return ("judge_credit", f"--workdir={run.workdir}", *sizes, *flags)


def _played(run: Run):
    return store.read(run.evaluation("sft") / "trajectories.jsonl")


@pytest.fixture(scope="module")
def judged(flags, tmp_path_factory) -> tuple[Run, str]:
    run = runs.make(tmp_path_factory.mktemp("judged"))
    return run, programs.succeed(*_command(run, *flags))


def test_advantages_are_what_the_branches_say(judged):
    run, out = judged
    episodes = {t.key: t for t in _played(run)}
    assert len(episodes) == 6  # of which EPISODES were chosen
    found = truth.read_branches(run.branches)
    told = json.loads(run.advantages.read_text())
    assert len(told["truth"]) == EPISODES and told["evaluation"] == "sft"
    first, lost = [], 0
    for entry in told["truth"]:
        t = episodes[entry["task"], entry["seed"], entry["attempt"]]
        rewards = np.array(
            [
                [b.final_reward for b in found if b.key[:4] == (*t.key, k)]
                for k in range(len(t.steps))
            ]
        )
        assert rewards.shape == (len(t.steps), BRANCHES) and set(rewards.flat) <= {0.0, 1.0}
        value = [*rewards.mean(1), t.final_reward]
        for k, step in enumerate(entry["steps"]):
            assert step["value"] == pytest.approx(value[k])
            assert step["advantage"] == pytest.approx(value[k + 1] - value[k])
            # Two doors are shut, and one is left: no branch can win, whatever it writes.
            if t.progress[k] == 0 and k == 2:
                lost += 1
                assert step["value"] == step["advantage"] == step["advantage_error"] == 0
        total = sum(step["advantage"] for step in entry["steps"])
        assert total == pytest.approx(t.final_reward - entry["steps"][0]["value"])
        first += rewards[0].tolist()
    assert 0.2 < np.mean(first) < 0.8  # two of three coins
    assert f"RESULT episodes={EPISODES} steps=" in out


def test_credits_are_judged_by_both_truths(judged):
    run, out = judged
    figures = json.loads(run.credits.read_text())["credits"]
    assert figures.keys() == {"ridge critic", "terminal", "true advantage"}  # no estimator here
    assert "no estimator is judged" in out
    critic, best = figures["ridge critic"], figures["true advantage"]
    assert (critic["judged_episodes"], critic["advantage_episodes"]) == (6, EPISODES)
    assert best["advantage_correlation"] == pytest.approx(1.0)
    # A door that opens brings the task on: the two truths agree.
    assert best["subgoal_auc"] > 0.8
    assert re.search(r"\| ridge critic +\| +\d\.\d\d \[", out)


def test_a_branch_goes_on_from_the_recorded_context(judged, flags):
    """A branch with the random numbers of its episode writes what the episode did."""
    from spa_jax import policy as policy_lib
    from spa_jax import play, replay, rollout
    from spa_jax.config import EnvConfig, SamplingConfig
    from spa_jax.envs.protocol import Task

    run, _ = judged
    settings = dict(flag[2:].split("=") for flag in flags)
    policy = policy_lib.load(settings["base"])
    sampling = SamplingConfig(slots=3, max_new_tokens=8, context_length=512)
    env = EnvConfig(env="custom", custom_data=settings["custom_data"], max_steps=4)
    episodes = [t for t in _played(run) if len(t.steps) == 3][:2]
    jobs = [
        rollout.Job(Task(t.task, t.split, "", ""), t.seed, t.attempt, prefix=replay.cut(t, k))
        for t in episodes
        for k in range(3)
    ]
    again = []
    with play.open_env(env, 3, run.truth / "server.log") as client:
        engine = play.make_engine(policy, sampling, 3, seed=0)
        player = play.make_player(env, policy)
        rollout.Rollout(engine, policy.chat, client, player=player, on_done=again.append).play(jobs)
    assert len(again) == 6
    for t in again:
        (own,) = [e for e in episodes if e.key == t.key]
        assert t.token_ids == own.token_ids and t.step_id == own.step_id
        assert t.steps == own.steps and t.final_reward == own.final_reward
        assert t.final_observation == own.final_observation and t.status is own.status
        assert t.log_probs == pytest.approx(own.log_probs, abs=1e-4)


def test_killed_and_run_again_no_branch_is_played_twice(judged, flags, tmp_path):
    run, whole = runs.make(tmp_path), judged[0]
    enough = programs.lines(whole.branches) // 2
    process = programs.start(*_command(run, *flags))
    programs.kill_when(process, lambda: programs.lines(run.branches) >= enough)
    before = run.branches.read_bytes()
    assert enough <= before.count(b"\n") < programs.lines(whole.branches)
    with run.branches.open("ab") as torn:
        torn.write(b'{"task": "heldout_')  # what a kill inside a write would leave behind
    programs.succeed(*_command(run, *flags))
    after = run.branches.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(after.splitlines()) == sorted(whole.branches.read_bytes().splitlines())
    assert run.advantages.read_bytes() == whole.advantages.read_bytes()


def test_a_finished_run_need_not_be_told_its_settings(judged):
    run, _ = judged
    before = run.branches.read_bytes()
    out = programs.succeed(*_command(run))
    assert "branches: all" in out and run.branches.read_bytes() == before
    done = programs.run(*_command(run, "--max_steps=3"))
    assert done.returncode == 2 and "--max_steps was 4, is 3" in done.stderr
    more = programs.succeed(*_command(run), "--episodes=5")
    assert run.branches.read_bytes().startswith(before) and "RESULT episodes=5 " in more


def test_the_report_shows_the_true_advantages_of_the_base_alone(judged, tmp_path):
    run, _ = judged
    write_report(run.workdir, tmp_path / "report.html")
    assert "Base (SFT)" in (tmp_path / "report.html").read_text()


def test_an_environment_that_is_another_one_each_time_is_refused(flags, tmp_path, monkeypatch):
    run = runs.make(tmp_path)
    moody = (*flags, "--custom_data=tests.envs.forks:Moody")
    evaluate = ("evaluate", f"--workdir={run.workdir}", "--name=sft", "--split=heldout", *moody)
    programs.succeed(*evaluate)
    monkeypatch.setenv("MOOD", "1")
    done = programs.run(*_command(run, *moody))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"task 'heldout_\d' \(seed 0\): the environment is not deterministic: the same "
                     r"actions played again, after step 2 of 2 it says 'the door is gone'",
                     done.stderr), done.stderr
