"""Is credit progress?  Each step's true advantage, as the policy plays on from before and after it.

    python -m experiments.judge_credit --workdir=W --split=heldout --episodes=40 --branches=16

Takes the base policy's held-out episodes (plays them if they are not there), plays each up to each
step again, exactly, and lets the policy go on from there --branches times.  The estimator, the
ridge critic and the placebos are held against what these show, and against the subgoals that the
environment tells.  Writes W/truth/ and W/estimator.json.  Run again, it plays what is missing;
settings that are not given are those of W/run.json.
"""

import time

from absl import flags

from experiments import flags as flags_lib
from experiments import stage
from spa_jax import branching
from spa_jax.config import ChatConfig, ComputeConfig, EnvConfig, RowsConfig, SamplingConfig
from spa_jax.run import Run


def main(run: Run) -> None:
    started, settings = time.time(), run.settings
    split = settings.explore.split if flags_lib.given("split") else settings.data.heldout_split
    judged = branching.run(
        run, split=split, episodes=flags.FLAGS.episodes, branches=flags.FLAGS.branches
    )
    steps = sum(map(len, judged.told.values()))
    print(
        f"\n{len(judged.told)} episodes of {split}, {steps} steps, {flags.FLAGS.branches} branches "
        f"from before each. {judged.reliability:.0%} of the advantages' variance is no noise of "
        f"the branches. {judged.decided_at_start:.0%} of the outcome's variance is settled by the "
        "game, before the first step: no credit of steps is about that part.\n\n"
        f"{branching.table(judged.figures)}\n"
    )
    figures = judged.figures.get("estimator", {})
    shown = ("subgoal_auc", "subgoal_auc_within", "first_step_share", "step_correlation")
    said = {name: figures.get(name, float("nan")) for name in (*shown, "advantage_correlation")}
    print(
        f"RESULT episodes={len(judged.told)} steps={steps} "
        + " ".join(f"{name}={value:.4f}" for name, value in said.items())
        + f" reliability={judged.reliability:.4f} decided_at_start={judged.decided_at_start:.4f}"
        f" seconds={time.time() - started:.1f}"
    )


if __name__ == "__main__":
    flags.DEFINE_integer(
        "episodes", 40, "Episodes whose steps are judged by branches; 0: all.", lower_bound=0
    )
    flags.DEFINE_integer("branches", 16, "Branches from before each step.", lower_bound=2)
    reads = (EnvConfig, SamplingConfig, ChatConfig, ComputeConfig, RowsConfig)
    own = ("split", "heldout_split", "heldout_games", "eval_temperature", "iterations", "base")
    stage.run("judge_credit", main, reads=(*reads, *own), of_finished=True)
