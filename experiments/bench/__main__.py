"""Times one part of the system against the machine it runs on.

    python -m experiments.bench env          environment steps a second of a worker
    python -m experiments.bench generation   tokens a second of the generation engine
    python -m experiments.bench sft          training tokens a second of the SFT update
    python -m experiments.bench ppo          the same of the PPO update
    python -m experiments.bench models       update and forward pass against PyTorch, and memory

Sizes are those of the quickstart, and the model is SmolLM2-135M in float32: its real weights if
--policy holds them, random ones of the same shape otherwise.  Each subject prints its figures,
the floor that this machine allows (measured in the same process), the share of the floor that
is reached, and a last RESULT line.
"""

import importlib
import sys
from collections.abc import Sequence

from absl import app, flags

from spa_jax.errors import UserError

SUBJECTS = ("env", "generation", "sft", "ppo", "models")


def main(argv: Sequence[str]) -> None:
    """Runs the subject."""
    if len(argv) != 2 or argv[1] not in SUBJECTS:
        given = " ".join(argv[1:]) or "nothing"
        print(f"error: expected one subject of {', '.join(SUBJECTS)}; got {given}", file=sys.stderr)
        sys.exit(2)
    if argv[1] != "env":  # which reads no model
        from experiments import common

        common.prepare_jax()
    try:
        importlib.import_module(f"experiments.bench.{argv[1]}").run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string(
        "policy",
        "models/smollm2-135m-instruct",
        "Folder of the model to time; random weights of its shape if it does not exist.",
    )
    flags.DEFINE_bool(
        "rehearsal", False, "Of models: small sizes, to see that it runs; its figures say nothing."
    )
    app.run(main)
