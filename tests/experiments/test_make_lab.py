"""A miniature of the lab's base policy, end to end on real games."""

import json
import re

import pytest

from spa_jax import policy, provenance, store
from tests import programs

_SMALL = (
    "--games=12",
    "--valid_games=2",
    "--heldout_games=6",
    "--updates=4",
    "--batch_size=4",
    "--layers=1",
    "--width=32",
    "--heads=2",
    "--feed_forward=32",
    "--vocabulary=1500",
)


@pytest.mark.slow
def test_a_base_is_made_once(tmp_path):
    out = tmp_path / "lab"
    said = programs.succeed("make_lab", f"--out={out}", *_SMALL)
    digest = provenance.policy_digest(out)
    last = said.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"RESULT digest={digest} parameters=\d+ success=0\.\d{{4}} games=6 policy={out}", last
    )
    record = json.loads((out / "lab.json").read_text())
    assert record["digest"] == digest and record["settings"]["games"] == 12
    assert policy.load(out).version == 4 and record["parameters"] < 60_000
    demos = store.read(out / "making" / "demos" / "train" / "trajectories.jsonl")
    assert len({t.task_type for t in demos}) == 6
    assert not (out / "making" / "games").exists()
    again = programs.succeed("make_lab", f"--out={out}", *_SMALL)
    assert f"{out}: already made" in again and again.strip().splitlines()[-1] == last
    refused = programs.run("make_lab", f"--out={out}", *_SMALL, "--games=13")
    assert refused.returncode == 2 and "--games was 12, is 13" in refused.stderr
