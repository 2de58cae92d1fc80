"""A run knows itself: run.json, the fingerprints of stages, and --redo."""

import dataclasses
import json
import os
import pathlib

import pytest

from spa_jax import provenance, redo
from spa_jax import run as run_lib
from spa_jax import settings as settings_lib
from spa_jax.config import EnvConfig, LoraConfig, RowsConfig, SamplingConfig
from spa_jax.data_config import DataConfig
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.stage_config import CreditConfig, MethodConfig, PpoConfig, Settings, SftConfig
from tests import tiny

ADAPTED_TRUNK = MethodConfig(lora_stages=("progress",))
INPUTS = {"base policy": "aaaa", "annotated episodes": "bbbb"}


def _run(folder: pathlib.Path, seed: int = 0, **sections) -> Run:
    return Run(folder, "models/tiny", seed, Settings(**sections))


def _touch(*paths: pathlib.Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("something\n")


@pytest.fixture(autouse=True)
def _not_warned(monkeypatch):
    monkeypatch.setattr(provenance, "_warned", False)


# --- run.json ---------------------------------------------------------------------------------


def test_run_json_says_what_runs(tmp_path):
    run = _run(tmp_path, seed=3, ppo=PpoConfig(learning_rate=1e-3))
    provenance.record_run(run, "run_spa", ["run_spa.py", "--workdir=W", "--seed=3"])
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["command"] == "python -m experiments.run_spa --workdir=W --seed=3"
    assert (said["seed"], said["policy"], said["workdir"]) == (3, "models/tiny", str(tmp_path))
    rate = said["settings"]["ppo_learning_rate"]
    assert rate == {"value": 1e-3, "default": 1e-5, "changed": True}
    assert [k for k, s in said["settings"].items() if s["changed"]] == ["ppo_learning_rate"]
    assert said["settings"].keys() == settings_lib.by_flag(run.settings).keys()
    assert {"python", "jax", "numpy", "spa_jax"} <= said["versions"].keys()
    assert said["machine"]["platform"] == "cpu" and said["machine"]["cores"] >= 1
    assert said["start"].endswith("+00:00") and said["earlier"] == []
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_earlier_programs_are_kept_and_bounded(tmp_path):
    run = _run(tmp_path)
    for number in range(60):
        provenance.record_run(dataclasses.replace(run, seed=number), "sft", ["sft"])
    changed = _run(tmp_path, credit=CreditConfig(beta=0.2))
    provenance.record_run(changed, "annotate", ["annotate"])
    provenance.record_run(run, "report", ["report"])
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["program"] == "report" and len(said["earlier"]) == 50
    last = said["earlier"][-1]
    assert (last["program"], last["settings"]) == ("annotate", {"beta": 0.2})
    assert last["command"] == "python -m experiments.annotate" and "commit" in last
    assert said["earlier"][-2]["seed"] == 59


def test_run_json_holds_no_secret(tmp_path):
    token = tmp_path / "token"
    token.write_text("open sesame")
    address = "http://me:password@host:8000"
    env = EnvConfig(env_address=address, env_token_file=str(token))
    provenance.record_run(_run(tmp_path, env=env), "explore", ["x", f"--env_address={address}"])
    text = (tmp_path / "run.json").read_text()
    assert "password" not in text and "sesame" not in text
    assert "http://***@host:8000" in text and str(token) in text
    assert json.loads(text)["environment"]["identity"] == provenance.SERVED


# --- digests ----------------------------------------------------------------------------------


def test_a_file_is_read_again_when_it_changes(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    one = provenance.file_digest(file)
    assert provenance.file_digest(file) == one
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert provenance.file_digest(file) != one
    with pytest.raises(UserError, match="nothing: no such file"):
        provenance.file_digest(tmp_path / "nothing")


def test_a_policy_is_its_weights(tmp_path):
    policy = tiny.tiny_policy(tmp_path / "policy")
    name = provenance.policy_digest(policy)
    (policy / "heads.safetensors").write_bytes(b"a value head")
    policy.rename(tmp_path / "moved")
    assert provenance.policy_digest(tmp_path / "moved") == name
    weights = tmp_path / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"0")
    assert provenance.policy_digest(tmp_path / "moved") != name


def test_an_estimator_is_its_head_and_its_adapter(tmp_path):
    _touch(tmp_path / "heads.safetensors")
    alone = provenance.estimator_digest(tmp_path)
    _touch(tmp_path / "adapter" / "adapter_model.safetensors")
    assert provenance.estimator_digest(tmp_path) != alone


def test_the_data_of_an_environment_are_its_files(tmp_path):
    env = EnvConfig(alfworld_data=str(tmp_path))
    found = lambda *splits: provenance.environment_identity(env, tmp_path / "games", splits)  # noqa: E731
    assert found() is None
    _touch(tmp_path / "train" / "a" / "game", tmp_path / "valid" / "b" / "game")
    all_of_it, train = found(), found("train")
    _touch(tmp_path / "server.log", tmp_path / ".cache" / "x", tmp_path / "store-wal")
    assert (found(), found("train")) == (all_of_it, train)
    _touch(tmp_path / "valid" / "c" / "game")
    assert found("train") == train and found() != all_of_it
    assert found("train", "none") == found()  # the splits are no folders of it
    generated = provenance.environment_identity(EnvConfig(), tmp_path)
    assert generated == found()


def test_an_environment_of_ones_own_is_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _touch(tmp_path / "parts" / "mine.py")
    (tmp_path / "parts" / "mine.py").write_text("raise ValueError('it is not imported')")
    env = EnvConfig(env="custom", custom_data="parts.mine:Mine")
    one = provenance.environment_identity(env, tmp_path)
    (tmp_path / "parts" / "mine.py").write_text("raise ValueError('nor is this')  # changed")
    assert one and provenance.environment_identity(env, tmp_path) != one
    nowhere = dataclasses.replace(env, custom_data="no.such.module:Mine")
    assert provenance.environment_identity(nowhere, tmp_path) is None
    served = dataclasses.replace(env, env_address="http://host:1")
    assert provenance.environment_identity(served, tmp_path) == provenance.SERVED


# --- fingerprints -----------------------------------------------------------------------------


def test_a_stage_goes_on_with_the_same_settings(tmp_path):
    run = _run(tmp_path)
    folder = run.round(0).ppo
    provenance.check_stage(run, "ppo", folder, inputs=INPUTS)
    _touch(folder / "metrics.jsonl")
    before = run_lib.fingerprint(folder).read_text()
    provenance.check_stage(run, "ppo", folder, inputs=INPUTS)
    assert run_lib.fingerprint(folder).read_text() == before


def test_every_difference_is_named_and_both_remedies(tmp_path):
    run = _run(tmp_path, ppo=PpoConfig(learning_rate=1e-5))
    folder = run.round(1).ppo
    provenance.check_stage(run, "ppo", folder, inputs=INPUTS)
    _touch(folder / "metrics.jsonl")
    ppo = PpoConfig(learning_rate=1e-3, step_baseline=True)
    other = _run(tmp_path, seed=5, ppo=ppo, lora=LoraConfig(rank=4))
    with pytest.raises(UserError) as refused:
        provenance.check_stage(other, "ppo", folder, inputs=INPUTS | {"base policy": "cccc"})
    for words in (
        "--ppo_learning_rate was 1e-05, is 0.001",
        "--step_baseline was false, is true",
        "--lora_rank was 0, is 4",
        "--seed was 0, is 5",
        "the base policy's weights are others",
        "another --workdir",
        "--redo=ppo:1, which removes this stage and what follows from it",
    ):
        assert words in str(refused.value)
    assert "annotated episodes" not in str(refused.value)


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        ("ppo", {"ppo": PpoConfig(checkpoint_every=1), "rows": RowsConfig(row_length=2048)}),
        ("ppo", {"credit": CreditConfig(beta=0.0), "sft": SftConfig(epochs=1.0)}),
        ("ppo", {"lora": LoraConfig(alpha=8.0)}),  # of no adapter
        ("sft", {"sft": SftConfig(row_buckets=3), "sampling": SamplingConfig(slots=2)}),
        ("explore", {"sampling": SamplingConfig(slots=2), "env": EnvConfig(env_wait_s=1.0)}),
        ("evaluate", {"env": EnvConfig(max_retries=7), "method": MethodConfig(iterations=2)}),
        ("demos", {"data": DataConfig(generate_heldout=3), "sampling": SamplingConfig(top_k=4)}),
    ],
)
def test_how_it_runs_may_change(stage, sections, tmp_path):
    run, folder = _run(tmp_path), tmp_path / "folder"
    provenance.check_stage(run, stage, folder, inputs={})
    _touch(folder / "metrics.jsonl")
    provenance.check_stage(_run(tmp_path, **sections), stage, folder, inputs={})


