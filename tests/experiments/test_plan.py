"""The memory planner's program: two tables, and bad input refused."""

import json

import pytest

from experiments import plan
from spa_jax.config import LoraConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import shapes
from spa_jax.models.io import hf_config
from spa_jax.stage_config import MethodConfig, Settings
from spa_jax.training.memory import Need
from tests import programs, tiny


def _written(folder, config):
    """A config.json alone: no weights lie beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config.write(config, "float32", {})))
    return folder


def test_a_model_is_a_folder_a_config_or_a_name(tmp_path):
    folder = _written(tmp_path / "model", shapes.LLAMA_3_2_3B)
    assert plan.model_config("llama-3.2-3b") == shapes.LLAMA_3_2_3B
    assert plan.model_config(str(folder)) == shapes.LLAMA_3_2_3B
    assert plan.model_config(str(folder / "config.json")) == shapes.LLAMA_3_2_3B
    with pytest.raises(UserError, match="--model=nowhere.*smollm2-135m, llama-3.2-3b"):
        plan.model_config("nowhere")


def test_the_whole_method_prints_both_tables(tmp_path):
    folder = _written(tmp_path / "model", tiny.tiny_config())
    done = programs.run(
        "plan",
        f"--model={folder}",
        "--devices=4",
        "--hbm_gib=0.1",
        "--row_length=128",
        "--policy_slots=64",
        "--step_slots=16",
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "--partition=pmap, 4 devices, parameters whole",
        "data:1,fsdp:4",
        "products bfloat16",
        "RESULT sft_pmap_gib=",
    ):
        assert words in done.stdout
    for stage in ("sft", "explore", "train_progress", "train_ppo"):
        assert sum(line.startswith(stage) for line in done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--devices=0", "--hbm_gib=80"), "--devices=0 --hbm_gib=80: give both"),
        (("--compile=v5e",), "--compile=v5e: write CHIP:SHAPE, such as v5e:4x4"),
        (("--compile=h100:8",), "the chips are v4, v5e, v5p, v6e (a GPU's compiler is not asked"),
        (("--devices=8", "--hbm_gib=80", "--row_length=4096"), "--row_length: 4096 tokens exceed"),
        (("--devices=2", "--hbm_gib=80", "--partition=mesh", "--mesh=fsdp:4"), "1 x 4 devices"),
    ],
)
def test_bad_input_is_refused(tmp_path, flags, words):
    folder = _written(tmp_path / "model", tiny.tiny_config())
    done = programs.run("plan", f"--model={folder}", *flags)
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and "RESULT" not in done.stdout


def test_a_3b_model_on_devices_of_80_gib():
    """Full fine-tuning takes 3.2e9 x (4 + 4 + 4 + 8) bytes: one device is too small."""
    rows = RowsConfig(row_length=4096, policy_slots=4096, step_slots=80, rows_per_device=1)
    whole, cut = (plan.stages(Settings(rows=rows), shapes.LLAMA_3_2_3B, fsdp) for fsdp in (1, 8))
    assert whole["sft"].parameters == pytest.approx(3.213e9 * 4, rel=1e-3)
    assert whole["sft"].optimizer == 2 * whole["sft"].parameters
    assert cut["sft"].optimizer == pytest.approx(whole["sft"].optimizer / 8, rel=1e-3)
    assert not plan.fits(whole["sft"], 80) and plan.fits(cut["sft"], 80)
    assert whole["explore"].total == cut["explore"].total  # every device plays with whole weights


def test_adapters_need_no_second_set_of_weights():
    rows = RowsConfig(row_length=1024, rows_per_device=1)
    lora = LoraConfig(rank=8)
    settings = Settings(rows=rows, lora=lora, method=MethodConfig(lora_stages=("ppo",)))
    found = plan.stages(settings, shapes.SMOLLM2_135M, 1)
    assert found["train_ppo"].optimizer < 0.01 * found["sft"].optimizer
    assert found["train_ppo"].gradients < 0.01 * found["sft"].gradients


def test_a_tenth_is_left_free():
    assert plan.fits(Need(parameters=0.89 * 2**30), 1.0)
    assert not plan.fits(Need(parameters=0.91 * 2**30), 1.0)
    assert "does not fit" in plan.table({"sft": Need(logits=2**30)}, 1.0)
