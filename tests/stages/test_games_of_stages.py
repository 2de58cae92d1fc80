"""Which games are played stands in a folder's fingerprint, and is told by the flag that says so."""

import pytest

from spa_jax import run as run_lib
from spa_jax import store
from spa_jax.config import SamplingConfig
from spa_jax.data_config import DataConfig
from spa_jax.errors import UserError
from spa_jax.stage_config import ExploreConfig, MethodConfig
from spa_jax.stages import demonstrate, evaluate, explore
from tests import runs, tiny

NO_GAMES = "--alfworld_data is not set"  # refused when all else is right


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny"))


def _begun(stage, folder) -> None:
    """A stage that has played some of its episodes."""
    with pytest.raises(UserError, match=NO_GAMES):
        stage()
    assert run_lib.fingerprint(folder).exists()
    store.write(folder / run_lib.EPISODES, runs.episodes(1))


@pytest.mark.parametrize("flag", ["demo_games", "demo_split"])
def test_demonstrations(flag, tmp_path):
    run = runs.make(tmp_path)
    _begun(lambda: demonstrate.run(run), run.demonstrations("train").parent)
    value = 3 if flag == "demo_games" else "other"
    other = runs.make(tmp_path, data=DataConfig(**{flag: value}))
    with pytest.raises(UserError, match=f"--{flag} was .*, is {value}.*--redo=demos"):
        demonstrate.run(other)
    with pytest.raises(UserError, match=NO_GAMES):
        demonstrate.run(runs.make(tmp_path, data=DataConfig(demo_valid_games=3)))  # not yet


def test_exploration(policy, tmp_path):
    run = runs.make(tmp_path)
    _begun(lambda: explore.run(run, 0, policy=policy), run.round(0).explore)
    for explored, said in (
        (ExploreConfig(rollouts=3), "--rollouts was 10, is 3"),
        (ExploreConfig(games=3), "--games was 0, is 3"),
    ):
        with pytest.raises(UserError, match=f"{said}.*--redo=explore:0"):
            explore.run(runs.make(tmp_path, explore=explored), 0, policy=policy)


def test_the_evaluation_of_a_whole_run(policy, tmp_path):
    run = runs.make(tmp_path)
    _begun(lambda: evaluate.run(run, "spa", policy=policy), run.evaluation("spa"))
    for sections, said in (
        ({"data": DataConfig(heldout_games=3)}, "--heldout_games was 0, is 3"),
        ({"data": DataConfig(heldout_split="x")}, "--heldout_split was heldout, is x"),
        ({"method": MethodConfig(eval_temperature=0.5)}, "--eval_temperature was 1.0, is 0.5"),
    ):
        with pytest.raises(UserError, match=f"{said}.*--redo=evaluate:spa"):
            evaluate.run(runs.make(tmp_path, **sections), "spa", policy=policy)
    for sections in (
        {"sampling": SamplingConfig(temperature=0.5)},
        {"explore": ExploreConfig(games=3)},
    ):
        with pytest.raises(UserError, match=NO_GAMES):  # exploration's alone
            evaluate.run(runs.make(tmp_path, **sections), "spa", policy=policy)