@pytest.mark.parametrize(
    ("stage", "sections", "flag"),
    [
        ("demos", {"env": EnvConfig(max_steps=3)}, "--max_steps"),
        ("sft", {"sft": SftConfig(ema=0.9)}, "--sft_ema"),
        ("explore", {"sampling": SamplingConfig(temperature=0.5)}, "--temperature"),
        ("explore", {"sampling": SamplingConfig(context_length=512)}, "--context_length"),
        ("explore", {"env": EnvConfig(env="webshop")}, "--env was alfworld, is webshop"),
        ("progress", {"lora": LoraConfig(rank=1), "method": ADAPTED_TRUNK}, "--lora_rank"),
        ("annotate", {"credit": CreditConfig(credit="terminal")}, "--credit"),
        ("games", {"data": DataConfig(generate_train=3)}, "--generate_train"),
    ],
)
def test_what_is_computed_may_not(stage, sections, flag, tmp_path):
    run, folder = _run(tmp_path), tmp_path / "folder"
    provenance.check_stage(run, stage, folder, inputs={})
    _touch(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=flag):
        provenance.check_stage(_run(tmp_path, **sections), stage, folder, inputs={})


def test_a_setting_of_a_stage_is_told_by_the_flag_that_gives_it(tmp_path):
    run, folder = _run(tmp_path), tmp_path / "folder"
    provenance.check_stage(run, "demos", folder, inputs={}, settings={"games": 16})
    _touch(folder / "metrics.jsonl")
    flags = {"games": "demo_games"}
    with pytest.raises(UserError, match="--demo_games was 16, is 3"):
        provenance.check_stage(run, "demos", folder, inputs={}, settings={"games": 3}, flags=flags)


