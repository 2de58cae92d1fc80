"""When an episode ends, what is kept of a turn that a limit cut, and where the time goes."""

import dataclasses
import json
import os

import numpy as np
import pytest

from spa_jax import rollout, tokenizer
from spa_jax.chat import ChatFormat
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import Observation, Task
from spa_jax.errors import UserError
from spa_jax.rollout import (
    Job,
    Player,
    Rollout,
    _Episode,
    _final_reward,
    _outcome,
    play_expert,
)
from spa_jax.sampling.engine import Engine, Usage
from spa_jax.server_config import ServerConfig
from spa_jax.timing import Timing
from spa_jax.trajectory import Sampling, Status, Step, from_json, to_json
from tests import programs, tiny


def _observation(**changes) -> Observation:
    fields = {"text": "", "reward": 0.0, "done": False, "success": False, "grounded": True}
    return Observation(**fields | changes)


def _steps(grounded: str) -> list[Step]:
    return [Step("", "go", "go", mark == "+") for mark in grounded]


@pytest.mark.parametrize(
    ("grounded", "give_up_after", "status"),
    [
        ("", 3, None),
        ("--", 3, None),
        ("---", 3, Status.FAILURE),
        ("+---", 3, Status.FAILURE),
        ("--+-", 3, None),  # in a row
        ("-----", 0, None),
        ("-", 1, Status.FAILURE),
        ("++++++", 3, Status.MAX_STEPS),
        ("+++---", 3, Status.MAX_STEPS),  # both: the step limit is named
    ],
)
def test_an_episode_ends_after_its_steps_or_when_it_is_stuck(grounded, give_up_after, status):
    player = Player("alfworld", "p", 0, max_steps=6, prompt="short", give_up_after=give_up_after)
    assert _outcome(_observation(), _steps(grounded), player) is status


def test_the_environment_decides_first():
    player = Player("alfworld", "p", 0, max_steps=2, prompt="short", give_up_after=2)
    stuck = _steps("--")
    won = _observation(done=True, success=True, reward=1.0)
    assert _outcome(won, stuck, player) is Status.SUCCESS
    assert _outcome(_observation(done=True), [], player) is Status.FAILURE


@pytest.mark.parametrize(
    ("observation", "status", "reward"),
    [
        (_observation(done=True, success=True, reward=1.0), Status.SUCCESS, 1.0),
        (_observation(done=True, reward=0.5), Status.FAILURE, 0.5),  # bought nearly the right thing
        (_observation(reward=0.5), Status.MAX_STEPS, 0.0),  # not ended by the environment
    ],
)
def test_the_final_reward_is_what_the_environment_paid_at_the_end(observation, status, reward):
    player = Player("webshop", "p", 0, max_steps=2, prompt="short")
    assert _outcome(observation, _steps("++"), player) is status
    episode = _Episode(Job(Task("goal_1", "test", "", ""), 0, 0))
    episode.observation = observation
    record = episode.result(player, status, "", reward=_final_reward(episode))
    assert record.final_reward == reward and record.success == (reward == 1.0)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatFormat:
    folder = tiny.tiny_tokenizer(tmp_path_factory.mktemp("rollout"))
    return ChatFormat.from_tokenizer(tokenizer.load(folder))


