"""What every program that takes a run does: reads it from the flags, records it, prepares JAX."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments import flags as flags_lib
from spa_jax import exclusive, provenance, redo
from spa_jax import run as run_lib
from spa_jax.config import DistributedConfig
from spa_jax.run import Run
from spa_jax.runtime import distributed, setup

ROUND = "iteration"
# What a program writes of a run, by the names of its locks; one that is not here only reads.
_WRITES: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in ("sft", "explore", "train_progress", "annotate", "train_ppo", "judge_credit")
}
_WRITES["run_spa"] = (*_WRITES, f"evaluate-{run_lib.BASE}", f"evaluate-{run_lib.SPA}")


def define_round() -> None:
    """The flag of the programs that work on one round."""
    flags.DEFINE_integer(ROUND, 0, "The round, from 0.", lower_bound=0)


def run(
    program: str,
    main: Callable[[Run], Any],
    *,
    reads: Sequence[type | str],
    stage_policy: bool = False,
    check: Callable[[Run], None] | None = None,
    of_finished: bool = False,
) -> None:
    """Runs a program: in W/run.json stands what it ran with before its `main` begins.

    Args:
      program: its name in `experiments`.
      main: takes the run.
      reads: the dataclasses of settings, and single flags, that it shows with --help.
      stage_policy: its --policy is this stage's alone, see `flags.stage_policy`.
      check: refuses a run that cannot be, before anything is written.
      of_finished: it looks at a finished run: what nobody gave is as W/run.json says.
    """

    def with_run(argv: Sequence[str]) -> None:
        del argv
        made = flags_lib.from_flags()

        def body() -> None:
            if check:
                check(made)
            claims = _WRITES.get(program, ())
            if program == "evaluate":
                claims = (f"evaluate-{flags.FLAGS.name}",)
            distributed.first_alone("locks", lambda: exclusive.claim(made.workdir, claims))
            if again := flags_lib.redo():
                if again == program == "evaluate":  # this evaluation, and not all
                    again += f":{flags.FLAGS.name}"
                redo.remove(made, again, getattr(flags.FLAGS, ROUND, 0))
            with provenance.recorded(made, program, sys.argv):
                main(made)

        setup.program(body, flags_lib.read(DistributedConfig))

    def made_with() -> dict[str, Any]:
        return provenance.made_with(run_lib.at(flags_lib.workdir()).json) if of_finished else {}

    flags_lib.run_program(with_run, reads=reads, stage_policy=stage_policy, made_with=made_with)
