"""The flags of the programs: one help for all, whole runs' flagfiles, misspelt names."""

import ast
import subprocess
import sys

import pytest

from tests import programs

PRESETS = programs.ROOT / "experiments" / "presets"
_WHOLE = '''"""All of it.

    python -m a.program
"""
from experiments import flags as flags_lib
from spa_jax.settings import sections
from spa_jax.stage_config import Settings

def main(argv):
    print(flags_lib.from_flags())

flags_lib.run_program(main, reads=[type(config) for _, config in sections(Settings())])
'''
_STAGE = '''"""A stage."""
from absl import flags
from experiments import flags as flags_lib
from spa_jax.config import EnvConfig, SamplingConfig
from spa_jax.stage_config import ExploreConfig

def main(argv):
    run = flags_lib.from_flags()
    said = {
        "run": run.policy, "stage": flags_lib.stage_policy(), "workdir": str(run.workdir),
        "split": run.settings.explore.split, "own split": flags_lib.given("split"),
        "redo": flags_lib.redo(), "name": flags.FLAGS.name,
    }
    print(said)

flags.DEFINE_string("name", "policy", "Where to write.")
flags_lib.run_program(main, reads=(EnvConfig, SamplingConfig, ExploreConfig), stage_policy=True)
'''


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for name, text in (("whole", _WHOLE), ("stage", _STAGE)):
        (folder / f"{name}.py").write_text(text)
    return folder


def _run(program, *flags, columns="100"):
    environment = programs.environment() | {"COLUMNS": columns}
    return subprocess.run(
        [sys.executable, str(program), *map(str, flags)],
        cwd=programs.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def _said(written, *flags):
    done = _run(written / "stage.py", *flags)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["100", "60"])
def test_help_of_a_run_is_short(written, columns):
    done = _run(written / "whole.py", "--help", columns=columns)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= int(columns)
    assert lines[0] == "All of it."
    assert "What you must choose:" in lines and "What you may tune:" in lines
    assert "The rest:" not in lines and "--helpfull" in lines[-1]
    flags = [line for line in lines if line.startswith("  --")]
    first = [flag.split("=")[0].strip() for flag in flags[:4]]
    assert first == ["--flagfile", "--workdir", "--policy", "--seed"]
    assert any("--ppo_learning_rate=1e-05" in flag for flag in flags)


def test_helpfull_lists_every_flag_with_its_range(written):
    for program in ("whole", "stage"):
        done = _run(written / f"{program}.py", "--helpfull")
        assert done.returncode == 0
        assert "The rest:" in done.stdout and "--ppo_value_clip=0.2" in done.stdout
        text = " ".join(done.stdout.split())
        assert "It is at least 0 and below 1." in text and "One of loss, reward." in text


def test_help_of_a_stage_shows_its_own_flags(written):
    done = _run(written / "stage.py", "--help")
    assert done.returncode == 0
    for flag in ("--name=policy", "--temperature=1.0", "--top_k=0", "--redo=", "--policy= "):
        assert f"\n  {flag}" in done.stdout
    assert "ppo_learning_rate" not in done.stdout and "--sft_ema" not in done.stdout


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ppo_learning_rat=1"], "--ppo_learning_rat; did you mean --ppo_learning_rate?"),
        (["--temprature=1"], "unknown flag --temprature; did you mean --temperature?"),
        (["--xyzzy"], "unknown flag --xyzzy; --help"),
        (["--ppo_learning_rate=-1"], "--ppo_learning_rate=-1 must be above 0"),
        (["--temperature=nan"], "--temperature=nan must be a finite number"),
        (["--slots=sixteen"], "sixteen"),
        (["--kl=both"], "loss"),
        (["--lora_targets=q,w"], "--lora_targets=q,w: 'w' is none of q"),
        (["--objective=grpo", "--rollouts=1"], "--objective=grpo compares"),
        (["--seed=-1"], "seed"),
        (["a_word"], "unknown argument 'a_word'; flags begin with --"),
        (["--flagfile=/no/such/file"], "/no/such/file"),
    ],
)
def test_a_mistake_is_told_in_one_line(written, flags, words):
    done = _run(written / "stage.py", "--workdir=W", *flags)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_misspelt_flag_in_a_flagfile_is_refused(written, tmp_path):
    (tmp_path / "f").write_text("--workdir=W\n--ppo_learning_rat=1\n")
    done = _run(written / "stage.py", f"--flagfile={tmp_path / 'f'}")
    assert done.returncode == 2 and "did you mean --ppo_learning_rate?" in done.stderr


def test_the_workdir_has_no_default(written):
    done = _run(written / "stage.py")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --workdir is not set: name the folder of the run, for example "
        "--workdir=runs/mine\n"
    )


# --- flagfiles --------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["quickstart", "webshop_llama3.2_3b"])
def test_a_stage_reads_a_whole_runs_flagfile(written, preset):
    file = PRESETS / f"{preset}.flags"
    said = _said(written, f"--flagfile={file}")
    assert f"--policy={said['run']}" in file.read_text()
    assert f"--workdir={said['workdir']}" in file.read_text()
    assert f"--split={said['split']}" in file.read_text()
    assert said["stage"] == "" and not said["own split"]


def test_a_policy_of_the_command_line_is_the_stages(written):
    """What is given for the stage wins, wherever the run's flagfile stands."""
    file = PRESETS / "quickstart.flags"
    for flags in (["--policy=mine"], ["--policy", "mine"], ["-policy=mine"]):
        said = _said(written, *flags, f"--flagfile={file}", "--split=heldout", "--redo=evaluate")
        assert (said["stage"], said["run"]) == ("mine", "models/smollm2-135m-instruct")
        assert (said["split"], said["own split"], said["redo"]) == ("heldout", True, "evaluate")
    said = _said(written, f"--flagfile={file}", "--workdir=other")
    assert (said["split"], said["workdir"], said["stage"]) == ("explore", "other", "")


def test_a_policy_in_a_flagfile_of_the_stages_own_is_the_stages(written, tmp_path):
    (tmp_path / "inner").write_text("--split=valid\n")
    (tmp_path / "own").write_text(
        f"# a comment\n--policy=mine\n--workdir=W\n--name=x\n--flagfile={tmp_path / 'inner'}\n"
    )
    said = _said(written, "--flagfile", tmp_path / "own")
    assert (said["stage"], said["run"]) == ("mine", "models/smollm2-135m-instruct")
    assert (said["split"], said["own split"], said["name"]) == ("valid", True, "x")
    (tmp_path / "inner").write_text("--nocredit_residual\n--split=valid\n")
    said = _said(written, f"--flagfile={tmp_path / 'own'}")
    assert (said["stage"], said["run"], said["own split"]) == ("", "mine", False)


def test_a_runs_policy_is_the_pretrained_one(written):
    done = _run(written / "whole.py", "--workdir=W", "--policy=mine", "--seed=3")
    assert done.returncode == 0, done.stderr
    assert "policy='mine', seed=3" in done.stdout
