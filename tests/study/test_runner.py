"""The processes of a study: their order, their cores, what fails, and how they end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from spa_jax.study import runner
from spa_jax.study.runner import Runner
from tests import programs
from tests.study import synthetic

# A program that takes what a study's own takes: --only=ARM/seed_S --exit_with_parent.  It says in
# LOG when it begins, takes the result that the test has put aside, or fails without one.
_RUN = """
import json, os, pathlib, shutil, sys, time
from spa_jax.runtime import children
root = pathlib.Path(sys.argv[1])
assert sys.argv[3] == children.FLAG
children.at_end_of_parent(children.end_session)
name = sys.argv[2].removeprefix("--only=")
def tell(what):
    with (root / "LOG").open("a") as log:
        cores = sorted(os.sched_getaffinity(0))
        said = {"what": what, "name": name, "cores": cores, "pid": os.getpid()}
        log.write(json.dumps(said) + "\\n")
tell("begins")
aside = root / "aside" / name
if not aside.exists():
    print("a line\\nerror: no luck today\\nanother line")
    sys.exit(2)
time.sleep(float((root / "takes").read_text()))
shutil.copy(aside, root / "W" / name / "result.json")
tell("ends")
"""


@pytest.fixture
def study(tmp_path):
    """A study of two arms and two seeds, whose runs end well, at once."""
    found = synthetic.study(tmp_path, "terminal", "spa")
    (tmp_path / "takes").write_text("0")
    for seed in (0, 1):
        for won, arm in enumerate(("start", "terminal", "spa")):
            at = tmp_path / "aside" / arm / f"seed_{seed}"
            synthetic.leave(found, arm, seed, won + 2, at=at)
    return found


def _runner(study, workers=2) -> tuple[Runner, list]:
    told = []
    command = [sys.executable, "-c", _RUN, str(study.files.root.parent)]
    return Runner(study, command, workers, lambda going: told.append(len(going.results))), told


def _log(study) -> list[dict]:
    path = study.files.root.parent / "LOG"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_all_runs_end_and_are_told_in_a_line_each(study, capsys):
    going, told = _runner(study)
    going.run()
    assert told == [1, 2, 3, 4, 5, 6] and not going.failed and not going.left
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6
    assert said[-1].startswith(("spa seed 1: 40.0% of 10 games, ", "terminal seed 1: 30.0% of 10"))
    assert said[-1].endswith("| 4 of 4, done") and " ETA 0:0" in said[0]
    log = _log(study)
    assert log[0]["what"] == "begins" and log[0]["name"].startswith("start/")
    for seed in (0, 1):  # an arm begins when what it begins with has ended
        order = [(e["what"], e["name"]) for e in log]
        assert order.index(("ends", f"start/seed_{seed}")) < order.index(
            ("begins", f"spa/seed_{seed}")
        )
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        halves = {tuple(runner.cores_of(i, 2)) for i in (0, 1)}
        assert {tuple(e["cores"]) for e in log} <= halves
    # Another study in the same folder runs nothing.
    again, told = _runner(study)
    again.run()
    assert not told and again.arms() == (4, 4) and len(_log(study)) == len(log)


def test_a_run_that_fails_stops_nothing_but_what_waits_for_it(study, capsys):
    aside = study.files.root.parent / "aside"
    (aside / "start" / "seed_0").rename(aside / "kept")
    (aside / "spa" / "seed_1").unlink()
    going, _ = _runner(study)
    going.run()
    assert going.failed == {
        "start/seed_0": "no luck today (exit status 2)",
        "terminal/seed_0": "start/seed_0 failed",
        "spa/seed_0": "start/seed_0 failed",
        "spa/seed_1": "no luck today (exit status 2)",
    }
    assert set(going.results) == {"start/seed_1", "terminal/seed_1"}
    said = capsys.readouterr().out
    assert f"see {study.files.root / 'spa' / 'seed_1' / 'log.txt'}" in said
    # Run again, it does what is missing, and no more.
    (aside / "kept").rename(aside / "start" / "seed_0")
    before = len(_log(study))
    again, _ = _runner(study)
    again.run()
    begun = {e["name"] for e in _log(study)[before:] if e["what"] == "begins"}
    assert begun == {"start/seed_0", "terminal/seed_0", "spa/seed_0", "spa/seed_1"}
    assert set(again.failed) == {"spa/seed_1"}


_STUDY = """
import pathlib, sys
from spa_jax.runtime import interrupt
from spa_jax.study import runner
from tests.study import synthetic, test_runner
study = synthetic.study(pathlib.Path(sys.argv[1]), "terminal", "spa")
going, _ = test_runner._runner(study)
with runner.ended_by_sigterm():
    going.run()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_runs_end_with_the_study(study, how):
    root: pathlib.Path = study.files.root.parent
    (root / "takes").write_text("600")
    going = subprocess.Popen(
        [sys.executable, "-c", _STUDY, str(root)],
        cwd=programs.ROOT,
        env=programs.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(_log(study)) < 2:
        assert going.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    going.send_signal(how)
    _, said = going.communicate(timeout=60)
    assert going.returncode != 0
    if how != signal.SIGKILL:
        assert "0 of 4 runs have finished; run the same command again to go on" in said
    if how == signal.SIGTERM:
        assert going.returncode == 143
    deadline = time.monotonic() + 20
    for run in _log(study):
        while psutil.pid_exists(run["pid"]):
            assert time.monotonic() < deadline, "a run lives on"
            time.sleep(0.05)
