"""Is it the step credit?  SFT, continued SFT, terminal-reward PPO and SPA at equal update tokens.

Every seed is a whole run of the method; the other arms start from its base policy, on its games.
"""

import dataclasses
import pathlib
import shutil

from spa_jax import method
from spa_jax.evaluation import Summary
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.stages import evaluate, sft
from spa_jax.training import metrics

ARMS = ("sft", "continued_sft", "terminal", "spa")


def run_seed(run: Run) -> dict[str, Summary]:
    """All arms of one seed; each is evaluated on the same games."""
    run = method.run(run).run
    _continue_sft(run)
    policies = {
        "sft": run.base,
        "continued_sft": run.continued_sft / "policy",
        "terminal": _train_terminal(run),
        "spa": run.newest_policy(run.settings.method.iterations),
    }
    return {arm: evaluate.run(run, arm, policy=str(policies[arm])) for arm in ARMS}


def ppo_tokens(run: Run) -> float:
    """Tokens that the PPO updates of a run were computed on."""
    rounds = [run.round(number) for number in range(run.settings.method.iterations)]
    files = [r.ppo / metrics.METRICS_FILE for r in rounds]
    return sum(m["tokens"] for path in files for m in metrics.read_metrics(path))


def _continue_sft(run: Run) -> None:
    """SFT goes on from the base, on the same demonstrations, for as many tokens as PPO."""
    spent = metrics.read_metrics(run.sft / metrics.METRICS_FILE)
    a_update = sum(m["tokens"] for m in spent) / len(spent)
    updates = max(1, round(ppo_tokens(run) / a_update))
    settings = dataclasses.replace(
        run.settings.sft, updates=updates, patience=0, eval_every=updates
    )
    sft.train(run, out=run.continued_sft, start=str(run.base), sft=settings, seed=run.seed + 1)


def _train_terminal(run: Run) -> pathlib.Path:
    """PPO with the final reward at the last step, from the same base on the same games."""
    settings = dataclasses.replace(
        run.settings,
        method=dataclasses.replace(run.settings.method, base=str(run.base)),
        credit=dataclasses.replace(run.settings.credit, credit="terminal"),
    )
    arm = dataclasses.replace(run, workdir=run.terminal, settings=settings)
    # The base plays the same games with the same random numbers in both arms.
    played, own = run.round(0).explore, arm.round(0).explore
    distributed.first_alone("exploration of the base", lambda: _copy_folder(played, own))
    iterations = settings.method.iterations
    for number in range(iterations):
        method.train_round(arm, number)
    return arm.newest_policy(iterations)


def _copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies under a temporary name, then renames; nothing if the target is there."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)
