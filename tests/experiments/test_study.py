"""A study as a user runs it: real processes, a tiny policy, an environment of one's own."""

import json
import pathlib
import re
import shutil

import psutil
import pytest

from spa_jax import store
from spa_jax.training.metrics import read_metrics
from tests import programs, tiny

_FLAGS = (
    "--env=custom",
    "--custom_data=tests.envs.odd:Parts",
    "--demo_games=4",
    "--demo_valid_games=2",
    "--split=explore",
    "--games=4",
    "--rollouts=1",
    "--iterations=2",
    "--heldout_games=6",
    "--max_new_tokens=6",
    "--context_length=512",
    "--row_length=512",
    "--policy_slots=64",
    "--step_slots=16",
    "--rows_per_device=1",
    "--slots=4",
    "--sft_epochs=1",
    "--sft_batch_size=2",
    "--progress_epochs=2",
    "--ppo_batch_size=4",
    "--ppo_train_layers=1",
    "--seeds=0-1",
    "--jobs=2",
)
_ARMS = "--arms=sft,continued_sft,terminal,spa"


def _times(folder: pathlib.Path) -> dict[str, int]:
    """When the episodes and weights below a folder were written."""
    found = [*folder.rglob("trajectories.jsonl"), *folder.rglob("model.safetensors")]
    return {str(path): path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was killed when two runs of arms had finished, and its second call."""
    root = tmp_path_factory.mktemp("study")
    tiny.tiny_policy(root / "policy")
    flags = (*_FLAGS, f"--policy={root / 'policy'}", f"--workdir={root / 'W'}")
    command = ("study", *flags, _ARMS)

    def two() -> bool:
        ended = [*root.glob("W/terminal/*/result.json"), *root.glob("W/spa/*/result.json")]
        return len(ended) >= 2

    programs.kill_when(programs.start(*command), two, timeout=900)
    gone = [p for p in psutil.process_iter() if p.is_running() and str(root) in _command(p)]
    psutil.wait_procs(gone, timeout=20)
    before = {}
    for result in root.glob("W/*/*/result.json"):
        before |= _times(result.parent)
    return root / "W", flags, before, programs.succeed(*command)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_killed_it_goes_on_and_replays_nothing(finished):
    folder, _, before, out = finished
    assert len(before) > 10
    assert {path: time for path, time in _times(folder).items() if path in before} == before
    assert re.search(r"4 arms, 2 seeds: [2-5] of 6 runs have finished; 2 at a time", out)
    rates = r"sft=\d\.\d{4} continued_sft=\d\.\d{4} terminal=\d\.\d{4} spa=\d\.\d{4}"
    assert re.search(rf"RESULT {rates}\n$", out), out
    found = json.loads((folder / "study.json").read_text())
    assert found["runs"] == {"finished": 6, "all": 6, "failed": {}}
    assert len(found["games"]) == 6 and set(found["differences"]) == {
        "sft",
        "continued_sft",
        "spa",
    }
    for arm in found["arms"].values():
        assert set(arm["seeds"]) == {"0", "1"}
        assert all(len(run["outcomes"]) == 6 for run in arm["seeds"].values())
    rounds = [point["round"] for point in found["arms"]["spa"]["curve"]]
    assert rounds == [0, 1, 2]
    assert "auc" in found["arms"]["spa"]["seeds"]["0"]["credit"]
    assert "<svg" in (folder / "study.html").read_text()


@pytest.mark.slow
def test_arms_begin_with_the_same_and_differ_in_their_credit(finished):
    folder, _, _, _ = finished
    for seed in ("seed_0", "seed_1"):
        explored = [
            (folder / arm / seed / "iteration_0" / "explore" / "trajectories.jsonl").read_bytes()
            for arm in ("start", "terminal", "spa")
        ]
        assert explored[0] == explored[1] == explored[2]
        for t in store.read(folder / "terminal" / seed / "iteration_1" / "annotated.jsonl"):
            final = [0.0] * (len(t.steps) - 1) + [t.final_reward]
            paid = [r - 0.5 * (not s.grounded) for r, s in zip(final, t.steps, strict=True)]
            assert [step.reward for step in t.steps] == pytest.approx(paid, abs=1e-6)
        assert (folder / "spa" / seed / "report.html").exists()
        ran = json.loads((folder / "spa" / seed / "run.json").read_text())
        assert ran["program"] == "study" and f"--only=spa/{seed}" in ran["command"]
    one, other = ((folder / "start" / s / "run.json").read_text() for s in ("seed_0", "seed_1"))
    assert json.loads(one)["settings"]["base"] == json.loads(other)["settings"]["base"]


@pytest.mark.slow
def test_continued_sft_sees_as_many_tokens_as_spa(finished):
    folder, _, _, _ = finished
    found = json.loads((folder / "study.json").read_text())["arms"]
    for seed in ("0", "1"):
        spent = read_metrics(folder / "continued_sft" / f"seed_{seed}" / "sft" / "metrics.jsonl")
        tokens = [m["tokens"] for m in spent]
        assert found["continued_sft"]["seeds"][seed]["tokens"] == sum(tokens)
        # A study gives whole updates, one at least.
        spa = found["spa"]["seeds"][seed]["tokens"]
        assert spa == pytest.approx(sum(tokens), abs=max(tokens))


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(finished):
    folder, flags, _, _ = finished
    bad = folder / "uniform" / "seed_0" / "iteration_0" / "explore" / "trajectories.jsonl"
    shutil.copytree(folder / "start" / "seed_0" / "iteration_0" / "explore", bad.parent)
    (bad.parent / "done.json").unlink()
    bad.write_text("no episode\n" + bad.read_text())
    done = programs.run("study", *flags, f"{_ARMS},uniform")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"uniform/seed_0: FAILED: {bad}:1" in done.stdout and "log.txt" in done.stdout
    found = json.loads((folder / "study.json").read_text())
    assert list(found["runs"]["failed"]) == ["uniform/seed_0"] and found["runs"]["finished"] == 7
    assert set(found["arms"]["uniform"]["seeds"]) == {"1"}


@pytest.mark.slow
def test_other_settings_are_refused_in_the_same_folder(finished):
    folder, flags, _, _ = finished
    done = programs.run("study", *flags, _ARMS, "--beta=0.3")
    assert done.returncode == 2
    assert "was made with other settings: --beta was 0.5, is 0.3" in done.stderr
