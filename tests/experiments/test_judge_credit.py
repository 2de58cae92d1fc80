"""The program: killed and run again, no branch is played twice, and the truth is the same."""

import json

from spa_jax import truth
from tests import programs, runs, tiny

_SIZES = ("--episodes=3", "--branches=6", "--split=heldout")


def _flags(policy) -> tuple[str, ...]:
    return (
        "--env=custom",
        "--custom_data=tests.envs.forks:Forks",
        f"--base={policy}",
        "--slots=3",
        "--max_steps=4",
        "--max_new_tokens=8",
        "--context_length=512",
        "--row_length=512",
        "--policy_slots=128",
    )


def test_killed_and_run_again_no_branch_is_played_twice(tmp_path):
    policy = tiny.tiny_policy(tmp_path / "policy")
    run, unbroken = runs.make(tmp_path / "run"), runs.make(tmp_path / "unbroken")
    command = ("judge_credit", f"--workdir={run.workdir}", *_SIZES)
    said = programs.succeed(
        "judge_credit", f"--workdir={unbroken.workdir}", *_SIZES, *_flags(policy)
    )
    assert "RESULT episodes=3 steps=" in said and "| ridge critic" in said
    whole = unbroken.branches.read_bytes().splitlines()

    process = programs.start(*command, *_flags(policy))
    programs.kill_when(process, lambda: programs.lines(run.branches) >= len(whole) // 3)
    before = run.branches.read_bytes()
    assert 0 < before.count(b"\n") < len(whole), "killed too late to mean anything"
    with run.branches.open("ab") as torn:
        torn.write(b'{"task": "heldout_')  # what a kill inside a write would leave behind
    # A run that is there need not be told its settings again: they stand in run.json.
    programs.succeed(*command)
    after = run.branches.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(after.splitlines()) == sorted(whole)
    assert len(truth.read_branches(run.branches)) == len(whole)  # refuses one that is there twice
    assert run.advantages.read_bytes() == unbroken.advantages.read_bytes()
    made = json.loads(run.json.read_text())["settings"]
    assert made["max_steps"]["value"] == 4 and made["custom_data"]["changed"]
