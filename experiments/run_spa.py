"""The whole method in one command, each stage from its files.

    python -m experiments.run_spa --flagfile=experiments/presets/quickstart.flags

demonstrations -> SFT -> (exploration -> progress estimator -> annotation -> PPO) x iterations
-> evaluation of the base and of the SPA policy on held-out games -> report.html.  Run again, it
goes on where it stopped.
"""

import time

from experiments import stage
from spa_jax import method
from spa_jax.run import Run
from spa_jax.settings import sections
from spa_jax.stage_config import Settings


def main(run: Run) -> None:
    started = time.time()
    done = method.run(run)
    print("\nHeld-out games\n")
    print(done.table())
    print(
        f"\nEstimator on {done.validity['trajectories']} held-out episodes of the base: "
        f"AUC for subgoal steps {done.validity['subgoal_auc']:.2f}, within an episode "
        f"{done.validity['subgoal_auc_within']:.2f}, "
        f"first steps' share {done.validity['first_step_share']:.0%}; of the sum: "
        f"MSE/Var {done.validity['mse_over_var']:.2f}, AUC {done.validity['auc']:.2f}, "
        f"spread of c within an episode {done.validity['spread']:.3f}\n"
    )
    print(done.line(time.time() - started))


if __name__ == "__main__":
    reads: list[type | str] = [type(part) for _, part in sections(Settings())]
    stage.run("run_spa", main, reads=reads, check=method.check)
