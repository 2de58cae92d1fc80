"""Is it the step credit?  SFT, continued SFT, terminal-reward PPO and SPA at equal update tokens.

    python -m experiments.compare --flagfile=experiments/presets/quickstart.flags \\
        --workdir=runs/compare --seeds=0,1,2

Every seed gets a folder W/seed_S: a whole run_spa, then the other arms from its base policy on
its games.  The arms see the same held-out games in every seed.  Writes W/comparison.json.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import common, run_spa, sft, train_ppo
from experiments import flags as flags_lib
from spa_jax import config as config_lib
from spa_jax import evaluation, store
from spa_jax.errors import UserError
from spa_jax.runtime import distributed
from spa_jax.training import metrics as metrics_lib

ARMS = ("sft", "continued_sft", "terminal", "spa")


def ppo_tokens(workdir: pathlib.Path, iterations: int) -> float:
    """Tokens that the PPO updates of a run were computed on."""
    files = [workdir / f"iteration_{i}" / "ppo" / "metrics.jsonl" for i in range(iterations)]
    return sum(m["tokens"] for path in files for m in metrics_lib.read_metrics(path))


def continue_sft(r: run_spa.Run) -> None:
    """SFT goes on from the base, on the same demonstrations, for as many tokens as PPO."""
    demos = {
        split: store.read(r.workdir / "demos" / split / "trajectories.jsonl")
        for split in ("train", "valid")
    }
    spent = metrics_lib.read_metrics(r.workdir / "sft" / "metrics.jsonl")
    a_update = sum(m["tokens"] for m in spent) / len(spent)
    updates = max(1, round(ppo_tokens(r.workdir, r.run.iterations) / a_update))
    settings = dataclasses.replace(r.sft, updates=updates, patience=0, eval_every=updates)
    sft.run(
        r.workdir / "continued_sft", str(r.base), demos["train"], demos["valid"], settings,
        r.rows, r.seed + 1, r.lora_of("sft"), r.chat.chat_format, r.compute,
    )  # fmt: skip


def _copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies under a temporary name, then renames; nothing if the target is there."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def train_terminal(r: run_spa.Run) -> pathlib.Path:
    """PPO with the final reward at the last step, from the same base on the same games."""
    arm = dataclasses.replace(
        r,
        workdir=r.workdir / "terminal",
        run=dataclasses.replace(r.run, base=str(r.base)),
        credit=dataclasses.replace(r.credit, credit="terminal"),
    )
    played, own = (x.workdir / "iteration_0" / "explore" for x in (r, arm))
    # The base plays the same games with the same random numbers in both arms.
    distributed.first_alone("exploration of the base", lambda: _copy_folder(played, own))
    for iteration in range(arm.run.iterations):
        run_spa.train_round(arm, iteration)
    return train_ppo.policy_before(arm.workdir, arm.run.iterations)


def run_seed(r: run_spa.Run) -> dict[str, evaluation.Summary]:
    """All arms of one seed; each is evaluated on the same games."""
    r = run_spa.execute(r)
    continue_sft(r)
    terminal = train_terminal(r)
    folders = {
        "sft": r.base,
        "continued_sft": r.workdir / "continued_sft" / "policy",
        "terminal": terminal,
        "spa": train_ppo.policy_before(r.workdir, r.run.iterations),
    }
    return {arm: run_spa.play_heldout(r, arm, folders[arm]) for arm in ARMS}


def main(argv: Sequence[str]) -> None:
    del argv
    r = run_spa.from_flags()
    if r.run.base:
        raise UserError(
            f"--base={r.run.base}: continued SFT goes on with the demonstrations that made the "
            "base, so every seed makes its own; drop --base"
        )
    found: dict[str, dict[str, dict]] = {}
    for seed in map(int, _SEEDS.value):
        workdir = pathlib.Path(flags_lib.WORKDIR.value) / f"seed_{seed}"
        summaries = run_seed(dataclasses.replace(r, workdir=workdir, seed=seed))
        print(f"\nseed {seed}\n{evaluation.table(summaries)}")
        found[str(seed)] = {arm: s.to_dict() for arm, s in summaries.items()}
        common.write_json(pathlib.Path(flags_lib.WORKDIR.value) / "comparison.json", found)
    means = {
        arm: float(np.mean([arms[arm]["success"]["rate"] for arms in found.values()]))
        for arm in ARMS
    }
    print("RESULT " + " ".join(f"{arm}={rate:.4f}" for arm, rate in means.items()))


if __name__ == "__main__":
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the comparison.")
    run_spa.define_flags()
    flags_lib.define(config_lib.DistributedConfig)
    flags_lib.run(common.stage(main), flags_lib.WORKDIR)
