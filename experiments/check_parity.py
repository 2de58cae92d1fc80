"""Is the released code's arithmetic reproduced?  Recorded cases, computed again and compared.

    python -m experiments.check_parity --golden=tests/golden/released

Checks every case in the folder: ppo_*.npz, gae.npz, rewards.npz, progress.npz (and gae_*.npz and so
on).  A line a case, with the error that takes most of its tolerance; exit code 1 if one misses, 2
if a file is missing or damaged.  About 10 seconds a PPO case on two cores.
"""

import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

from experiments import flags as flags_lib
from spa_jax.errors import UserError
from spa_jax.parity import cases
from spa_jax.parity.compare import Comparison
from spa_jax.runtime import setup


def describe(name: str, found: Comparison) -> str:
    """The lines of one case."""
    worst = found.worst
    verdict = "MISS" if found.misses else "ok"
    lines = [
        f"{name}: {len(found.errors)} arrays, largest error {worst.error:.1e} of "
        f"{worst.allowed:.1e} at {worst.name}: {verdict}"
    ]
    lines += [f"  MISS {line}" for line in found.misses]
    lines += [f"  NOT CHECKED {line}" for line in found.unchecked]
    return "\n".join(lines + [f"  note: {line}" for line in found.notes])


def main(argv: Sequence[str]) -> None:
    del argv
    if not _GOLDEN.value:
        raise UserError("--golden is not set: give the folder of the recorded cases")
    setup.prepare_jax()
    found = {}
    # On an accelerator a float32 product has fewer digits unless it is told otherwise.
    with jax.default_matmul_precision("highest"):
        for case in cases.find(pathlib.Path(_GOLDEN.value)):
            found[case.name] = case.check(case.path)
            print(describe(case.name, found[case.name]), flush=True)
    misses = sum(bool(one.misses) for one in found.values())
    worst = max((one.worst for one in found.values()), key=lambda error: error.share)
    print(
        f"RESULT cases={len(found)} misses={misses} max_error={worst.error:.2e} "
        f"of_tolerance={worst.share:.2f} unchecked={sum(len(o.unchecked) for o in found.values())}"
    )
    sys.exit(1 if misses else 0)


if __name__ == "__main__":
    _GOLDEN = flags.DEFINE_string("golden", "", "Folder of the recorded cases.")
    flags_lib.run(main)
