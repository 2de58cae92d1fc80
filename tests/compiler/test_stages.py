"""Every program of a run, by the real compiler of a TPU that is not here."""

import dataclasses
import functools

import pytest

from spa_jax.chips import of as chip_of
from spa_jax.compiler import topology, verdict
from spa_jax.compiler.hlo import Program
from spa_jax.compiler.stages import Stages
from spa_jax.config import ComputeConfig, RowsConfig, SamplingConfig
from spa_jax.models.config import ModelConfig
from spa_jax.sampling import programs
from spa_jax.stage_config import Settings
from spa_jax.training import memory

pytestmark = pytest.mark.slow

COMPUTE = ComputeConfig(
    compute_dtype="bfloat16", attention="splash", matmul_dtype="compute", remat="layer"
)
CONFIG = ModelConfig(
    vocab_size=2048,
    hidden_size=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=2048,
    compute=COMPUTE,
)
BF16 = 2  # bytes


def _settings(mesh: str) -> Settings:
    rows = RowsConfig(
        row_length=256,
        rows_per_device=1,
        policy_slots=64,
        step_slots=8,
        share_prefix=False,
        partition="mesh",
        mesh=mesh,
    )
    sampling = SamplingConfig(slots=10, context_length=768)
    return Settings(rows=rows, sampling=sampling, compute=COMPUTE)


@functools.cache
def _stages(name: str, mesh: str) -> dict:
    stages = Stages(_settings(mesh), CONFIG, topology.devices(name))
    return {stage.name: stage for stage in stages}


@functools.cache
def _compiled(name: str, mesh: str, stage: str, program: str = "accumulate") -> Program:
    programs = {p.name: p for p in _stages(name, mesh)[stage].programs}
    return Program(programs[program].lower().compile().as_text())


def _layers() -> int:
    """Bytes of all layers' matrices in bfloat16."""
    return BF16 * memory.layer_matrices(CONFIG)


EMBEDDING = BF16 * CONFIG.vocab_size * CONFIG.hidden_size


@pytest.mark.parametrize(
    ("stage", "name", "mesh"),
    [("sft", "v5e:2x4", "fsdp:8"), ("sft", "v5e:4x4", "fsdp:16"), ("ppo", "v5e:2x4", "fsdp:8")],
)
def test_an_update_moves_what_fsdp_moves_on_any_number_of_chips(stage, name, mesh):
    """A layer's weights twice and its gradients once, in bfloat16, and the embedding twice."""
    floor = 3 * _layers() + 2 * EMBEDDING
    program = _compiled(name, mesh, stage)
    assert floor <= program.collective_bytes <= 1.02 * floor
    outside = [c for c in program.collectives if not c.in_loop and c.size > EMBEDDING / 100]
    assert all(c.size <= EMBEDDING * 1.01 for c in outside), "more than the embedding is whole"
    float32 = sum(c.total for c in program.collectives if c.dtype == "f32")
    assert float32 < 0.02 * floor, "numbers travel in twice the width"


def test_a_pass_moves_each_layer_once():
    program = _compiled("v5e:2x4", "fsdp:8", "scoring", "pass")
    floor = _layers() + EMBEDDING
    assert floor <= program.collective_bytes <= 1.1 * floor


def test_rows_of_several_groups_cost_their_gradients_more():
    """data 2 x fsdp 4: the parts' gradients are added up once more, each device's own."""
    alone = 3 * _layers() + 2 * EMBEDDING
    program = _compiled("v5e:2x4", "data:2,fsdp:4", "sft")
    assert alone < program.collective_bytes < 1.3 * alone


def test_gradients_are_scattered_and_not_added_up_everywhere():
    assert _compiled("v5e:2x4", "fsdp:8", "sft").by_kind()["reduce-scatter"] == _layers()