def test_another_environment_is_told_and_a_served_one_is_not(tmp_path):
    data = tmp_path / "data"
    _touch(data / "train" / "game")
    run = _run(tmp_path, env=EnvConfig(alfworld_data=str(data)))
    folder = run.round(0).explore
    provenance.check_stage(run, "explore", folder, inputs={"policy": "a"})
    _touch(run.round(0).episodes)
    data.rename(tmp_path / "moved")  # a path is not what the data are
    moved = _run(tmp_path, env=EnvConfig(alfworld_data=str(tmp_path / "moved")))
    provenance.check_stage(moved, "explore", folder, inputs={"policy": "a"})
    served = _run(tmp_path, env=EnvConfig(env_address="http://host:1"))
    provenance.check_stage(served, "explore", folder, inputs={"policy": "a"})
    _touch(tmp_path / "moved" / "train" / "another")
    with pytest.raises(UserError, match="the environment's data are others.*--redo=explore:0"):
        provenance.check_stage(moved, "explore", folder, inputs={"policy": "a"})


def test_a_stage_may_have_values_of_its_own(tmp_path):
    run = _run(tmp_path)
    folder = run.evaluation("spa")
    own = {"temperature": 0.0, "split": "heldout", "seed": 7}
    provenance.check_stage(run, "evaluate", folder, inputs={}, settings=own)
    _touch(folder / "summary.json")
    provenance.check_stage(run, "evaluate", folder, inputs={}, settings=own)
    with pytest.raises(UserError, match="--temperature was 0.0, is 1.0.*--redo=evaluate:spa"):
        provenance.check_stage(
            run, "evaluate", folder, inputs={}, settings=own | {"temperature": 1.0}
        )
    with pytest.raises(UserError, match="--seed was 7, is 0"):
        provenance.check_stage(run, "evaluate", folder, inputs={}, settings=own | {"seed": 0})


def test_a_run_from_before_goes_on_with_one_line(tmp_path, capsys):
    run = _run(tmp_path)
    here = run.round(0)
    _touch(here.episodes, here.annotated)
    provenance.check_stage(run, "explore", here.explore, inputs={})
    provenance.check_stage(run, "annotate", here.annotated, inputs={})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "started before runs recorded their settings" in said[0]
    assert not list(tmp_path.rglob("*fingerprint*"))


def test_what_was_refused_before_it_did_anything_may_change(tmp_path):
    run = _run(tmp_path)
    folder = run.round(0).explore
    provenance.check_stage(run, "explore", folder, inputs={})
    _touch(folder / "server.log", folder / "chat.json", folder / "tensorboard" / "events")
    (folder / "checkpoints").mkdir()
    other = _run(tmp_path, sampling=SamplingConfig(context_length=2048))
    provenance.check_stage(other, "explore", folder, inputs={})
    _touch(folder / "trajectories.jsonl")
    provenance.check_stage(other, "explore", folder, inputs={})


def test_a_setting_that_is_newer_had_its_default(tmp_path):
    run = _run(tmp_path)
    folder = run.round(0).ppo
    provenance.check_stage(run, "ppo", folder, inputs={})
    _touch(folder / "metrics.jsonl")
    path = run_lib.fingerprint(folder)
    old = json.loads(path.read_text())
    del old["settings"]["kl"], old["settings"]["critic"]
    old["settings"]["gone"] = 1
    path.write_text(json.dumps(old))
    provenance.check_stage(run, "ppo", folder, inputs={})
    other = _run(tmp_path, ppo=PpoConfig(critic="ridge"))
    with pytest.raises(UserError, match="--critic was head, is ridge"):
        provenance.check_stage(other, "ppo", folder, inputs={})


