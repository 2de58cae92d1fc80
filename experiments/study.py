"""Which credit is better?  Arms and seeds from the same base on the same games, and one page.

    python -m experiments.study --flagfile=experiments/presets/quickstart.flags \\
        --workdir=runs/study --arms=sft,terminal,spa,spa:gae_lambda=1 --seeds=0-9 --jobs=2
    python -m experiments.study --flagfile=experiments/presets/compare.flags

Every arm and seed is a run in a process of its own, with an ordinary workdir W/ARM/seed_S.  Writes
W/study.json and W/study.html after each.  Run again, it goes on with what has not finished; a run
that fails is told, the others go on, and the exit status is 1.  docs/study.md says how to read it.
"""

import sys
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.config import DistributedConfig
from spa_jax.errors import UserError
from spa_jax.runtime import setup
from spa_jax.settings import sections
from spa_jax.stage_config import Settings
from spa_jax.study import arms, member, record, runner, whole
from spa_jax.study.plan import Study

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    del argv
    if FLAGS.exit_with_parent:
        runner.stop_with_parent()
    preset = flags_lib.from_flags()
    study = Study(
        preset,
        tuple(arms.choose(FLAGS.arms, preset.settings)),
        tuple(arms.seeds(FLAGS.seeds)),
        reference=FLAGS.reference,
        panel_games=FLAGS.panel_games,
        base_per_seed=FLAGS.base_per_seed,
    )
    _check()
    if FLAGS.only:
        config = flags_lib.read(DistributedConfig)
        setup.program(lambda: member.run(study, FLAGS.only, sys.argv), config)
        return
    command = runner.own_command("study", sys.argv)
    found = whole.run(study, record.Ran(_preset(sys.argv), sys.argv), command, FLAGS.jobs)
    print(f"\n{record.table(found)}\n\n{study.files.page}\n{record.result_line(found)}", flush=True)
    if found["runs"]["failed"]:
        sys.exit(1)


def _check() -> None:
    """Refuses what a single run takes and a study does not."""
    if flags_lib.redo():
        raise UserError("--redo is for one run: remove the folder of what is to be made anew")
    config = flags_lib.read(DistributedConfig)
    if config.distributed or config.by_hand:
        raise UserError("a study starts its processes itself; drop the flags of several processes")


def _preset(argv: Sequence[str]) -> str:
    """The flagfiles of a command."""
    words = [word.lstrip("-") for word in argv]
    return ",".join(word.partition("=")[2] for word in words if word.startswith("flagfile="))


def define() -> None:
    """The flags of a study."""
    flags.DEFINE_list(
        "arms",
        ["sft", "terminal", "spa"],
        "Arms, of "
        + ",".join(arms.ARMS)
        + "; NAME:FLAG=VALUE:FLAG=VALUE is an arm with settings of its own.",
    )
    flags.DEFINE_string("seeds", "0-2", "Seeds of every arm: 0-9, or 0,1,2.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time; each has its share of the cores.")
    flags.DEFINE_string(
        "reference", "", "The arm that the others are compared with; empty: terminal, or the first."
    )
    flags.DEFINE_integer(
        "panel_games", 0, "Held-out games that are played after each round; 0: all.", lower_bound=0
    )
    flags.DEFINE_bool(
        "base_per_seed", False, "Each seed makes a base of its own; otherwise all share one."
    )
    flags.DEFINE_string("only", "", "Only this run of the study, such as spa/seed_0.")
    flags.DEFINE_bool("exit_with_parent", False, "End when standard input closes.")


if __name__ == "__main__":
    define()
    reads: list[type | str] = [type(part) for _, part in sections(Settings())]
    flags_lib.run_program(main, reads=[*reads, "policy"], stage=False)
