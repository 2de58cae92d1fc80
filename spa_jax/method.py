"""The whole method: every stage of a run, in order, each from its files.

demonstrations -> SFT -> (exploration -> progress estimator -> annotation -> PPO) x iterations
-> evaluation of the base and of the SPA policy on held-out games -> the estimator judged -> report.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from spa_jax import episodes, evaluation, files, judging, policy, store, truth
from spa_jax import run as run_lib
from spa_jax.evaluation import Summary
from spa_jax.report.page import write_report
from spa_jax.run import BASE, SPA, Run
from spa_jax.runtime import distributed
from spa_jax.stages import (
    annotate,
    demonstrate,
    evaluate,
    explore,
    prepare,
    sft,
    train_ppo,
    train_progress,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      run: on its games.
      base: the base policy on the held-out games.
      spa: the last round's policy on them.
      validity: the last estimator on the base's held-out episodes, see
        `evaluation.estimator_validity`.
    """

    run: Run
    base: Summary
    spa: Summary
    validity: dict[str, float]

    def table(self) -> str:
        """Both policies on the held-out games, for a terminal."""
        return evaluation.table({"base (SFT)": self.base, "SPA": self.spa})

    def line(self, seconds: float) -> str:
        """The RESULT line of a run that took so long."""
        return (
            f"RESULT base_success={self.base.success_rate:.4f} "
            f"spa_success={self.spa.success_rate:.4f} spa_grounding={self.spa.grounding:.4f} "
            f"games={self.spa.games} seconds={seconds:.1f} report={self.run.report}"
        )


def check(run: Run) -> None:
    """Refuses a policy that has no chat format, before anything is done with it.

    Raises:
      UserError: says which --chat_format would do.
    """
    first = run.base if run.settings.method.base or run.base.exists() else run.policy
    policy.check_chat_format(first, run.settings.chat.name)


def run(run: Run, after_round: Callable[[Run, int], object] | None = None) -> Result:
    """All stages; each that has ended is passed by.  `check` comes before anything is written.

    Args:
      run: the run.
      after_round: called with the run and the number of each round that has ended.
    """
    run = prepare.run(run)
    demonstrate.run(run)
    sft.run(run)
    iterations = run.settings.method.iterations
    for number in range(iterations):
        train_round(run, number)
        if after_round:
            after_round(run, number)
    base = evaluate.run(run, BASE, policy=str(run.base))
    annotate.run_evaluation(run, BASE)  # all: the estimator is judged on them
    spa = evaluate.run(run, SPA, policy=str(run.newest_policy(iterations)))
    played = store.read(run.evaluation(SPA) / run_lib.EPISODES)
    won, lost = evaluation.examples(played)  # which the report shows
    annotate.run_evaluation(run, SPA, {t.key for t in (*won, *lost)})
    validity = judge_estimator(run)
    files.write_json(run.estimator, validity)
    distributed.first_alone("report", lambda: write_report(run.workdir, run.report))
    return Result(run, base, spa, validity)


def train_round(run: Run, number: int) -> None:
    """One round: exploration with the newest policy, estimator, annotation, PPO."""
    explore.run(run, number)
    train_progress.run(run, number)
    annotate.run(run, number)
    train_ppo.run(run, number)


def judge_estimator(run: Run) -> dict[str, float]:
    """The last estimator on the base policy's held-out episodes, which must be annotated.

    Its steps are judged by the truth (`judging.judge`), its sums by the rewards.
    """
    path = run.evaluation(BASE) / run_lib.EPISODES
    played = episodes.completed(store.read(path))
    contributions = judging.contributions(played)
    advantages = truth.read_advantages(run.advantages, BASE)
    steps = judging.judge_episodes(played, contributions, advantages)
    return steps | evaluation.estimator_validity(
        np.array([t.predicted for t in played]),
        np.array([t.final_reward for t in played]),
        [c.tolist() for c in contributions],
    )
