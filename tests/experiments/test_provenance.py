"""Another setting in the same folder, as a user meets it: refused, with how to go on."""

import json
import re
import shutil

import pytest

from spa_jax import run as run_lib
from spa_jax.models.io import weights
from spa_jax.run import Run
from tests import programs, runs, tiny
from tests.experiments import small

_FAST = "--ppo_learning_rate=1e-3"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory) -> Run:
    """A round whose policy was trained with the default learning rate."""
    run = runs.make(tmp_path_factory.mktemp("trained"))
    small.prepare("train_ppo", run.workdir)
    programs.succeed(*_command(run, policy))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy of it."""
    return runs.make(shutil.copytree(trained.workdir, tmp_path / "run"))


def _command(run: Run, policy, *flags: str) -> tuple[str, ...]:
    return ("train_ppo", f"--workdir={run.workdir}", f"--policy={policy}", *small.ROWS, *flags)


def _refused(*command: str) -> str:
    """The one line of complaint."""
    done = programs.run(*command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "RESULT" not in done.stdout
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return said


def _weights(run: Run) -> bytes:
    return (run.round(0).policy / weights.WEIGHTS).read_bytes()


def test_another_setting_is_refused_and_redo_makes_the_stage_anew(run, policy):
    before, ppo, ran = _weights(run), run.round(0).ppo, run.json.read_text()
    said = _refused(*_command(run, policy, _FAST))
    assert run.json.read_text() == ran
    assert "--ppo_learning_rate was 1e-05, is 0.001" in said and str(ppo) in said
    assert "Give another --workdir, or --redo=ppo:0, which removes this stage" in said
    assert _weights(run) == before
    out = programs.succeed(*_command(run, policy, _FAST, "--redo=ppo"))
    assert f"--redo=ppo: removes {ppo}" in out and "already done" not in out
    assert _weights(run) != before
    noted = json.loads(run_lib.fingerprint(ppo).read_text())
    assert noted["settings"]["ppo_learning_rate"] == 1e-3
    told = json.loads(run.json.read_text())
    assert told["program"] == "train_ppo" and _FAST in told["command"]
    assert told["settings"]["ppo_learning_rate"]["changed"]
    assert len(told["earlier"]) == 1  # as it was first trained; what was refused has not run


def test_a_run_without_fingerprints_goes_on_with_one_line(run, policy):
    """As it was started before there were any."""
    run_lib.fingerprint(run.round(0).ppo).unlink()
    done = programs.run(*_command(run, policy, _FAST))
    assert done.returncode == 0 and "already done" in done.stdout
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "was started before runs recorded their settings" in warned[0]
    assert not run_lib.fingerprint(run.round(0).ppo).exists()


def test_another_policy_under_the_same_name_is_refused(policy, tmp_path, monkeypatch):
    page = (programs.ROOT / "docs" / "environments.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example and "class Guess" in example[1]
    (tmp_path / "guess.py").write_text(example[1])
    made = programs.environment() | {"PYTHONPATH": f"{tmp_path}:{programs.ROOT}"}
    monkeypatch.setattr(programs, "environment", lambda devices=1: made)
    run = runs.make(tmp_path / "run")
    games = ("--env=custom", "--custom_data=guess:Guess", "--split=heldout", "--games=2")
    command = ("evaluate", f"--workdir={run.workdir}", "--name=held", *games)
    assert "games=2" in programs.succeed(*command, "--policy=expert")
    folder = run.evaluation("held")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    said = _refused(*command, f"--policy={policy}")
    assert f"{folder} was made with other settings: the policy's weights are others" in said
    assert "--redo=evaluate:held" in said
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
