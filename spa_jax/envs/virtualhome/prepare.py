"""Makes a folder of tasks from the ActivityPrograms corpus."""

import collections
import dataclasses
import hashlib
import random
import shutil
import zlib
from pathlib import Path

import tqdm

from spa_jax.envs.virtualhome.corpus import Corpus, Program
from spa_jax.envs.virtualhome.making import LeftOut, check_solved, check_worth
from spa_jax.envs.virtualhome.tasks import write_task
from spa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What came of the corpus.

    Attributes:
      programs: the programs that were read.
      tasks: the tasks written, by split.
      left_out: how many (program, scene) pairs gave no task, by reason.
    """

    programs: int
    tasks: dict[str, int]
    left_out: dict[str, int]


def split_of(program: Program, seed: int, valid: float, heldout: float) -> str:
    """The split of a program: programs with the same steps are in the same one."""
    text = "\n".join([str(seed), *program.lines]).lower()
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if draw < heldout:
        return "heldout"
    return "valid" if draw < heldout + valid else "train"


def prepare(
    corpus: Corpus,
    out: Path,
    *,
    seed: int,
    valid: float,
    heldout: float,
    scenes: int,
    programs: int | None = None,
) -> Prepared:
    """Writes OUT/{train,valid,heldout}/<task>; nothing is there until everything is.

    Each program is tried in `scenes` of the scenes, drawn by the seed.  A task is written when
    its own program has solved it through the interface.

    Args:
      corpus: the programs and scenes.
      out: the folder to make.
      seed: other seeds, other splits, scenes and initial states.
      valid: the share of the programs in "valid".
      heldout: the share of the programs in "heldout".
      scenes: in how many scenes each program is tried.
      programs: only that many programs, evenly spaced; None: all.

    Raises:
      UserError: if the folder exists, or a number makes no sense.
    """
    if out.exists():
        raise UserError(f"--out={out} exists already; remove it, or choose another folder")
    if not 0 <= valid <= valid + heldout < 1 or valid < 0 or heldout < 0:
        raise UserError(f"--valid={valid} --heldout={heldout}: shares that leave some for training")
    if not 1 <= scenes <= len(corpus.scenes):
        raise UserError(f"--scenes={scenes}: there are {len(corpus.scenes)}, 1 is the least")
    chosen = corpus.programs()
    if programs is not None:
        if programs < 1:
            raise UserError(f"--programs={programs}: at least 1")
        chosen = chosen[:: max(1, len(chosen) // programs)][:programs]
    scratch = out.with_name(f".{out.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was interrupted
    scratch.mkdir(parents=True)
    tasks = collections.Counter({"train": 0, "valid": 0, "heldout": 0})
    left_out: collections.Counter[str] = collections.Counter()
    for program in tqdm.tqdm(chosen, desc="programs", unit="program"):
        split = split_of(program, seed, valid, heldout)
        for scene in random.Random(f"{seed}/{program.key}").sample(corpus.scenes, scenes):
            try:
                _write(corpus, program, scene, seed, scratch / split)
                tasks[split] += 1
            except LeftOut as error:
                left_out[str(error)] += 1
    scratch.rename(out)
    return Prepared(len(chosen), dict(tasks), dict(left_out.most_common()))


def _write(corpus: Corpus, program: Program, scene: str, seed: int, folder: Path) -> None:
    """Makes, checks and writes one task, or raises LeftOut."""
    made = corpus.prepare(program, scene, zlib.crc32(f"{seed}/{scene}/{program.key}".encode()))
    check_worth(made)
    check_solved(made)
    source = program.source.removeprefix("results_").rpartition("programs_")[2]
    write_task(folder / f"{scene}-{source}-{program.name}", made.task, made.graph)