@pytest.fixture(scope="module")
def client():
    """A server of an environment that takes 30 ms for each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{programs.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        config = ServerConfig("tests.envs.odd:Slow", env="custom", max_sessions=4)
        with LocalServer(config, start_deadline_s=120) as server:
            yield server.client()


def _play(chat, client, sampling: Sampling, ends: float = 2.0, episodes: int = 4, **settings):
    """Plays with a tiny policy; (trajectories by task, timing)."""
    config = tiny.tiny_config()
    params = tiny.tiny_params(config, end_of_turn=chat.end_of_turn, ends=ends)
    engine = Engine(
        config,
        params,
        slots=4,
        sampling=sampling,
        end_of_turn=(chat.end_of_turn,),
        seed=0,
        text=chat.decode,
        **{"context_length": 512} | settings,
    )
    player = Player("custom", "tiny", version=7, max_steps=5, prompt="short")
    jobs = [Job(Task(f"train_{i}", "train", "", ""), 0, 0) for i in range(episodes)]
    played = []
    playing = Rollout(engine, chat, client, player=player, on_done=played.append)
    timing = playing.play(jobs)
    assert len({t.key for t in played}) == len(played) == episodes
    return sorted(played, key=lambda t: t.task), timing


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ({"max_new_tokens": 6}, Status.MAX_TOKENS),
        ({"max_new_tokens": 100, "context_length": 150}, Status.CONTEXT_FULL),
        ({"max_new_tokens": 100, "turn_deadline_s": 1e-9}, Status.DEADLINE),
    ],
)
def test_a_turn_that_a_limit_cut_is_kept_and_marked(chat, client, limit, status):
    sampling = Sampling(max_new_tokens=limit.pop("max_new_tokens"))
    played, _ = _play(chat, client, sampling, ends=-20.0, **limit)
    for t in played:
        assert t.status is status and t.final_reward == 0
        (step,) = t.steps
        assert step.partial and not step.grounded and step.policy_version == 7
        wrote = [i for i, s in zip(t.token_ids, t.step_id, strict=True) if s == 0]
        assert wrote and chat.decode(wrote) == step.response
        assert t.step_id[-1] == 0


def test_whole_turns_are_not_marked(chat, client):
    played, _ = _play(chat, client, Sampling(max_new_tokens=40))
    assert {t.status for t in played} == {Status.MAX_STEPS}
    for t in played:
        assert len(t.steps) == 5 and not any(step.partial for step in t.steps)


def test_a_stop_string_ends_a_turn_whose_end_is_then_forced(chat, client):
    stop = ("e", "a", "o")
    played, _ = _play(chat, client, Sampling(max_new_tokens=60, stop=stop), ends=0.0)
    stopped = 0
    for t in played:
        ids, step_id = np.array(t.token_ids), np.array(t.step_id)
        for k, step in enumerate(t.steps):
            own = np.flatnonzero(step_id == k)
            cut = sorted((s for s in stop if s in step.response), key=step.response.index)
            assert chat.decode(ids[own].tolist()) == step.response
            if not cut:
                continue
            stopped += 1
            assert step.action == step.response.split(cut[0])[0].strip()
            assert ids[own[-1]] != chat.end_of_turn
            if k + 1 < len(t.steps):  # the next turn opens with an end that nobody drew
                assert ids[own[-1] + 1] == chat.end_of_turn and step_id[own[-1] + 1] == -1
                follows = chat.next_turn(t.steps[k + 1].observation)
                start = own[-1] + 2
                assert ids[start : start + len(follows)].tolist() == follows
    assert stopped > 3


@pytest.fixture(scope="module")
def marching():
    """A server of an environment that says its progress: 0, then a quarter an action."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{programs.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        config = ServerConfig("tests.envs.odd:Marching", env="custom", max_sessions=4)
        with LocalServer(config, start_deadline_s=120) as server:
            yield server.client()


def test_progress_is_recorded_of_a_policys_episodes_and_never_read(chat, marching):
    played, _ = _play(chat, marching, Sampling(max_new_tokens=40))
    for t in played:
        assert t.status is Status.SUCCESS
        assert t.progress == (0.0, 0.25, 0.5, 0.75, 1.0) and t.initial_progress == 0.0
        context = chat.decode([i for i, s in zip(t.token_ids, t.step_id, strict=True) if s == -1])
        assert "march" in context and "step 3" in context
        assert not any(told in context for told in ("progress", "0.25", "0.5", "0.75"))
        assert from_json(json.loads(json.dumps(to_json(t)))) == t


def test_a_turn_that_is_cut_leaves_progress_as_it_was(chat, marching):
    played, _ = _play(chat, marching, Sampling(max_new_tokens=6), ends=-20.0)
    for t in played:
        assert t.status is Status.MAX_TOKENS and t.progress == (0.0, 0.0)


def test_an_environment_that_does_not_know_its_progress_tells_none(chat, client):
    played, _ = _play(chat, client, Sampling(max_new_tokens=40), episodes=2)
    assert all(t.progress is None and t.steps for t in played)


