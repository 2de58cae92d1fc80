"""Demonstrations of your own: a ShareGPT-style log instead of our expert's episodes.

    python -m experiments.import_demos --file=alfworld_sft.json --env=alfworld --workdir=W

FILE is a JSON list of {"conversations": [{"from": "human" | "gpt", "value": text}, ...]}, the
format of the SPA-RL authors' data, or of {"messages": [{"role": ..., "content": text}, ...]}; or it
holds one such record a line.  Writes W/demos/{train,valid}/trajectories.jsonl, which
`sft` reads; the conversations of a task go to one of the two.  `run_spa --demonstrations=FILE`
does the same and goes on from there.
"""

from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax import importers
from spa_jax.errors import UserError
from spa_jax.stages import demonstrate


def main(argv: Sequence[str]) -> None:
    """Writes both parts and prints how many episodes each has."""
    del argv
    run = flags_lib.from_flags()
    if run.demos.exists():
        raise UserError(f"{run.demos} is there already: remove it, or give another --workdir")
    demos = demonstrate.import_log(run, _FILE.value, valid_share=_VALID.value)
    counts = " ".join(f"{part}={len(episodes)}" for part, episodes in demos.items())
    print(f"RESULT {counts} out={run.demos}")


if __name__ == "__main__":
    _FILE = flags.DEFINE_string("file", None, "The log.", required=True)
    _VALID = flags.DEFINE_float(
        "valid_share", importers.VALID_SHARE, "Share of the tasks for the held-out loss."
    )
    flags_lib.run_program(main, reads=("env",), stage=False)
