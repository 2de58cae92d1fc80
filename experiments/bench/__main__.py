"""Times one part of the system against the machine it runs on.

    python -m experiments.bench env          environment steps a second of a worker
    python -m experiments.bench generation   tokens a second of the generation engine
    python -m experiments.bench rollout      the same over many turns, against transformers and
                                             PyTorch in the same run (make setup-peers)
    python -m experiments.bench sft          training tokens a second of the SFT update
    python -m experiments.bench ppo          a PPO update beside transformers and PyTorch
    python -m experiments.bench models       update and forward pass against PyTorch, and memory

Sizes are those of the quickstart, and the model is SmolLM2-135M in float32: its real weights if
--policy holds them, random ones of the same shape otherwise; `ppo` has sizes of its own (its
file says which).  Each subject prints its figures, the floor that this machine allows (measured
in the same process), the share of the floor that is reached, and a last RESULT line.  A subject
that compares with PyTorch stops where PyTorch is not installed.
"""

import importlib
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.errors import UserError

SUBJECTS = ("env", "generation", "rollout", "sft", "ppo", "models")
_GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "released"


def main(argv: Sequence[str]) -> None:
    """Runs the subject."""
    subject = argv[1] if len(argv) > 1 else "nothing"
    if subject not in SUBJECTS:
        raise UserError(f"expected one subject of {', '.join(SUBJECTS)}; got {subject}")
    if subject != "env":  # which reads no model
        from spa_jax.runtime import setup

        setup.prepare_jax()
    importlib.import_module(f"experiments.bench.{subject}").run()


if __name__ == "__main__":
    flags.DEFINE_string(
        "policy",
        "models/smollm2-135m-instruct",
        "Folder of the model to time; random weights of its shape if it does not exist.",
    )
    flags.DEFINE_string(
        "timing_inputs",
        str(_GOLDEN / "timing_inputs.npz"),
        "ppo: tokens, mask and scores of the step that is timed.",
    )
    flags.DEFINE_integer(
        "memory_episodes", 1000, "env: episodes after which a worker's memory is read."
    )
    flags.DEFINE_list(
        "parts", ["step", "ragged", "scoring"], "ppo: what is timed, of these and quickstart."
    )
    flags.DEFINE_string("trajectories", "", "ppo: recorded episodes for the ragged mix.")
    flags.DEFINE_integer("layers", 0, "rollout: only this many layers of the model; 0: all.")
    flags.DEFINE_integer("episodes", 16, "rollout: episodes played at once.")
    flags.DEFINE_integer("turns", 8, "rollout: turns of an episode.")
    flags.DEFINE_integer("prompt", 200, "rollout: tokens that open an episode.")
    flags.DEFINE_integer("shared", 200, "rollout: of these, those that all episodes share.")
    flags.DEFINE_integer("observation", 44, "rollout: tokens before each turn.")
    flags.DEFINE_integer("response", 20, "rollout: tokens that the policy writes in a turn.")
    flags.DEFINE_integer("decode", 64, "rollout: tokens of the plain decoding.")
    flags.DEFINE_integer(
        "rounds", 0, "How often PyTorch's side is timed; 0: ppo 5 times, rollout once."
    )
    flags.DEFINE_bool(
        "rehearsal",
        False,
        "ppo, models: small sizes, to see that it runs; its figures say nothing.",
    )
    flags_lib.run(main, words=1)
