"""Makes the lab's base policy: a small one that a study can afford (experiments/presets/lab.flags).

    python -m experiments.make_lab --out models/lab

    python -m experiments.make_lab --out models/lab16 --horizon=16

Games, the demonstrations of an expert that wavers (--slips), SFT from random weights, held-out
games; prints how many it wins, and its hash, which is in OUT/lab.json too.  Run again, it goes on
where it stopped, or says that the policy is made.  All of it took half an hour on two cores that
others used too; the default wins 32.8% of 400 games.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax import lab
from spa_jax.config import DistributedConfig
from spa_jax.runtime import setup


def main(argv: Sequence[str]) -> None:
    """Makes it, unless it is there."""
    del argv
    out, config = pathlib.Path(_OUT.value), flags_lib.read(lab.LabConfig)
    setup.program(lambda: _make(out, config), DistributedConfig())


def _make(out: pathlib.Path, config: lab.LabConfig) -> None:
    there = (out / lab.RECORD).exists()
    record = lab.make(out, config, flags_lib.SEED.value)
    if there:
        print(f"{out}: already made")
    won = record["heldout"]["success"]
    print(
        f"wins {won['successes']} of {won['games']} held-out games, {won['rate']:.1%} "
        f"(95% interval {won['low']:.1%} to {won['high']:.1%})"
    )
    print(
        f"RESULT digest={record['digest']} parameters={record['parameters']} "
        f"success={won['rate']:.4f} games={won['games']} policy={out}"
    )


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", "models/lab", "The folder to write.")
    flags_lib.define(lab.LabConfig)
    flags_lib.run(main, flags_lib.SEED)
