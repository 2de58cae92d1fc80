"""Is it the step credit?  SFT, continued SFT, terminal-reward PPO and SPA at equal update tokens.

    python -m experiments.compare --flagfile=experiments/presets/quickstart.flags \\
        --workdir=runs/compare --seeds=0,1,2

Every seed gets a folder W/seed_S: a whole run_spa, then the other arms from its base policy on
its games.  The arms see the same held-out games in every seed.  Writes W/comparison.json.
"""

import dataclasses
import sys

import numpy as np
from absl import flags

from experiments import stage
from spa_jax import comparison, evaluation, files, method, provenance
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.settings import sections
from spa_jax.stage_config import Settings


def check(run: Run) -> None:
    """Refuses a base that no demonstrations of this run made, and what `method.check` refuses."""
    base = run.settings.method.base
    if base:
        raise UserError(
            f"--base={base}: continued SFT goes on with the demonstrations that made the base, so "
            "every seed makes its own; drop --base"
        )
    method.check(run)


def main(run: Run) -> None:
    found: dict[str, dict[str, dict]] = {}
    for seed in map(int, flags.FLAGS.seeds):
        one = dataclasses.replace(run, workdir=run.workdir / f"seed_{seed}", seed=seed)
        with provenance.recorded(one, "compare", sys.argv):
            summaries = comparison.run_seed(one)
        print(f"\nseed {seed}\n{evaluation.table(summaries)}")
        found[str(seed)] = {arm: s.to_dict() for arm, s in summaries.items()}
        files.write_json(run.comparison, found)
    means = {
        arm: float(np.mean([arms[arm]["success"]["rate"] for arms in found.values()]))
        for arm in comparison.ARMS
    }
    print("RESULT " + " ".join(f"{arm}={rate:.4f}" for arm, rate in means.items()))


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the comparison.")
    reads: list[type | str] = [type(part) for _, part in sections(Settings())]
    stage.run("compare", main, reads=reads, check=check)
