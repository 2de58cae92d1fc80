"""`check_env` of a class: what is right holds, and what is wrong is named."""

import pytest

from spa_jax import env_check
from spa_jax.env_check import Trial
from spa_jax.envs.local import LocalServer
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig
from tests import tiny


def _check(kind: str, **changes) -> env_check.Report:
    return env_check.check(Trial(f"tests.envs.loose:{kind}", **({"games": 2} | changes)))


def test_a_class_that_keeps_the_contract(tmp_path):
    report = _check("Fine", games=1, policy=str(tiny.tiny_tokenizer(tmp_path / "t")))
    assert report.ok and report.agreement == 1
    text = "\n".join(report.lines)
    assert "the expert wins: 2 of 2" in text and "a replay says the same: 2 of 2" in text
    assert "train: 3 tasks, heldout: 3 tasks" in text and "2 won" in text
    assert "fits into --context_length=1024: 2 of 2" in text
    assert "Say win." in text.split("a policy reads first")[1]


@pytest.mark.slow
def test_games_that_do_not_fit_are_named(tmp_path):
    policy = str(tiny.tiny_tokenizer(tmp_path / "t"))
    report = _check("Fine", policy=policy, context_length=10)
    assert not report.ok and "tokens, " in "\n".join(report.lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Shared", "train and heldout share 1 tasks, such as ['a']"),
        ("Dice", "played again"),
        ("Hopeless", "after 40 steps reward 0, done False (--max_steps)"),
        ("Wordy", "is read as 'win' where a policy writes it"),
        ("Drifting", "leaves the progress as it is: 0 of"),
        ("Touchy", "the environment failed: KeyError"),
    ],
)
def test_what_is_wrong_is_named(kind, message):
    report = _check(kind)
    assert not report.ok and report.agreement < 1
    assert message in "\n".join(report.lines)


def test_a_breach_of_names_ends_it():
    with pytest.raises(UserError, match="Leaving.tasks.*SystemExit"):
        _check("Leaving")


def test_a_person_plays():
    lines, said = iter(["fly", "?", "Action: win", "look", "!reset", "!quit"]), []
    with LocalServer(ServerConfig("tests.envs.loose:Fine", env="custom")) as server:
        env_check.play(
            server.client(), "train", "", seed=0, expert=True, ask=lambda _: next(lines),
            say=said.append,
        )
    text = "\n".join(said)
    assert "Say win." in text and "train_0: go" in text
    assert "[reward 0, not executed]" in text and "the expert would: win" in text
    assert "THE END: won" in text and "the game has ended" in text
    assert text.count("[train: train_0, seed 0]") == 2
