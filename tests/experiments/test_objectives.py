"""Objectives other than PPO's, as a user runs them."""

import re

import pytest

from spa_jax import store
from tests import programs, runs, tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


_FLAGS = (
    "--generate_train=6",
    "--generate_valid=2",
    "--generate_explore=4",
    "--generate_heldout=2",
    "--task_types=pick_and_place_simple",
    "--max_receptacles=4",
    "--max_steps=15",
    "--max_new_tokens=6",
    "--context_length=1024",
    "--row_length=1024",
    "--policy_slots=256",
    "--rows_per_device=1",
    "--slots=4",
    "--sft_epochs=1",
    "--sft_batch_size=3",
    "--games=2",
    "--split=explore",
    "--progress_epochs=2",
    "--ppo_batch_size=4",
    "--ppo_train_layers=1",
    "--give_up_after=2",
)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "kind"), [("grpo", "spa"), ("rloo", "terminal")])
def test_the_whole_method_runs_with(objective, kind, tmp_path):
    tiny.tiny_policy(tmp_path / "policy")
    flags = (*_FLAGS, f"--workdir={tmp_path / 'run'}", f"--policy={tmp_path / 'policy'}")
    chosen = (f"--objective={objective}", f"--credit={kind}", "--rollouts=2")
    out = programs.succeed("run_spa", *flags, *chosen)
    assert re.search(r"^RESULT base_success=", out, re.M)
    assert not (runs.make(tmp_path / "run").round(0).policy / "heads.safetensors").exists()


def _refused(workdir, stage: str, *flags: str) -> str:
    done = programs.run(stage, f"--workdir={workdir}", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not list(workdir.rglob("done.json")) + list(workdir.rglob("*.safetensors"))
    return done.stderr


def test_refusals_as_a_user_sees_them(policy, tmp_path):
    """rft with nothing won; a group of one, in a whole run."""
    lost = [t for t in runs.episodes(30) if not t.success][:9]
    store.write(runs.make(tmp_path).round(0).annotated, lost)
    said = _refused(tmp_path, "train_ppo", f"--policy={policy}", "--objective=rft")
    assert "none of the 9 episodes was won" in said and "--objective=rft" in said
    said = _refused(tmp_path, "run_spa", f"--policy={policy}", "--objective=grpo", "--rollouts=1")
    assert "--rollouts" in said and "--objective=grpo" in said
