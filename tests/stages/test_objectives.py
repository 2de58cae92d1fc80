"""Every objective with every credit: their data, and the stage that trains on them."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from spa_jax import policy as policy_lib
from spa_jax import store
from spa_jax.attribution import credit
from spa_jax.config import ComputeConfig, LoraConfig
from spa_jax.errors import UserError
from spa_jax.models import tree
from spa_jax.models.io import huggingface, tensors
from spa_jax.rl.objectives import OBJECTIVES
from spa_jax.run import Run
from spa_jax.stage_config import ExploreConfig, MethodConfig, PpoConfig
from spa_jax.stages import train_ppo
from spa_jax.training import estimator_data, partition, ppo_data, scoring
from spa_jax.training import metrics as metrics_lib
from tests import runs, tiny

ROWS = runs.ROWS
CREDITS = ("spa", "terminal", "uniform", "shuffled", "random")
EXPLORE = ExploreConfig(rollouts=3)


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
    least = 0.005 if OBJECTIVES[objective].actions else 0.05  # of random features little is learnt
    values = np.full((12, 3), 0.1, np.float32) if OBJECTIVES[objective].critic else None
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 12, 3, 4)).astype(np.float32)
    scores = scoring.Scores(*hidden, values=None, step_mask=None, log_probs=[])

    def make(episodes):
        if OBJECTIVES[objective].actions:
            q, v = ppo_data.fitted_critic(episodes, scores, ppo)
            return ppo_data.make_table(episodes, v, ppo, action_values=q)
        return ppo_data.make_table(episodes, values, ppo)

    table = make(episodes)
    update = ppo_data.make_update(episodes, table, np.arange(12), ROWS, ppo, devices=1)
    assert update.counts["steps"] == sum(len(t.steps) for t in episodes)
    given = np.concatenate([b.advantages[b.rows.step_mask > 0] for b in update.batches])
    assert np.isfinite(given).all() and np.std(given) > least
    other = make(_episodes("uniform" if kind != "uniform" else "spa"))
    assert np.abs(other.advantages - table.advantages).max() > least


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


def _run(folder, base, ppo, **sections) -> Run:
    """A run whose base policy is given; its rounds explore in groups."""
    method = MethodConfig(base=str(base))
    return runs.make(folder, method=method, ppo=ppo, explore=EXPLORE, **sections)


def _trained(folder, policy, ppo, kind="spa", **sections):
    """(metrics a line, heads that were saved) of a run of the stage; some weight must move."""
    run = _run(folder, policy, ppo, **sections)
    here = run.round(0)
    store.write(here.annotated, _episodes(kind))
    train_ppo.run(run, 0)
    _, before = huggingface.load_pretrained(policy)
    _, after = huggingface.load_pretrained(here.policy)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert any(jax.tree.leaves(moved))
    return metrics_lib.read_metrics(here.ppo / "metrics.jsonl"), tensors.load_heads(here.policy)


def test_without_a_critic_there_is_no_value_anywhere(policy, tmp_path):
    ppo = PpoConfig(objective="grpo", batch_size=6, learning_rate=1e-3, train_layers=1)
    lines, heads = _trained(tmp_path, policy, ppo, kind="terminal")
    assert len(lines) == 2 and not heads
    for line in lines:
        assert {"policy_loss", "kl", "entropy", "effective_share"} <= line.keys()
        assert not {"value_loss", "explained_variance"} & line.keys()
        assert 0 < line["effective_share"] <= 1 + 1e-6
        assert np.isfinite(list(line.values())).all()


@pytest.mark.parametrize("objective", ["archer", "gagpo", "gigpo", "ragen"])
def test_a_pass_with(objective, policy, tmp_path):
    """A value head only with a critic that is trained; ragen learns from one task of the four."""
    ppo = PpoConfig(objective=objective, batch_size=6, learning_rate=1e-3, train_layers=1)
    lines, heads = _trained(tmp_path, policy, ppo, kind="terminal")
    assert len(lines) == (1 if objective == "ragen" else 2)
    assert ("value" in heads) == OBJECTIVES[objective].critic
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert ("explained_variance" in lines[0]) == (objective in ("archer", "ragen"))


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
    later, episodes = tiny.tiny_policy(tmp_path / "later", seed=1), _episodes("terminal")
    passes, score = [], scoring.score

    def counted(*args, title, **kwargs):
        passes.append(title)
        return score(*args, title=title, **kwargs)

    for critic, expected in (("ridge", ["sampler mismatch"]), ("head", ["values"])):
        ppo = PpoConfig(critic=critic, batch_size=6, train_layers=1)
        run = _run(tmp_path / critic, policy, ppo)
        here = run.round(1)
        store.write(here.annotated, episodes)
        here.explore.mkdir()
        estimator_data.scores_of(policy_lib.load(policy), here.episodes, episodes, ROWS)
        passes.clear()
        monkeypatch.setattr(scoring, "score", counted)
        train_ppo.run(run, 1, policy=str(later))
        monkeypatch.undo()
        assert passes == expected


def test_the_frozen_layers_are_read_in_the_estimators_pass(policy, tmp_path, monkeypatch):
    """Not if they are others; and what was kept says what a pass of their own says."""
    episodes = _episodes()
    ppo = PpoConfig(critic="ridge", batch_size=6, learning_rate=1e-3, train_layers=1)
    passes, computed = [], scoring.lower_states

    def counted(*args, title, **kwargs):
        passes.append(title)
        return computed(*args, title=title, **kwargs)

    monkeypatch.setattr(scoring, "lower_states", counted)

    def trained(name, kept, of):
        """The passes of a run of the stage, and its metrics."""
        run = _run(tmp_path / name, policy, ppo)
        here = run.round(0)
        store.write(here.annotated, episodes)
        here.explore.mkdir()
        if kept is not None:
            here.features.write_bytes(kept[0])
            here.lower_states.write_bytes(kept[1])
        passes.clear()
        train_ppo.run(run, 0, policy=str(of))
        assert not here.lower_states.exists()  # it has served
        return list(passes), metrics_lib.read_metrics(here.ppo / "metrics.jsonl")

    first = _run(tmp_path / "explored", policy, ppo).round(0)
    first.explore.mkdir(parents=True)
    read = policy_lib.load(policy)
    estimator_data.scores_of(read, first.episodes, episodes, ROWS, ppo_layers=1)
    features = first.features.read_bytes()
    kept = (features, first.lower_states.read_bytes())
    none, ours = trained("kept", kept, policy)
    one, wanted = trained("computed", None, policy)
    assert (none, one) == ([], ["frozen layers"])
    for line, other in zip(ours, wanted, strict=True):
        for key in ("policy_loss", "grad_norm", "entropy"):
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)
    others = tiny.tiny_policy(tmp_path / "others", seed=1)
    assert trained("others", kept, others)[0] == ["frozen layers"]


def test_states_of_frozen_layers_are_kept_in_bfloat16_too(policy, tmp_path, capsys):
    read = policy_lib.load(policy, compute=ComputeConfig(compute_dtype="bfloat16"))
    here, episodes = runs.make(tmp_path).round(0), _episodes()
    here.explore.mkdir(parents=True)
    estimator_data.scores_of(read, here.episodes, episodes, ROWS, ppo_layers=1)
    frozen = {"policy": tree.split(read.config, read.params, 1)[1]}
    file = here.lower_states
    kept = scoring.cached_lower_states(file, read.config, frozen, episodes)
    wanted = scoring.lower_states(
        read.config,
        partition.Pmap(None, None, frozen=frozen),
        episodes,
        ROWS,
        title="lower",
    )
    for a, b in zip(kept, wanted, strict=True):
        assert a.dtype == b.dtype == jax.numpy.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.05)
    assert scoring.cached_lower_states(file, read.config, frozen, episodes[1:]) is None
    file.write_bytes(file.read_bytes()[:1000])  # torn
    capsys.readouterr()
    assert scoring.cached_lower_states(file, read.config, frozen, episodes) is None
    assert f"{file}: cannot be read (BadZipFile: " in capsys.readouterr().err
    whole = here.features.read_bytes()
    here.features.write_bytes(whole[: len(whole) // 2])
    again = estimator_data.scores_of(read, here.episodes, episodes, ROWS)
    assert "it is computed again" in capsys.readouterr().err
    assert np.isfinite(again.answer_hidden).all()
    estimator_data.scores_of(read, here.episodes, episodes, ROWS)
    assert not capsys.readouterr().err  # it was written again


def test_rft_clones_the_won_episodes(policy, tmp_path):
    ppo = PpoConfig(objective="rft", batch_size=3, learning_rate=1e-2, epochs=4, train_layers=1)
    lines, heads = _trained(tmp_path, policy, ppo)
    assert len(lines) == 4 and not heads
    assert all(line["rollout_success"] == 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_the_weight_of_the_kl_is_adapted_from_update_to_update(policy, tmp_path):
    """Its KL is far below the target, so the weight falls by 0.2 x 6 episodes / 12 an update.

    The next update is made with it, and a checkpoint holds it.
    """
    ppo = PpoConfig(
        kl="reward", kl_coef=0.1, kl_target=50.0, kl_horizon=12.0, batch_size=6, learning_rate=1e-3
    )
    lines, _ = _trained(tmp_path / "adapted", policy, ppo)
    wanted = [0.1, 0.1 * (1 - 0.2 * 6 / 12)]
    assert [line["kl_coef"] for line in lines] == pytest.approx(wanted)
    assert lines[0]["kl_episode"] < 40 and lines[1]["kl_episode"] != lines[0]["kl_episode"]
    stays, _ = _trained(
        tmp_path / "stays", policy, dataclasses.replace(ppo, kl_target=0.0)
    )
    assert lines[0]["policy_loss"] == pytest.approx(stays[0]["policy_loss"])
    assert lines[1]["policy_loss"] != pytest.approx(stays[1]["policy_loss"], rel=1e-6)
    with pytest.raises(UserError, match="--ppo_kl_target"):
        PpoConfig(kl_coef=0.1, kl_target=6.0)


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
        lora = LoraConfig(rank=rank)
        lines, heads = _trained(tmp_path / trained, policy, ppo, kind, rows=rows, lora=lora)
        assert len(lines) == 2 and ("value" in heads) == OBJECTIVES[ppo.objective].critic
        assert all(np.isfinite(list(line.values())).all() for line in lines)
