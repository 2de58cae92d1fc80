"""Games without an outcome: told on the terminal, recorded whole, counted in every figure."""

import json

import pytest

from spa_jax import evaluation, failures, store
from spa_jax.config import EnvConfig, SamplingConfig
from spa_jax.errors import UserError
from spa_jax.play import Recorded
from spa_jax.policy import EXPERT
from spa_jax.report import workdir
from spa_jax.run import Run
from spa_jax.stage_config import ExploreConfig
from spa_jax.stages import explore
from tests import runs, tiny


def _run(folder, kind: str, **env) -> Run:
    settings = {"max_retries": 0, "max_steps": 3} | env
    return runs.make(
        folder,
        env=EnvConfig(env="custom", custom_data=f"tests.envs.loose:{kind}", **settings),
        explore=ExploreConfig(rollouts=1, split="train"),
        sampling=SamplingConfig(slots=1, context_length=256, max_new_tokens=8),
    )


def _explored(folder, kind: str, *, policy: str = EXPERT, **env) -> Recorded:
    return explore.run(_run(folder, kind, **env), 0, policy=policy, out=folder / "out")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny"))


def test_failures_are_told_recorded_and_counted(tmp_path, capsys):
    with pytest.raises(UserError, match="failed 2 of 3 episodes .*LookupError: no room.*0.2"):
        _explored(tmp_path, "Failing")
    said = capsys.readouterr().err
    assert said.count("environment error: task 'train_") == 1
    assert said.count("  | Traceback (most recent call last)") == 1 and "\nTraceback" not in said
    assert "  | LookupError: no room for train_" in said
    assert "2 times in all (# is a number): the environment failed: LookupError" in said
    out = tmp_path / "out"
    assert not (out / "done.json").exists()
    lines = [json.loads(line) for line in (out / failures.FAILURES).read_text().splitlines()]
    assert all('raise LookupError(f"no room' in line["final_observation"] for line in lines)
    assert '"traceback"' in (out / "server.log").read_text()

    found = _explored(tmp_path, "Failing", max_failed_share=0.7)
    summary = found.summary()
    assert (found.asked, summary.asked, summary.games, summary.env_errors) == (3, 3, 1, 2)
    row = [cell.strip() for cell in evaluation.table({"x": summary}).split("\n")[2].split("|")]
    assert row[2:5] == ["3", "1", "2"]
    # A finished folder says the same to the report, however often each game was tried.
    read = workdir.summary_of(store.read(out / "trajectories.jsonl"), out)
    assert read == summary


def test_nothing_played_is_no_result(tmp_path):
    with pytest.raises(UserError, match="failed 3 of 3 episodes"):
        _explored(tmp_path, "Broken", max_failed_share=1.0)
    assert not (tmp_path / "out" / "done.json").exists()


def test_one_long_opening_stops_nobody(policy, tmp_path, capsys):
    found = _explored(tmp_path, "Long", policy=policy)
    assert [t.task for t in found.episodes] == ["train_0", "train_2"]
    assert (found.failed, found.left_out, found.asked) == (0, 1, 3)
    said = capsys.readouterr().err
    assert "left out: task 'train_1': its opening has" in said and "--context_length=256" in said
    assert "1 of 3 episodes were left out" in said and "tasks train_1" in said
    out = tmp_path / "out"
    done = json.loads((out / "done.json").read_text())
    assert (done["episodes"], done["failures"], done["left_out"]) == (2, 0, 1)
    # Run again, it neither plays nor reads it again, and says the same.
    assert _explored(tmp_path, "Long", policy=policy) == found
    (out / "done.json").unlink()
    assert _explored(tmp_path, "Long", policy=policy) == found
    assert len((out / failures.FAILURES).read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_flag_makes_a_long_opening_an_error(policy, tmp_path):
    with pytest.raises(UserError, match="--long_openings=error: task 'train_1': its opening has"):
        _explored(tmp_path, "Long", policy=policy, long_openings="error")


def test_half_a_pair_is_replaced_and_counted(tmp_path, capsys):
    found = _explored(tmp_path, "Half")
    assert {t.steps[0].observation for t in found.episodes} == {"a \ufffd b"}
    said = capsys.readouterr().err
    assert "lone surrogates" in said and "(3 times)" in said


def test_a_breach_stops_the_stage_at_once(tmp_path):
    with pytest.raises(UserError, match=r"loose:Rich\.step .*reward must be a number.*not 10"):
        _explored(tmp_path, "Rich", max_retries=3)
    assert not (tmp_path / "out" / failures.FAILURES).exists()


def test_a_torn_line_of_failures_is_cut_off(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / failures.FAILURES).write_text('{"task": "train_1", "se')
    assert failures.count(out, set()) == (0, 0)
    with pytest.raises(UserError, match="failed 3 of 3"):
        _explored(tmp_path, "Broken")
    assert failures.count(out, set()) == (3, 0)


def test_a_file_of_failures_that_is_none(tmp_path):
    (tmp_path / failures.FAILURES).write_text('{"task": "a"}\n')
    with pytest.raises(UserError, match="failures.jsonl:1: no record of a failed episode"):
        failures.count(tmp_path, set())