@pytest.mark.parametrize("heads", [2, 1])
def test_the_engine_copies_no_cache(heads):
    """In the order that a TPU writes in place; in the arrays' own, decoding does."""
    config = dataclasses.replace(CONFIG, num_kv_heads=heads)
    stages = Stages(_settings("fsdp:8"), config, topology.devices("v5e:2x4"))
    for stage in (s for s in stages if s.cache is not None):
        found = verdict.of_stage(stage, chip_of("v5e:2x4"))[0]
        assert found.compiled and found.cache_copies == 0 and found.ms > 0, stage.name
        shape = stage.cache
    copy = programs.lower(shape, ["copy"])["copy"]
    assert _copies(copy, shape) == 0
    plain = dataclasses.replace(shape, tuning=dataclasses.replace(shape.tuning, order=None))
    name = f"decode {plain.context_length}"
    assert _copies(programs.lower(plain, [name])[name], plain) > 0


def test_an_engine_of_four_chips_copies_no_cache_and_moves_no_weight():
    """What a step moves: activations twice a layer, and the logits; a key head a chip."""
    config = dataclasses.replace(CONFIG, num_kv_heads=4)
    settings = _settings("fsdp:8")
    # A layer's keys are as large as nothing else, and the chip's own memory has no room for them.
    sampling = SamplingConfig(slots=64, context_length=4096, sampling_tensor=4)
    settings = dataclasses.replace(settings, sampling=sampling)
    stages = Stages(settings, config, topology.devices("v5e:2x4"))
    for stage in (s for s in stages if s.cache is not None):
        assert len(stage.cache.devices) == 4
        (program,) = stage.programs
        compiled = program.lower().compile()
        found, memory_ = Program(compiled.as_text()), compiled.memory_analysis()
        assert found.copies(verdict.cache_elements(stage.cache)) == 0, stage.name
        arguments = memory_.argument_size_in_bytes
        assert arguments == pytest.approx(stage.plan.parameters + stage.plan.cache, rel=0.02)
        tokens = {"prefill": stage.cache.rows * stage.cache.tuning.chunks[-1]}
        activations = BF16 * tokens.get(stage.name, sampling.slots) * config.hidden_size
        logits = 4 * sampling.slots * config.vocab_size
        steps = stage.cache.steps if stage.name == "decode" else 1
        moved = (2 * config.num_layers + 1) * activations + logits
        assert found.collective_bytes <= 1.1 * (steps * moved + logits)


def _copies(lowered, shape: programs.Shape) -> int:
    return Program(lowered.compile().as_text()).copies(verdict.cache_elements(shape))


def test_all_stages_have_a_line_each(capsys):
    stages = Stages(_settings("fsdp:8"), CONFIG, topology.devices("v5e:2x4"))
    wanted = [s for s in stages if s.name in ("scoring", "estimator")]
    *_, first, second, last = [
        line for line in verdict.lines(wanted, chip_of("v5e:2x4")) if line[0] != " "
    ]
    assert first.startswith("STAGE scoring compiled=1 fits=1 gib=")
    assert second.startswith("STAGE estimator compiled=1 fits=1 gib=")
    assert last.startswith("RESULT stages=2 compiled=2 fits=2 collective_gb=")
    assert last.endswith("cache_copies=0")


def test_what_does_not_fit_is_refused_with_what_it_needs():
    sampling = SamplingConfig(slots=1024, context_length=8192)  # 26 GB of keys and values
    settings = dataclasses.replace(_settings("fsdp:8"), sampling=sampling)
    stages = {s.name: s for s in Stages(settings, CONFIG, topology.devices("v5e:2x4"))}
    chip = chip_of("v5e:2x4")
    verdict_, (decode,) = verdict.of_stage(stages["decode"], chip)
    assert not decode.compiled and decode.gib > chip.hbm_gib and "hbm" in decode.why.lower()
    line = list(verdict.lines([stages["decode"]], chip))[1]
    assert line.startswith(f"STAGE decode compiled=0 fits=0 gib={verdict_.gib:.2f} plan_gib=")