def test_progress_is_recorded_of_the_experts_episodes(marching):
    player = Player("custom", "expert", 0, max_steps=3, prompt="short")
    played = []
    jobs = [Job(Task(f"train_{i}", "train", "", ""), 0, 0) for i in range(2)]
    play_expert(marching, jobs, player=player, on_done=played.append)
    assert [t.progress for t in played] == [(0.0, 0.25, 0.5, 0.75)] * 2
    assert {t.status for t in played} == {Status.MAX_STEPS}


def _actions(jobs, slips: float) -> list[str]:
    config = ServerConfig("tests.envs.odd:Listing", env="custom", max_sessions=4)
    player = Player("custom", "expert", 0, max_steps=9, prompt="short")
    played = []
    with LocalServer(config, start_deadline_s=120) as server:
        play_expert(server.client(), jobs, player=player, on_done=played.append, slips=slips)
    return [step.action for t in played for step in t.steps]


def test_an_expert_slips_as_often_as_it_is_told_and_never_into_its_own_action(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(programs.ROOT))
    jobs = [Job(Task("train_0", "train", "", ""), 0, attempt) for attempt in range(40)]
    actions = _actions(jobs, 0.5)
    assert len(actions) == 160 and _actions(jobs, 0.5) == actions
    slips = [action for action in actions if action != "march"]
    assert 55 <= len(slips) <= 105  # 80 and four standard deviations
    assert min(slips.count("left"), slips.count("right")) >= 15
    assert _actions(jobs[:2], 0.0) == ["march"] * 8


def test_an_expert_slips_only_where_something_else_is_listed(marching):
    player = Player("custom", "expert", 0, max_steps=3, prompt="short")
    jobs = [Job(Task("train_0", "train", "", ""), 0, 0)]
    with pytest.raises(UserError, match="--demo_slips: the environment does not list"):
        play_expert(marching, jobs, player=player, on_done=lambda _: None, slips=0.9)


def test_slow_environments_are_named_as_the_bottleneck(chat, client):
    _, timing = _play(chat, client, Sampling(max_new_tokens=40), episodes=8)
    metrics = timing.metrics()
    parts = [metrics[f"{part}_share"] for part in ("prefill", "decode", "waiting", "host")]
    assert sum(parts) == pytest.approx(1, abs=0.01) and min(parts) >= 0
    assert timing.env_steps == 8 * 5 and metrics["env_step_seconds"] >= 0.03
    assert 0 < metrics["occupancy"] <= 1 and metrics["tokens_per_second"] > 0
    starved = dataclasses.replace(timing, waiting_s=0.25 * timing.wall_s)
    assert "the policy waited for them 25% of the time" in starved.bottleneck()
    assert "--slots" in starved.bottleneck() and "--env_address" in starved.bottleneck()
    # The same wait, but for processes that start: the steps took no time.
    assert dataclasses.replace(starved, env_s=0.001).bottleneck() == ""
    assert timing.waiting_s > 0.03


def test_waiting_a_little_for_environments_fills_the_slots_and_changes_no_token(
    chat, client, monkeypatch
):
    played, timing = {}, {}
    for patience in (0.0, 1e4):  # the tiny policy takes far less time than the environment
        monkeypatch.setattr(rollout, "_PATIENCE", patience)
        played[patience], timing[patience] = _play(
            chat, client, Sampling(max_new_tokens=40), episodes=8
        )
    assert [t.token_ids for t in played[0.0]] == [t.token_ids for t in played[1e4]]
    assert timing[1e4].usage.places < timing[0.0].usage.places
    assert timing[1e4].usage.occupancy > timing[0.0].usage.occupancy


def test_fast_environments_are_not():
    usage = Usage(prefill_s=2.0, decode_s=5.0, generated=100, places=200)
    timing = Timing(10.0, waiting_s=1.0, env_s=4.0, env_steps=40, slots=4, usage=usage)
    assert timing.bottleneck() == ""
    assert timing.metrics()["host_share"] == pytest.approx(0.2)
    assert timing.metrics()["occupancy"] == 0.5
