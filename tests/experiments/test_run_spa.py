"""The whole method in one command, with a tiny random policy on real games."""

import dataclasses
import json
import re
import shutil

import pytest

from spa_jax import policy, store
from spa_jax.config import RowsConfig
from spa_jax.models.io import huggingface
from spa_jax.stages import annotate
from tests import programs, runs, tiny
from tests.test_chat import DROPS_THOUGHTS

_FLAGS = (
    "--generate_train=6",
    "--generate_valid=2",
    "--generate_explore=8",
    "--generate_heldout=3",
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
    "--games=4",
    "--rollouts=1",
    "--split=explore",
    "--iterations=2",
    "--progress_epochs=2",
    "--ppo_batch_size=4",
    "--ppo_train_layers=1",
    "--give_up_after=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder, its flags and what it printed."""
    root = tmp_path_factory.mktemp("run_spa")
    tiny.tiny_policy(root / "policy")
    flags = (*_FLAGS, f"--workdir={root / 'run'}", f"--policy={root / 'policy'}")
    return root / "run", flags, programs.succeed("run_spa", *flags)


def test_it_ends_with_a_table_and_a_result_line(finished):
    folder, _, out = finished
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(
        r"RESULT base_success=\d\.\d{4} spa_success=\d\.\d{4} spa_grounding=\d\.\d{4} games=3 "
        rf"seconds=[\d.]+ report={re.escape(str(folder / 'report.html'))}",
        last,
    ), last
    assert "base (SFT)" in out and "SPA" in out
    assert "<svg" in (folder / "report.html").read_text()


def test_the_documentation_knows_every_metric(finished):
    folder, _, _ = finished
    page = (programs.ROOT / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`(\w+)`", page)) | {"update", "time"}
    found = {
        name
        for file in folder.rglob("metrics.jsonl")
        for line in file.read_text().splitlines()
        for name in json.loads(line)
    }
    judged = json.loads((folder / "estimator.json").read_text())
    found |= {name for name in judged if not name.endswith(("_low", "_high"))}
    assert len(found) > 40 and not found - known


_OTHERS = {
    "webshop": ("--generate_products=20", "--max_steps=4"),
    "virtualhome": ("--task_types=Turn on,Relax", "--max_steps=6"),
}


@pytest.mark.slow
@pytest.mark.parametrize("env", ["webshop", "virtualhome"])
def test_the_whole_method_on_the_other_environments(env, tmp_path):
    tiny.tiny_policy(tmp_path / "policy")
    out = programs.succeed(
        "run_spa",
        *_FLAGS,
        "--task_types=",
        "--max_receptacles=8",
        f"--env={env}",
        "--generate_train=4",
        "--iterations=1",
        "--context_length=2048",
        "--row_length=2048",
        f"--workdir={tmp_path / 'run'}",
        f"--policy={tmp_path / 'policy'}",
        *_OTHERS[env],
    )
    assert re.search(r"RESULT base_success=\d\.\d{4} spa_success=\d\.\d{4} .* games=3 ", out)
    played = store.read(tmp_path / "run" / "eval" / "spa" / "trajectories.jsonl")
    assert [t.env for t in played] == [env] * 3


def test_every_stage_left_its_files(finished):
    folder, _, _ = finished
    for stage in ("sft", "iteration_0/ppo", "iteration_1/ppo"):
        assert (folder / stage / "policy" / "config.json").exists()
        assert programs.lines(folder / stage / "metrics.jsonl") >= 1
    for name in ("sft", "spa"):
        played = store.read(folder / "eval" / name / "trajectories.jsonl")
        assert len(played) == 3
        assert all(step.contribution is not None for t in played for step in t.steps)


def test_rounds_play_different_games_with_the_newest_policy(finished):
    folder, _, _ = finished
    rounds = [
        store.read(folder / f"iteration_{i}" / "explore" / "trajectories.jsonl") for i in (0, 1)
    ]
    assert not {t.task for t in rounds[0]} & {t.task for t in rounds[1]}
    assert rounds[1][0].policy.endswith("iteration_0/ppo/policy")
    assert rounds[0][0].steps[0].policy_version < rounds[1][0].steps[0].policy_version


def test_only_the_episodes_asked_for_are_annotated(finished, tmp_path):
    folder, _, _ = finished
    whole = store.read(folder / "eval" / "sft" / "trajectories.jsonl")
    bare = [
        dataclasses.replace(
            t, steps=tuple(dataclasses.replace(s, contribution=None, reward=None) for s in t.steps)
        )
        for t in whole
    ]
    store.write(tmp_path / "bare.jsonl", bare)
    rows = RowsConfig(row_length=1024, policy_slots=256, rows_per_device=1)
    run = runs.make(folder, rows=rows)
    annotate.annotate_file(
        run,
        tmp_path / "bare.jsonl",
        out=tmp_path / "out.jsonl",
        progress=run.round(1).progress,
        base=str(run.base),
        keys={whole[1].key},
    )
    first, second, third = store.read(tmp_path / "out.jsonl")
    assert (first, third) == (bare[0], bare[2])
    ours = [step.contribution for step in second.steps]
    assert ours == pytest.approx([step.contribution for step in whole[1].steps], abs=1e-5)


def test_run_again_it_is_done(finished):
    folder, flags, _ = finished
    before = (folder / "iteration_1" / "ppo" / "policy" / "model.safetensors").stat().st_mtime_ns
    again = programs.succeed("run_spa", *flags)
    assert "already done" in again
    after = (folder / "iteration_1" / "ppo" / "policy" / "model.safetensors").stat().st_mtime_ns
    assert before == after


@pytest.mark.slow
def test_a_base_whose_template_drops_thoughts(tmp_path):
    """The format that is given goes through every stage, and its policies remember it."""
    words = tiny.tiny_tokenizer(tmp_path / "words", DROPS_THOUGHTS)
    config = tiny.tiny_config()
    huggingface.save_pretrained(tmp_path / "base", config, tiny.tiny_params(config), words)
    flags = (
        *_FLAGS,
        "--iterations=1",
        f"--base={tmp_path / 'base'}",
        f"--workdir={tmp_path / 'run'}",
    )
    refused = programs.run("run_spa", *flags)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "is not append-only" in refused.stderr and "--chat_format=chatml" in refused.stderr
    assert not (tmp_path / "run").exists()  # at once
    programs.succeed("run_spa", *flags, "--chat_format=chatml")
    trained = policy.load(tmp_path / "run" / "iteration_0" / "ppo" / "policy")
    assert trained.chat_format == "chatml"
    for played in ("iteration_0/explore", "eval/sft", "eval/spa"):
        assert policy.recorded_chat_format(tmp_path / "run" / played) == "chatml"
        for t in store.read(tmp_path / "run" / played / "trajectories.jsonl"):
            opening = trained.chat.first_turn(t.instruction, t.steps[0].observation)
            assert list(t.token_ids[: len(opening)]) == opening
            assert t.step_id[len(opening)] == 0


def test_its_credit_is_judged_by_branches_with_the_settings_that_it_had(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = json.loads((folder / "estimator.json").read_text())
    assert list(before)[0] == "subgoal_auc" and "advantage_correlation" not in before
    out = programs.succeed(
        "judge_credit", f"--workdir={folder}", "--split=heldout", "--episodes=2", "--branches=2"
    )
    assert re.search(r"RESULT episodes=2 steps=\d+ subgoal_auc=", out)
    after = json.loads((folder / "estimator.json").read_text())
    assert before.items() <= after.items()  # the same episodes: they were not played again
    assert {"advantage_correlation", "advantage_correlation_low"} <= after.keys()
    credits = json.loads((folder / "truth" / "credits.json").read_text())["credits"]
    assert {"estimator", "ridge critic", "uniform", "shuffled", "terminal"} <= credits.keys()
    assert credits["estimator"]["advantage_episodes"] == 2
