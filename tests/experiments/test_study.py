"""A study as a user runs it: real processes, a tiny policy, an environment of one's own."""

import json
import pathlib
import re

import psutil
import pytest

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
