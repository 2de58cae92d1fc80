"""What the compiler says of a run's stages: does it fit, what travels, what is copied, how long."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import jax

from spa_jax.chips import Chip
from spa_jax.compiler.hlo import Program as Hlo
from spa_jax.compiler.stages import Program, Stage
from spa_jax.sampling.programs import Shape

_GIB, _GB, _TERA = 2**30, 1e9, 1e12
# What a refusal says: of a whole program, or of its temporaries alone.
_USED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])")
_UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of a stage, or of one program of it.

    Attributes:
      name: its name.
      compiled: whether the compiler takes it.
      gib: memory a device; of a refusal, what the compiler would have needed, 0 if it does not say.
      collective_gb: what a device exchanges in one run, GB (1e9 bytes).
      cache_copies: copies of a layer's keys or values in one run.
      ms: of one run, by the compiler's cycles.
      flops: of its products, and by theory (0: not said).
      kinds: GB by kind of collective.
      outside: GB of collectives outside of loops.
      why: what the compiler said when it refused it.
    """

    name: str
    compiled: bool
    gib: float
    collective_gb: float = 0.0
    cache_copies: int = 0
    ms: float = 0.0
    flops: tuple[float, float] = (0.0, 0.0)
    kinds: dict[str, float] = dataclasses.field(default_factory=dict)
    outside: float = 0.0
    why: str = ""

    def line(self) -> str:
        """Of a program, for a reader."""
        if not self.compiled:
            return f"  {self.name}: refused: {self.why}"
        parts = [f"{self.gib:.2f} GiB", f"{self.ms:.1f} ms"]
        dots, theory = self.flops
        if dots:
            ratio = f" ({dots / theory:.2f} of theory)" if theory else ""
            parts.append(f"{dots / _TERA:.2f} TFLOP in products{ratio}")
        parts += [f"{kind} {size:.2f} GB" for kind, size in sorted(self.kinds.items())]
        if self.collective_gb:
            parts.append(f"{self.outside:.2f} GB of these outside of the layers")
        return f"  {self.name}: " + ", ".join(parts)


def of_program(program: Program, stage: Stage, chip: Chip) -> Verdict:
    """Compiles a program and reads what came of it."""
    lowered = program.lower()
    try:
        compiled = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        gib = float(used[1]) * _UNITS[used[2]] + program.beside / _GIB if used else 0.0
        why = " ".join(str(error).split("\n\n")[0].split())[:300]
        return Verdict(program.name, False, gib, why=why)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "the compiler says nothing of a program"
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total = arguments + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    hlo = Hlo(text)
    copies = 0
    if stage.cache is not None:
        copies = hlo.copies(cache_elements(stage.cache))
    return Verdict(
        program.name,
        True,
        (total + program.beside) / _GIB,
        collective_gb=hlo.collective_bytes / _GB,
        cache_copies=copies,
        ms=1e3 * hlo.cycles / chip.hertz,
        flops=(hlo.flops, program.flops),
        kinds={kind: size / _GB for kind, size in hlo.by_kind().items()},
        outside=sum(c.total for c in hlo.collectives if not c.in_loop) / _GB,
    )


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Without JAX's cache, which writes programs for devices that are not here and reads none."""
    caches = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", caches)


def cache_elements(shape: Shape) -> int:
    """Numbers in a layer's keys of all slots on a device; its values have as many."""
    config, heads = shape.config, shape.config.num_kv_heads // len(shape.devices)
    return shape.slots * heads * config.head_dim * shape.context_length


def of_stage(stage: Stage, chip: Chip) -> tuple[Verdict, list[Verdict]]:
    """(the stage, its programs): the largest memory, and the sums of the rest."""
    found = [of_program(program, stage, chip) for program in stage.programs]
    return (
        Verdict(
            stage.name,
            all(v.compiled for v in found),
            max(v.gib for v in found),
            collective_gb=sum(v.collective_gb for v in found),
            cache_copies=sum(v.cache_copies for v in found),
            ms=sum(v.ms for v in found),
        ),
        found,
    )


def lines(stages: Iterable[Stage], chip: Chip) -> Iterator[str]:
    """What is printed: each stage's programs, its line, and in the end the result's."""
    found: list[tuple[Verdict, bool]] = []
    for stage in stages:
        verdict, of_programs = of_stage(stage, chip)
        fits = verdict.compiled and verdict.gib <= chip.hbm_gib
        found.append((verdict, fits))
        yield from (one.line() for one in of_programs)
        yield (
            f"STAGE {verdict.name} compiled={int(verdict.compiled)} fits={int(fits)} "
            f"gib={verdict.gib:.2f} plan_gib={stage.plan.total / _GIB:.2f} "
            f"collective_gb={verdict.collective_gb:.2f} cache_copies={verdict.cache_copies} "
            f"ms={verdict.ms:.1f}"
        )
    verdicts = [verdict for verdict, _ in found]
    yield (
        f"RESULT stages={len(found)} compiled={sum(v.compiled for v in verdicts)} "
        f"fits={sum(fits for _, fits in found)} "
        f"collective_gb={max(v.collective_gb for v in verdicts):.2f} "
        f"cache_copies={sum(v.cache_copies for v in verdicts)}"
    )
