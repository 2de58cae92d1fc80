"""Says what each stage needs of a device's memory, and whether it fits; no weights are read.

    python -m experiments.plan --model=llama-3.2-3b --devices=8 --hbm_gib=80 \
        --flagfile=experiments/presets/alfworld_llama3.2_3b.flags

    python -m experiments.plan --model=llama-3.2-3b --compile=v5e:2x4 --partition=mesh \
        --mesh=fsdp:8 --flagfile=experiments/presets/alfworld_llama3.2_3b.flags

With --compile the TPU's own compiler compiles every program of every stage for that topology,
without a TPU (`make setup-tpu` once; minutes a stage), and a line a stage says what it made of it.

--model is a Hugging Face folder or its config.json (by default that of --policy), or a name:
smollm2-135m, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b.  All flags of `run_spa` count: rows,
adapters, dtypes, --remat.  Two tables: parameters whole on every device (--partition=pmap), and cut
over --mesh (all devices, if it is empty).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import flags as flags_lib
from spa_jax import chips
from spa_jax.compiler import topology as topology_lib
from spa_jax.compiler import verdict
from spa_jax.compiler.stages import Stages
from spa_jax.config import ComputeConfig, LoraConfig, RowsConfig, SamplingConfig
from spa_jax.errors import UserError
from spa_jax.models import limits, shapes
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import hf_config
from spa_jax.models.kernels import choice
from spa_jax.sampling import tuning
from spa_jax.stage_config import AdaptedStage, Settings
from spa_jax.training import memory, partition
from spa_jax.training.memory import Need

_GIB = 2**30
_ROOM = 0.9  # of the memory: what stands beside the arrays, and the plan's own error
_COLUMNS = tuple(field.name for field in dataclasses.fields(Need))


def model_config(model: str) -> ModelConfig:
    """The shape of a folder, of a config.json, or of a name in `shapes.NAMED`.

    Raises:
      UserError: it is none of them, or a model that is not supported.
    """
    if model in shapes.NAMED:
        return shapes.NAMED[model]
    path = pathlib.Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"--model={model}: {path} is no file; give a Hugging Face folder, its config.json, or "
            f"one of {', '.join(shapes.NAMED)}"
        )
    return hf_config.read(path)


def stages(settings: Settings, config: ModelConfig, fsdp: int, tensor: int = 1) -> dict[str, Need]:
    """What each stage needs of a device, at its most demanding moment."""
    rows, lora = settings.rows, settings.adapters
    scoring = memory.forward(config, rows, fsdp=fsdp, tensor=tensor)
    # The plan is of accelerators; how much is read at once is the same on all of them.
    tuned = tuning.of("gpu", config.num_kv_heads)
    read = tuned.rows(settings.sampling.slots) * tuned.chunks[-1]

    def update(stage: AdaptedStage, **trained: Any) -> Need:
        return memory.update(config, rows, lora(stage), fsdp=fsdp, tensor=tensor, **trained)

    progress = [scoring]
    if lora("progress").rank or settings.progress.trunk == "trained":
        progress.append(update("progress"))
    by_stage = {
        "sft": [
            update("sft", train_layers=settings.sft.train_layers, averaged=settings.sft.ema > 0)
        ],
        "explore": [memory.exploration(config, settings.sampling, read)],
        "train_progress": progress,
        "train_ppo": [scoring, update("ppo", train_layers=settings.ppo.train_layers)],
    }
    return {name: max(needs, key=lambda n: n.total) for name, needs in by_stage.items()}


def table(needs: dict[str, Need], hbm_gib: float) -> str:
    """GiB a device, a line a stage."""
    lines = [f"{'GiB a device':16}" + "".join(f"{name:>13}" for name in (*_COLUMNS, "total"))]
    for stage, need in needs.items():
        values = [getattr(need, name) / _GIB for name in (*_COLUMNS, "total")]
        verdict = "fits" if fits(need, hbm_gib) else "does not fit"
        lines.append(f"{stage:16}" + "".join(f"{v:13.2f}" for v in values) + f"  {verdict}")
    return "\n".join(lines)


def fits(need: Need, hbm_gib: float) -> bool:
    """Whether a device of this memory has it, and a tenth to spare."""
    return need.total <= _ROOM * hbm_gib * _GIB


def mesh_of(rows: RowsConfig, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor): of --mesh, or all devices share each parameter."""
    return partition.mesh_shape(rows.mesh, devices) if rows.mesh else (1, devices, 1)


