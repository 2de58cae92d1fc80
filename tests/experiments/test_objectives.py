"""Every objective with every credit: their data, and the stage that trains on them."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from experiments import common, train_ppo, train_progress
from spa_jax import store
from spa_jax.attribution import credit
from spa_jax.config import ComputeConfig, LoraConfig, RowsConfig
from spa_jax.models import tree
from spa_jax.models.io import huggingface, tensors
from spa_jax.rl.objectives import OBJECTIVES
from spa_jax.stage_config import PpoConfig
from spa_jax.training import metrics as metrics_lib
from spa_jax.training import partition, ppo_data, scoring
from tests import programs, tiny

ROWS = RowsConfig(row_length=128, policy_slots=64, step_slots=16, rows_per_device=1)
CREDITS = ("spa", "terminal", "uniform", "shuffled", "random")


def _episodes(kind: str = "spa"):
    """Four tasks of three rollouts, with the rewards that this credit gives."""
    rng = np.random.default_rng(1)
    played = [
        tiny.random_trajectory(
            rng, f"task_{i // 3}", i % 3, steps=1 + i % 3, context=8, final_reward=float(i % 4 == 0)
        )
        for i in range(12)
    ]
    c, mask = np.zeros((12, 3), np.float32), np.zeros((12, 3), np.float32)
    for i, t in enumerate(played):
        c[i, : len(t.steps)] = [step.contribution for step in t.steps]
        mask[i, : len(t.steps)] = 1
    final = np.array([t.final_reward for t in played], np.float32)
    rewards = np.asarray(credit.credit(kind, c, final, mask, jax.random.key(0))).tolist()
    return [
        dataclasses.replace(
            t,
            steps=tuple(
                dataclasses.replace(s, reward=r) for s, r in zip(t.steps, rs, strict=False)
            ),
        )
        for t, rs in zip(played, rewards, strict=True)
    ]


@pytest.mark.parametrize(("objective", "kind"), itertools.product(OBJECTIVES, CREDITS))
def test_every_objective_takes_every_credit(objective, kind):
    episodes = _episodes(kind)
    ppo = PpoConfig(objective=objective)
    values = np.full((12, 3), 0.1, np.float32) if OBJECTIVES[objective].critic else None
    table = ppo_data.make_table(episodes, values, ppo)
    update = ppo_data.make_update(episodes, table, np.arange(12), ROWS, ppo, devices=1)
    assert update.counts["steps"] == sum(len(t.steps) for t in episodes)
    given = np.concatenate([b.advantages[b.rows.step_mask > 0] for b in update.batches])
    assert np.isfinite(given).all() and np.std(given) > 0.05
    other = ppo_data.make_table(_episodes("uniform" if kind != "uniform" else "spa"), values, ppo)
    assert np.abs(other.advantages - table.advantages).max() > 0.05


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def _trained(folder, policy, ppo, rows=ROWS, kind="spa", rank=0):
    """(metrics a line, heads that were saved) of a run of the stage; some weight must move."""
    data = folder / "iteration_0" / "annotated.jsonl"
    store.write(data, _episodes(kind))
    out = folder / "iteration_0" / "ppo"
    train_ppo.run(out, str(policy), data, ppo, rows, 0, LoraConfig(rank=rank), policy)
    _, before = huggingface.load_pretrained(policy)
    _, after = huggingface.load_pretrained(out / "policy")
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert any(jax.tree.leaves(moved))
    return metrics_lib.read_metrics(out / "metrics.jsonl"), tensors.load_heads(out / "policy")


def test_without_a_critic_there_is_no_value_anywhere(policy, tmp_path):
    ppo = PpoConfig(objective="grpo", batch_size=6, learning_rate=1e-3, train_layers=1)
    lines, heads = _trained(tmp_path, policy, ppo, kind="terminal")
    assert len(lines) == 2 and not heads
    for line in lines:
        assert {"policy_loss", "kl", "entropy", "effective_share"} <= line.keys()
        assert not {"value_loss", "explained_variance"} & line.keys()
        assert 0 < line["effective_share"] <= 1 + 1e-6
        assert np.isfinite(list(line.values())).all()


def test_a_critic_that_is_fitted_before_the_pass(policy, tmp_path):
    ppo = PpoConfig(critic="ridge", batch_size=6, learning_rate=1e-3, train_layers=1)
    lines, heads = _trained(tmp_path, policy, ppo, kind="terminal")
    assert len(lines) == 2 and not heads
    for line in lines:
        assert "explained_variance" in line and "value_loss" not in line
        assert np.isfinite(list(line.values())).all()


def test_a_later_rounds_ridge_critic_reads_the_pass_that_the_estimator_made(
    policy, tmp_path, monkeypatch
):
    later = tiny.tiny_policy(tmp_path / "later", seed=1)
    data, episodes = tmp_path / "iteration_1" / "annotated.jsonl", _episodes("terminal")
    store.write(data, episodes)
    explored = tmp_path / "iteration_1" / "explore" / "trajectories.jsonl"
    explored.parent.mkdir()
    train_progress.scores_of(common.load_policy(policy), explored, episodes, ROWS)
    passes, score = [], scoring.score

    def counted(*args, title, **kwargs):
        passes.append(title)
        return score(*args, title=title, **kwargs)

    monkeypatch.setattr(scoring, "score", counted)
    for critic, expected in (("ridge", ["sampler mismatch"]), ("head", ["values"])):
        passes.clear()
        ppo = PpoConfig(critic=critic, batch_size=6, train_layers=1)
        out = tmp_path / "iteration_1" / critic
        train_ppo.run(out, str(later), data, ppo, ROWS, 0, LoraConfig(), policy)
        assert passes == expected


def test_the_frozen_layers_are_read_in_the_estimators_pass(policy, tmp_path, monkeypatch):
    """Not if they are others; and what was kept says what a pass of their own says."""
    data, episodes = tmp_path / "iteration_0" / "annotated.jsonl", _episodes()
    store.write(data, episodes)
    explored = tmp_path / "iteration_0" / "explore" / "trajectories.jsonl"
    explored.parent.mkdir()
    train_progress.scores_of(common.load_policy(policy), explored, episodes, ROWS, ppo_layers=1)
    file = train_progress.below_file(explored.parent)
    saved, passes, computed = file.read_bytes(), [], scoring.lower_states

    def counted(*args, title, **kwargs):
        passes.append(title)
        return computed(*args, title=title, **kwargs)

    monkeypatch.setattr(scoring, "lower_states", counted)
    ppo = PpoConfig(critic="ridge", batch_size=6, learning_rate=1e-3, train_layers=1)
    lines = {}

    def trained(name, of):
        passes.clear()
        out = tmp_path / "iteration_0" / name
        train_ppo.run(out, str(of), data, ppo, ROWS, 0, LoraConfig(), policy)
        lines[name] = metrics_lib.read_metrics(out / "metrics.jsonl")
        assert not file.exists()  # it has served
        return passes

    assert trained("kept", policy) == []
    assert trained("computed", policy) == ["frozen layers"]
    for ours, wanted in zip(lines["kept"], lines["computed"], strict=True):
        for key in ("policy_loss", "grad_norm", "entropy"):
            assert ours[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)
    file.write_bytes(saved)
    assert trained("others", tiny.tiny_policy(tmp_path / "others", seed=1)) == ["frozen layers"]


def test_states_of_frozen_layers_are_kept_in_bfloat16_too(policy, tmp_path):
    read = common.load_policy(policy, compute=ComputeConfig(compute_dtype="bfloat16"))
    explored, episodes = tmp_path / "explore" / "trajectories.jsonl", _episodes()
    explored.parent.mkdir()
    train_progress.scores_of(read, explored, episodes, ROWS, ppo_layers=1)
    frozen = {"policy": tree.split(read.config, read.params, 1)[1]}
    file = train_progress.below_file(explored.parent)
    kept = scoring.cached_lower_states(file, read.config, frozen, episodes)
    wanted = scoring.lower_states(
        read.config, partition.replicate(frozen), episodes, ROWS,
        devices=jax.device_count(), title="lower",
    )  # fmt: skip
    for a, b in zip(kept, wanted, strict=True):
        assert a.dtype == b.dtype == jax.numpy.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.05)
    assert scoring.cached_lower_states(file, read.config, frozen, episodes[1:]) is None
    file.write_bytes(file.read_bytes()[:1000])  # torn
    assert scoring.cached_lower_states(file, read.config, frozen, episodes) is None


def test_rft_clones_the_won_episodes(policy, tmp_path):
    ppo = PpoConfig(objective="rft", batch_size=3, learning_rate=1e-2, epochs=4, train_layers=1)
    lines, heads = _trained(tmp_path, policy, ppo)
    assert len(lines) == 4 and not heads
    assert all(line["rollout_success"] == 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


SLOW = {
    "rloo": (PpoConfig(objective="rloo", kl="reward", kl_coef=0.1), "uniform"),
    "reinforce++": (PpoConfig(objective="reinforce++", truncate_ratio=2.0), "shuffled"),
    "gae=token": (PpoConfig(gae="token", kl_coef=0.1), "random"),
    "both": (PpoConfig(gae="token", kl="reward", kl_coef=0.1), "spa"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("rloo", ""), ("reinforce++", "data:2,fsdp:4"), ("gae=token", ""), ("both", "data:2,fsdp:4")],
)
def test_the_stage_trains_with(name, mesh, policy, tmp_path):
    """All layers, the top layer alone, and adapters."""
    ppo, kind = SLOW[name]
    rows = dataclasses.replace(ROWS, partition="mesh" if mesh else "pmap", mesh=mesh)
    for trained, layers, rank in (("all", 0, 0), ("top", 1, 0), ("adapters", 0, 2)):
        ppo = dataclasses.replace(ppo, batch_size=6, learning_rate=1e-3, train_layers=layers)
        lines, heads = _trained(tmp_path / trained, policy, ppo, rows, kind, rank)
        assert len(lines) == 2 and ("value" in heads) == OBJECTIVES[ppo.objective].critic
        assert all(np.isfinite(list(line.values())).all() for line in lines)


_FLAGS = (
    "--generate_train=6", "--generate_valid=2", "--generate_explore=4", "--generate_heldout=2",
    "--task_types=pick_and_place_simple", "--max_receptacles=4", "--max_steps=15",
    "--max_new_tokens=6", "--context_length=1024", "--row_length=1024", "--policy_slots=256",
    "--rows_per_device=1", "--slots=4", "--sft_epochs=1", "--sft_batch_size=3", "--games=2",
    "--split=explore", "--progress_epochs=2", "--ppo_batch_size=4", "--ppo_train_layers=1",
    "--give_up_after=2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "kind"), [("grpo", "spa"), ("rloo", "terminal")])
def test_the_whole_method_runs_with(objective, kind, tmp_path):
    tiny.tiny_policy(tmp_path / "policy")
    flags = (*_FLAGS, f"--workdir={tmp_path / 'run'}", f"--policy={tmp_path / 'policy'}")
    chosen = (f"--objective={objective}", f"--credit={kind}", "--rollouts=2")
    out = programs.succeed("run_spa", *flags, *chosen)
    assert re.search(r"^RESULT base_success=", out, re.M)
    assert not (tmp_path / "run" / "iteration_0" / "ppo" / "policy" / "heads.safetensors").exists()


def _refused(workdir, stage: str, *flags: str) -> str:
    done = programs.run(stage, f"--workdir={workdir}", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not list(workdir.rglob("done.json")) + list(workdir.rglob("*.safetensors"))
    return done.stderr


def test_refusals_as_a_user_sees_them(policy, tmp_path):
    """rft with nothing won; a group of one, in a whole run."""
    lost = [t for t in _episodes() if not t.success]
    store.write(tmp_path / "iteration_0" / "annotated.jsonl", lost)
    said = _refused(tmp_path, "train_ppo", f"--policy={policy}", "--objective=rft")
    assert "none of the 9 episodes was won" in said and "--objective=rft" in said
    said = _refused(tmp_path, "run_spa", f"--policy={policy}", "--objective=grpo", "--rollouts=1")
    assert "--rollouts" in said and "--objective=grpo" in said
