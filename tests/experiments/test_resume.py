"""A training stage killed and run again ends bit for bit as an unbroken one.

SIGKILL loses the updates since the checkpoint; SIGTERM, which a scheduler sends before it takes
the machine away, loses none, and nor does SIGINT, which is Ctrl-C.
"""

import pathlib
import signal
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from spa_jax.training import metrics
from tests import programs, tiny
from tests.experiments import small

# What a clock says, and how much memory the process has had, differs.
CLOCK = ("time", "tokens_per_second", "seconds", "memory_gib")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> pathlib.Path:
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


# Stage, and what it trains: its flags, and how many lines of metrics there are when it is killed:
# behind its checkpoint, so that updates are lost and made again.
STAGES = {
    "sft": (
        (
            "--sft_updates=24",
            "--sft_batch_size=4",
            "--sft_checkpoint_every=5",
            "--sft_learning_rate=1e-2",
            "--sft_eval_every=3",
            "--sft_patience=20",
            "--sft_train_layers=1",
            "--sft_ema=0.9",
        ),
        8,
    ),
    "train_progress": (
        ("--progress_epochs=40", "--progress_batch_size=4", "--progress_width=16"),
        23,
    ),
    "train_ppo": (
        (
            "--ppo_epochs=8",
            "--ppo_batch_size=4",
            "--ppo_checkpoint_every=5",
            "--ppo_learning_rate=1e-2",
            "--ppo_kl_coef=0.1",
        ),
        8,
    ),
    "train_ppo adapters": (
        (
            "--ppo_epochs=8",
            "--ppo_batch_size=4",
            "--ppo_checkpoint_every=5",
            "--ppo_learning_rate=1e-2",
            "--lora_rank=2",
            "--lora_targets=v,up",
        ),
        8,
    ),
}


def _weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            found[f"{file.relative_to(folder)}:{name}"] = array
    return found


def _without_clock(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in CLOCK}


Run = Callable[[str], pathlib.Path]


@pytest.fixture(scope="module")
def unbroken(policy, tmp_path_factory) -> Run:
    """name of a stage -> the folder that it wrote, run once."""
    found: dict[str, pathlib.Path] = {}

    def run(name: str) -> pathlib.Path:
        if name not in found:
            workdir = tmp_path_factory.mktemp("unbroken")
            found[name] = small.prepare(name.split()[0], workdir)
            programs.succeed(*_command(name, workdir, policy))
        return found[name]

    return run


def _command(name: str, workdir: pathlib.Path, policy: pathlib.Path) -> tuple[str, ...]:
    flags, _ = STAGES[name]
    return (name.split()[0], f"--workdir={workdir}", f"--policy={policy}", *small.ROWS, *flags)


# Fast: every stage killed, one told to stop; training adapters differs in its state only.
KILLS = [
    pytest.param(name, how, marks=() if fast else pytest.mark.slow)
    for name in STAGES
    for how, fast in (
        (signal.SIGKILL, name != "train_ppo adapters"),
        (signal.SIGTERM, name == "train_ppo"),
        (signal.SIGINT, False),
    )
]


@pytest.mark.parametrize(("name_of_stage", "how"), KILLS)
def test_a_killed_run_ends_as_an_unbroken_one(name_of_stage, how, unbroken, policy, tmp_path):
    kill_at, stage = STAGES[name_of_stage][1], name_of_stage.split()[0]
    command = _command(name_of_stage, tmp_path, policy)
    outs = {"unbroken": unbroken(name_of_stage), "broken": small.prepare(stage, tmp_path)}
    file = outs["broken"] / "metrics.jsonl"
    process = programs.start(*command)
    said = programs.kill_when(process, lambda: programs.lines(file) >= kill_at, how=how)
    assert not (outs["broken"] / "done.json").exists()
    # One that was being written when the kill came has a longer name, and is no checkpoint.
    names = [p.name for p in (outs["broken"] / "checkpoints").iterdir()]
    steps = [int(name) for name in names if name.isdigit()]
    if how is not signal.SIGKILL:
        assert process.returncode == 128 + how, said
        name = "SIGTERM" if how is signal.SIGTERM else "Ctrl-C"
        assert f"stopped by {name} after update" in said and "Traceback" not in said
        saved = f"after update {max(steps)} of"
        assert saved in said, "what is saved is not what was said"
    written = metrics.read_metrics(file)[-1]["update"]
    assert steps and 0 < max(steps), "nothing to resume from"
    if stage != "train_progress":  # which writes a line an epoch
        assert max(steps) == written if how is not signal.SIGKILL else max(steps) <= written
    programs.succeed(*command)

    ours, theirs = _weights(outs["broken"]), _weights(outs["unbroken"])
    assert ours and ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    records = {
        name: [_without_clock(r) for r in metrics.read_metrics(out / "metrics.jsonl")]
        for name, out in outs.items()
    }
    assert records["broken"] == records["unbroken"]
    if stage == "sft":
        start = _weights(policy)
        kept = {
            name
            for name, array in start.items()
            if array.tobytes() == ours[f"policy/{name}"].tobytes()
        }
        assert any("layers.0." in name for name in kept)
        assert not any("layers.1." in name or "model.norm" in name for name in kept)
        # The three ask the same function whether they are done.
        before = outs["broken"].stat().st_mtime_ns
        assert "already done" in programs.succeed(*command)
        assert outs["broken"].stat().st_mtime_ns == before
