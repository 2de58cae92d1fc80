"""A user's own mistakes: exit code 2, one clear line, no traceback, nothing half-written."""

import dataclasses
import json
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from spa_jax import store, trajectory
from spa_jax.envs.alfworld.generate import generate
from spa_jax.models import transformer
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.trajectory import Trajectory
from tests import programs, tiny

ROWS = ("--row_length=128", "--policy_slots=64", "--step_slots=16")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> pathlib.Path:
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("games")
    generate(root / "train", games=2, seed=3)
    return root


def _episodes(count: int = 4) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [tiny.random_trajectory(rng, f"task_{i}", context=8) for i in range(count)]


def _refused(workdir: pathlib.Path, stage: str, *flags: str) -> str:
    """Runs a stage that must refuse; its one line of complaint."""
    done = programs.run(stage, f"--workdir={workdir}", *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert "RESULT" not in done.stdout
    left = [p.name for p in workdir.rglob("*") if ".tmp" in p.name or p.name == "done.json"]
    assert not left
    assert not list(workdir.rglob("*.safetensors"))
    return said[0]


# --- games ----------------------------------------------------------------------------------


def test_no_games_flag(policy, tmp_path):
    said = _refused(tmp_path, "explore", f"--policy={policy}")
    assert "--alfworld_data" in said and "generate" in said


def test_a_missing_game_folder(policy, tmp_path):
    nowhere = tmp_path / "nowhere"
    said = _refused(tmp_path / "w", "explore", f"--policy={policy}", f"--alfworld_data={nowhere}")
    assert "--alfworld_data" in said and str(nowhere) in said


def test_a_half_written_game(policy, games, tmp_path):
    copy = tmp_path / "games"
    shutil.copytree(games, copy)
    file = sorted(copy.rglob("game.tw-pddl"))[0]
    file.write_text(file.read_text()[:1000])
    said = _refused(tmp_path / "w", "explore", f"--policy={policy}", f"--alfworld_data={copy}")
    assert str(file) in said and "generate" in said
    assert not list((tmp_path / "w").rglob("trajectories.jsonl"))


def test_a_prompt_longer_than_the_context(policy, games, tmp_path):
    said = _refused(
        tmp_path / "w",
        "explore",
        f"--policy={policy}",
        f"--alfworld_data={games}",
        "--context_length=64",
        "--max_new_tokens=8",
        "--slots=2",
        "--games=1",
        "--rollouts=1",
    )
    assert "--context_length=64" in said and "tokens" in said
    assert not list((tmp_path / "w").rglob("trajectories.jsonl"))


def test_a_dead_server(policy, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = _refused(tmp_path, "explore", f"--policy={policy}", f"--env_address={address}")
    assert address in said and "serve_env" in said


def test_serving_a_missing_folder_or_an_unknown_flag(tmp_path):
    for flags, word in (
        ([f"--alfworld_data={tmp_path / 'no'}", "--port=0"], "--alfworld_data"),
        (["--alfworld=x"], "alfworld"),
        ([], "--alfworld_data"),
    ):
        done = programs.run("serve_env", *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ") and word in done.stderr


# --- records --------------------------------------------------------------------------------


def test_a_corrupt_line_in_the_middle(policy, games, tmp_path):
    """Both to go on exploring and to train on."""
    file = tmp_path / "iteration_0" / "explore" / "trajectories.jsonl"
    store.write(file, _episodes())
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:40] + b"\n"
    file.write_bytes(b"".join(lines))
    said = _refused(tmp_path, "train_progress", f"--policy={policy}", *ROWS)
    assert f"{file}:2" in said
    flags = (f"--policy={policy}", f"--alfworld_data={games}", "--slots=1")
    assert f"{file}:2" in _refused(tmp_path, "explore", *flags)
    assert file.read_bytes() == b"".join(lines)


def test_another_schema_version(policy, tmp_path):
    file = tmp_path / "iteration_0" / "annotated.jsonl"
    file.parent.mkdir(parents=True)
    records = [trajectory.to_json(t) for t in _episodes()]
    records[2]["schema"] = 99
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    said = _refused(tmp_path, "train_ppo", f"--policy={policy}", *ROWS)
    assert f"{file}:3" in said and "99" in said and "schema" in said


def test_missing_records(policy, tmp_path):
    said = _refused(tmp_path, "sft", f"--policy={policy}", *ROWS)
    assert str(tmp_path / "demos" / "train" / "trajectories.jsonl") in said
    said = _refused(tmp_path, "annotate", f"--policy={policy}", *ROWS)
    assert "progress" in said and "train_progress" in said


def test_an_episode_that_no_row_holds(policy, tmp_path):
    file = tmp_path / "iteration_0" / "annotated.jsonl"
    store.write(file, _episodes())
    said = _refused(
        tmp_path, "train_ppo", f"--policy={policy}", "--row_length=16", "--policy_slots=16"
    )
    assert "--row_length" in said and "task_" in said


# --- policies and checkpoints ---------------------------------------------------------------


def test_a_missing_policy(tmp_path):
    store.write(tmp_path / "iteration_0" / "annotated.jsonl", _episodes())
    said = _refused(tmp_path, "train_ppo", f"--policy={tmp_path / 'nowhere'}", *ROWS)
    assert str(tmp_path / "nowhere") in said


def test_a_checkpoint_of_another_shape(policy, tmp_path):
    store.write(tmp_path / "iteration_0" / "annotated.jsonl", _episodes())
    config = dataclasses.replace(tiny.tiny_config(), hidden_size=48)
    params = {"policy": jax.device_get(transformer.init(config, jax.random.key(0)))}
    optimizer = state_lib.adamw(1e-3, clip_norm=1.0, weight_decay=0.0)
    folder = tmp_path / "iteration_0" / "ppo" / "checkpoints"
    checkpoints = Checkpoints(folder, every=1)
    checkpoints.maybe_save(1, lambda: state_lib.create(params, optimizer))
    checkpoints.close()
    said = _refused(tmp_path, "train_ppo", f"--policy={policy}", *ROWS)
    assert str(folder / "1") in said and "--workdir" in said


# --- flags ----------------------------------------------------------------------------------


def test_contradicting_and_unknown_flags(policy, tmp_path):
    said = _refused(tmp_path, "explore", f"--policy={policy}", "--temperature=0", "--top_k=5")
    assert "--temperature=0" in said and "--top_k" in said
    said = _refused(tmp_path, "explore", f"--policy={policy}", "--temprature=1")
    assert "temprature" in said and "--help" in said
    assert "sixteen" in _refused(tmp_path, "explore", f"--policy={policy}", "--slots=sixteen")
    assert "rollouts" in _refused(tmp_path, "explore", "rollouts=3")
    flags = ("--lora_rank=4", "--ppo_train_layers=1")
    said = _refused(tmp_path, "run_spa", f"--policy={policy}", *flags)
    assert "--lora_rank=4" in said and "--ppo_train_layers=1" in said
    said = _refused(tmp_path, "train_ppo", "--lora_rank=4", "--lora_targets=q,w")
    assert "--lora_targets=q,w" in said and "'w'" in said
    arms = "--arms=spa,continued_sft"
    said = _refused(tmp_path, "study", arms, f"--policy={policy}", f"--base={policy}")
    assert f"--base={policy}" in said and "drop --base" in said
    said = _refused(tmp_path, "study", "--arms=spa:credit=all", f"--policy={policy}")
    assert "--arms: spa:credit=all: --credit=all" in said
    assert not list(tmp_path.iterdir())


def test_greedy_episodes_are_not_ppos(policy, tmp_path):
    file = tmp_path / "iteration_0" / "annotated.jsonl"
    sampling = trajectory.Sampling(temperature=0.0)
    store.write(file, [dataclasses.replace(t, sampling=sampling) for t in _episodes()])
    said = _refused(tmp_path, "train_ppo", f"--policy={policy}", *ROWS)
    assert str(file) in said and "--allow_truncated_behaviour" in said


# --- presets --------------------------------------------------------------------------------

PRESETS = sorted((programs.ROOT / "experiments" / "presets").glob("*.flags"))


def test_there_are_presets():
    assert "quickstart.flags" in [p.name for p in PRESETS]


_PARSE = """
import sys
from absl import flags
from experiments import flags as flags_lib
from experiments import study
flags_lib.define_run()
study.define()  # a preset may be a study's
flags.FLAGS(["run_spa", "--flagfile=" + sys.argv[1]])
run = flags_lib.from_flags().settings  # checks that the settings agree with each other
assert run.rows.row_length >= run.sampling.context_length, "a full episode fits no row"
"""


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_every_preset_parses(preset):
    done = subprocess.run(
        [sys.executable, "-c", _PARSE, str(preset)],
        cwd=programs.ROOT,
        env=programs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- the machine ----------------------------------------------------------------------------


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_in_one_line():
    program = (
        "from experiments import flags\n"
        "flags.run(lambda argv: open('/dev/full', 'w').write('x' * 100_000))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the disk is full (") and "make room" in done.stderr