def test_a_file_has_its_fingerprint_beside_it(tmp_path):
    run = _run(tmp_path)
    file = run.round(0).annotated
    provenance.check_stage(run, "annotate", file, inputs={"episodes": "a"})
    assert [p.name for p in file.parent.iterdir()] == ["annotated.fingerprint.json"]
    _touch(file)
    with pytest.raises(UserError, match="the episodes are others.*--redo=annotate:0"):
        provenance.check_stage(run, "annotate", file, inputs={"episodes": "b"})


def test_a_folder_of_ones_own_is_removed_by_hand(tmp_path):
    run, folder = _run(tmp_path), tmp_path / "elsewhere"
    provenance.check_stage(run, "explore", folder, inputs={"policy": "a"})
    _touch(folder / "trajectories.jsonl")
    with pytest.raises(UserError, match="remove .*elsewhere to make it anew"):
        provenance.check_stage(run, "explore", folder, inputs={"policy": "b"})


# --- redo -------------------------------------------------------------------------------------


def _whole(folder: pathlib.Path) -> Run:
    run = _run(folder)
    for part in ("train", "valid"):
        _touch(run.demonstrations(part))
    for number in (0, 1):
        here = run.round(number)
        _touch(here.episodes, here.features, here.progress / "heads", here.annotated)
        _touch(run_lib.fingerprint(here.annotated), here.policy / "weights")
    _touch(run.games / "game", run.base / "weights", run.estimator, run.report, run.json)
    _touch(run.evaluation("sft") / "x", run.evaluation("spa") / "x")
    return run


def _left(run: Run) -> set[str]:
    files = (path for path in run.workdir.rglob("*") if path.is_file())
    return {path.relative_to(run.workdir).as_posix() for path in files}


ROUND_0 = {
    "explore": {"iteration_0/explore/trajectories.jsonl", "iteration_0/explore/features.npz"},
    "progress": {"iteration_0/progress/heads"},
    "annotate": {"iteration_0/annotated.jsonl", "iteration_0/annotated.fingerprint.json"},
    "ppo": {"iteration_0/ppo/policy/weights"},
}
JUDGED = {"estimator.json", "report.html"}


@pytest.mark.parametrize("stage", ROUND_0)
def test_redo_of_a_round_removes_what_follows(stage, tmp_path, capsys):
    run = _whole(tmp_path)
    before = _left(run)
    removed = redo.remove(run, f"{stage}:0")
    order = list(ROUND_0)
    gone = set().union(*(ROUND_0[s] for s in order[order.index(stage) :]))
    gone |= JUDGED | {"eval/spa/x"}
    gone |= {path for path in before if path.startswith("iteration_1/")}
    assert before - _left(run) == gone
    assert len(capsys.readouterr().out.splitlines()) == len(removed)
    assert not any(path.exists() for path in removed)


def test_redo_of_the_second_round_leaves_the_first(tmp_path):
    run = _whole(tmp_path)
    before = _left(run)
    redo.remove(run, "ppo", 1)
    gone = JUDGED | {"eval/spa/x", "iteration_1/ppo/policy/weights"}
    assert before - _left(run) == gone


def test_redo_of_what_all_starts_from(tmp_path):
    kept = {"run.json"}
    demos = {f"demos/{part}/trajectories.jsonl" for part in ("train", "valid")}
    for stage, left in (("sft", kept | demos | {"games/game"}), ("demos", kept | {"games/game"})):
        run = _whole(tmp_path / stage)
        redo.remove(run, stage)
        assert _left(run) == left
    run = _whole(tmp_path / "games")
    redo.remove(run, "games")
    assert _left(run) == kept


def test_redo_of_evaluations(tmp_path):
    run = _whole(tmp_path)
    before = _left(run)
    redo.remove(run, "evaluate:spa")
    assert before - _left(run) == JUDGED | {"eval/spa/x"}
    redo.remove(run, "evaluate")
    assert not run.evaluations.exists() and run.round(1).policy.exists()


@pytest.mark.parametrize(
    "stage", ["sfT", "explore:first", "sft:1", "evaluate:../sft", "evaluate:..", ""]
)
def test_redo_of_no_stage_is_refused(stage, tmp_path):
    run = _whole(tmp_path)
    before = _left(run)
    with pytest.raises(UserError, match="give games, demos, sft, explore:ROUND"):
        redo.remove(run, stage)
    assert _left(run) == before


def test_redo_of_what_is_not_there(tmp_path, capsys):
    assert redo.remove(_run(tmp_path), "ppo:7") == []
    assert "nothing to remove" in capsys.readouterr().out
