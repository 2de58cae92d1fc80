"""A run knows where its files lie, and which policy plays in a round."""

import pathlib

from spa_jax import run as run_lib
from spa_jax.config import LoraConfig
from spa_jax.stage_config import ExploreConfig, MethodConfig
from tests import runs

W = pathlib.Path("W")


def test_the_files_of_a_run_are_those_that_are_documented():
    run = runs.make(W)
    here = run.round(2)
    found = {
        run.json: "run.json",
        run.games: "games",
        run.demonstrations("valid"): "demos/valid/trajectories.jsonl",
        run.base: "sft/policy",
        here.episodes: "iteration_2/explore/trajectories.jsonl",
        here.features: "iteration_2/explore/features.npz",
        here.lower_states: "iteration_2/explore/below.npz",
        here.progress: "iteration_2/progress",
        here.annotated: "iteration_2/annotated.jsonl",
        here.policy: "iteration_2/ppo/policy",
        run.evaluation("spa"): "eval/spa",
        run.estimator: "estimator.json",
        run.report: "report.html",
        run_lib.checkpoints(run.sft): "sft/checkpoints",
        run_lib.done(here.ppo): "iteration_2/ppo/done.json",
        run_lib.fingerprint(here.ppo): "iteration_2/ppo/fingerprint.json",
        run_lib.fingerprint(here.annotated): "iteration_2/annotated.fingerprint.json",
    }
    assert {path.as_posix() for path in found} == {f"W/{name}" for name in found.values()}
    assert all(path == W / name for path, name in found.items())


def test_the_newest_policy_plays():
    run = runs.make(W)
    assert [run.newest_policy(i) for i in (0, 1, 2)] == [
        run.base,
        run.round(0).policy,
        run.round(1).policy,
    ]
    given = runs.make(W, method=MethodConfig(base="theirs"))
    assert given.newest_policy(0) == given.base == pathlib.Path("theirs")
    assert given.newest_policy(1) == given.round(0).policy


def test_rounds_play_games_of_their_own_if_their_number_is_given():
    run = runs.make(W, explore=ExploreConfig(games=4, first_game=2))
    assert [run.games_of(i).first_game for i in (0, 1, 2)] == [2, 6, 10]
    every = runs.make(W)
    assert every.games_of(3) == every.settings.explore


def test_rounds_are_in_order(tmp_path):
    for name in ("iteration_10", "iteration_2", "iteration_x", "iteration_", "sft"):
        (tmp_path / name).mkdir()
    assert [r.number for r in runs.make(tmp_path).rounds()] == [2, 10]
    assert runs.make(tmp_path / "nothing").rounds() == []


def test_adapters_are_of_the_stages_that_are_named():
    run = runs.make(W, lora=LoraConfig(rank=2))
    assert [run.lora(stage).rank for stage in ("sft", "progress", "ppo")] == [2, 0, 2]
