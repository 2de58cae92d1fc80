"""Builds VirtualHome tasks from the ActivityPrograms corpus.

    python -m experiments.prepare_virtualhome --data=DIR --out=OUT --seed=0

DIR holds the corpus (withoutconds/ and initstate/), the scenes (TrimmedTestScene*_graph.json) and
VirtualHome's resources/, at any depth. Writes OUT/{train,valid,heldout}/<task>, split by program;
every task is solved by its own program, which is its expert. About 3 minutes on one core.
"""

import pathlib
import time
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.envs.virtualhome import prepare
from spa_jax.envs.virtualhome.corpus import Corpus, unpacked

_DATA = flags.DEFINE_string("data", None, "Folder of corpus, scenes and resources.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the tasks; it must not exist.", required=True)
_VALID = flags.DEFINE_float("valid", 0.1, "Share of the programs for validation.")
_HELDOUT = flags.DEFINE_float("heldout", 0.1, "Share of the programs that are held out.")
_SCENES = flags.DEFINE_integer("scenes", 1, "In how many of the scenes each program is tried.")
_PROGRAMS = flags.DEFINE_integer("programs", None, "Only that many programs; without it, all.")


def main(argv: Sequence[str]) -> None:
    del argv
    started = time.time()
    out = pathlib.Path(_OUT.value)
    with unpacked(pathlib.Path(_DATA.value)) as data:
        prepared = prepare.prepare(
            Corpus(data),
            out,
            seed=flags_lib.SEED.value,
            valid=_VALID.value,
            heldout=_HELDOUT.value,
            scenes=_SCENES.value,
            programs=_PROGRAMS.value,
        )
    print(f"{prepared.programs} programs, {_SCENES.value} of the scenes each")
    for reason, count in prepared.left_out.items():
        print(f"  left out {count}: {reason}")
    tasks = " ".join(f"{split}={count}" for split, count in prepared.tasks.items())
    print(
        f"RESULT tasks={sum(prepared.tasks.values())} {tasks} "
        f"left_out={sum(prepared.left_out.values())} seconds={time.time() - started:.1f} out={out}"
    )


if __name__ == "__main__":
    flags_lib.run(main, flags_lib.SEED)