def compile_for(topology: str, settings: Settings, config: ModelConfig) -> None:
    """Prints what the compiler makes of every stage's programs on a topology.

    Raises:
      UserError: the topology is not known, or the compiler is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # this machine's part is to lower
    chip = chips.of(topology)
    devices = topology_lib.devices(topology)
    config = dataclasses.replace(config, compute=choice.without_auto(config.compute))
    rows = settings.rows
    where = f"--partition={rows.partition}" + (f" --mesh={rows.mesh}" if rows.mesh else "")
    print(
        f"{topology}: {len(devices)} devices of {chip.hbm_gib:g} GiB, {where}; a microbatch is "
        f"{rows.rows_per_device} x {rows.row_length} tokens a device; "
        f"--attention={config.compute.attention}; milliseconds are the compiler's cycles, without "
        "waiting and without Pallas kernels",
        flush=True,
    )
    for line in verdict.lines(Stages(settings, config, devices), chip):
        print(line, flush=True)


def main(argv: Sequence[str]) -> None:
    del argv
    devices, hbm, topology = _DEVICES.value, _HBM.value, _COMPILE.value
    if not topology and (devices < 1 or hbm <= 0):
        raise UserError(f"--devices={devices} --hbm_gib={hbm:g}: give both, above 0, or --compile")
    settings = flags_lib.settings()
    model, rows = _MODEL.value or flags.FLAGS.policy, settings.rows
    config = model_config(model)
    limits.check_length(config, rows.row_length, "--row_length")
    compute = settings.compute
    on_tpu = bool(topology) or compute.attention == "splash"
    compute = compute.resolved("tpu" if on_tpu else "gpu")
    config = dataclasses.replace(config, compute=compute)
    if topology:
        compile_for(topology, settings, config)
        return
    count = sum(x.size for x in jax.tree.leaves(memory.shapes(config)))
    print(
        f"{model}: {count / 1e6:.0f}e6 parameters; weights {compute.param_dtype}, products "
        f"{compute.compute_dtype}, --remat={compute.remat}, --attention={compute.attention}; "
        f"{rows.rows_per_device} x {rows.row_length} tokens a device and microbatch, "
        f"{settings.sampling.slots} episodes at once on each"
    )
    data, fsdp, tensor = mesh_of(rows, devices)
    result = []
    for kind, parts in (("pmap", (1, 1)), ("mesh", (fsdp, tensor))):
        where = f"data:{data},fsdp:{fsdp}" if kind == "mesh" else "parameters whole"
        where += f",tensor:{tensor}" if kind == "mesh" and tensor > 1 else ""
        needs = stages(settings, config, *parts)
        print(f"\n--partition={kind}, {devices} devices, {where}\n{table(needs, hbm)}")
        result += [f"{name}_{kind}_gib={need.total / _GIB:.2f}" for name, need in needs.items()]
        result.append(f"fits_{kind}={all(fits(need, hbm) for need in needs.values())}")
    print(
        f"\nA stage fits if it leaves {1 - _ROOM:.0%} of {hbm:g} GiB free. Less is needed with "
        "--remat=layer, fewer --rows_per_device or a shorter --row_length, --lora_rank, a mesh "
        "of more devices, fewer --slots."
    )
    print("RESULT " + " ".join(result))


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string(
        "model", "", "A Hugging Face folder, its config.json, or a name; empty: --policy."
    )
    _DEVICES = flags.DEFINE_integer("devices", 0, "How many devices share the run.")
    _HBM = flags.DEFINE_float("hbm_gib", 0.0, "Memory of a device, in GiB.")
    shown = ("policy", "lora_stages", "sft_train_layers", "sft_ema", "ppo_train_layers")
    _COMPILE = flags.DEFINE_string(
        "compile", "", "A TPU topology to compile for, such as v5e:4x4, v5p:2x2x2 or v6e:2x4."
    )
    configs = (SamplingConfig, RowsConfig, LoraConfig, ComputeConfig)
    reads = (*configs, *shown)
    flags_lib.run_program(main, reads=reads, stage=False, needs_workdir=False)
