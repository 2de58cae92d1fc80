"""The whole method in one command, each stage from its files.

    python -m experiments.run_spa --flagfile=experiments/presets/quickstart.flags

demonstrations -> SFT -> (exploration -> progress estimator -> annotation -> PPO) x iterations
-> evaluation of the base and of the SPA policy on held-out games -> report.html.  Run again, it
goes on where it stopped.
"""

import dataclasses
import pathlib
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import (
    annotate,
    common,
    evaluate,
    explore,
    generated,
    import_demos,
    sft,
    train_ppo,
    train_progress,
)
from experiments import flags as flags_lib
from spa_jax import config as config_lib
from spa_jax import episodes, evaluation, store
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.evaluation import BASE, SPA
from spa_jax.report.page import write_report
from spa_jax.training import distributed
from spa_jax.trajectory import Trajectory

# The settings of a `Run`, by its field.
CONFIGS: dict[str, type] = {
    "run": config_lib.RunConfig,
    "env": config_lib.EnvConfig,
    "sampling": config_lib.SamplingConfig,
    "rows": config_lib.RowsConfig,
    "sft": config_lib.SftConfig,
    "explore": config_lib.ExploreConfig,
    "progress": config_lib.ProgressConfig,
    "credit": config_lib.CreditConfig,
    "ppo": config_lib.PpoConfig,
    "lora": config_lib.LoraConfig,
    "compute": config_lib.ComputeConfig,
    "chat": config_lib.ChatConfig,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the stages are told."""

    workdir: pathlib.Path
    policy: str
    seed: int
    run: config_lib.RunConfig
    env: config_lib.EnvConfig
    sampling: config_lib.SamplingConfig
    rows: config_lib.RowsConfig
    sft: config_lib.SftConfig
    explore: config_lib.ExploreConfig
    progress: config_lib.ProgressConfig
    credit: config_lib.CreditConfig
    ppo: config_lib.PpoConfig
    lora: config_lib.LoraConfig
    compute: config_lib.ComputeConfig
    chat: config_lib.ChatConfig

    @property
    def base(self) -> pathlib.Path:
        """The base policy: what SFT made, or --base."""
        return pathlib.Path(self.run.base) if self.run.base else self.workdir / "sft" / "policy"

    def lora_of(self, stage: str) -> config_lib.LoraConfig:
        """The adapters that a stage trains; none if --lora_stages leaves it out."""
        return self.lora if stage in self.run.lora_stages else config_lib.LoraConfig()


def generate_games(r: Run) -> Run:
    """Makes the games of every split that --generate_* asks for; returns the run on them."""
    if r.env.data or r.env.env_address:
        return r
    root = r.workdir / "games"
    commands = generated.commands(r.env.env, r.run, root)

    def generate() -> None:
        for command in commands:
            # A process of its own: the generator loads the environment, the trainer never does.
            if subprocess.run(command).returncode:
                raise UserError(f"the generator of {root} failed, see its message above")

    distributed.first_alone("games", generate)
    data: dict[str, Any] = {f"{r.env.env}_data": str(root)}
    return dataclasses.replace(r, env=dataclasses.replace(r.env, **data))


def assert_disjoint(splits: dict[str, list[Task]], heldout: str) -> None:
    """No held-out game shares its layout or its generator's seed with a training stage.

    Raises:
      UserError: if one does.
    """
    for split, tasks in splits.items():
        if split == heldout:
            continue
        layouts = {t.layout for t in tasks} & {t.layout for t in splits[heldout]}
        seeds = {t.seed for t in tasks if t.seed is not None}
        seeds &= {t.seed for t in splits[heldout] if t.seed is not None}
        if layouts or seeds:
            raise UserError(
                f"split {split} shares {len(layouts)} layouts and seeds {sorted(seeds)} with the "
                f"held-out split {heldout}: generate them with other seeds"
            )


def check_splits(r: Run) -> None:
    """Asserts at start that nothing held out is ever trained on."""
    names = {r.explore.split, r.run.heldout_split}
    if not r.run.base and not r.run.demonstrations:
        names |= {r.run.demo_split, r.run.demo_valid_split}
    with common.open_env(r.env, 1, r.workdir / "server.log") as client:
        splits = {name: client.tasks(name) for name in sorted(names)}
    assert_disjoint(splits, r.run.heldout_split)


def play_demos(r: Run) -> dict[str, list[Trajectory]]:
    """The expert's won episodes, to train on and held out."""
    chosen = {
        "train": (r.run.demo_split, r.run.demo_games),
        "valid": (r.run.demo_valid_split, r.run.demo_valid_games),
    }
    demos = {}
    for part, (split, games) in chosen.items():
        once = config_lib.ExploreConfig(rollouts=1, split=split, games=games)
        folder = r.workdir / "demos" / part
        title = f"demos {part}"
        played = explore.run(folder, common.EXPERT, r.env, r.sampling, once, r.seed, title)
        demos[part] = [t for t in played if t.success]
    return demos


def train_base(r: Run) -> None:
    """Demonstrations, of the expert or of a log, and SFT on them."""
    if r.run.base or common.is_done(r.workdir / "sft", "sft"):
        return
    if r.run.demonstrations:
        folder, log = r.workdir / "demos", r.run.demonstrations
        distributed.first_alone(
            "demonstrations",
            lambda: import_demos.run(folder, log, r.env.env, import_demos.VALID_SHARE, r.seed),
        )
        demos = {s: store.read(folder / s / "trajectories.jsonl") for s in ("train", "valid")}
    else:
        demos = play_demos(r)
    sft.run(
        r.workdir / "sft", r.policy, demos["train"], demos["valid"], r.sft, r.rows, r.seed,
        r.lora_of("sft"), r.chat.chat_format, r.compute,
    )  # fmt: skip


def train_round(r: Run, iteration: int) -> None:
    """One round: exploration with the newest policy, estimator, annotation, PPO."""
    folder = r.workdir / f"iteration_{iteration}"
    policy = r.base if iteration == 0 else train_ppo.policy_before(r.workdir, iteration)
    if common.is_done(folder / "ppo", f"round {iteration}"):
        return
    games = dataclasses.replace(
        r.explore, first_game=r.explore.first_game + iteration * r.explore.games
    )
    title = f"explore {iteration}"
    explore.run(
        folder / "explore", str(policy), r.env, r.sampling, games, r.seed, title,
        r.chat.chat_format, r.compute,
    )  # fmt: skip
    data = train_progress.data_files(r.workdir, iteration)
    train_progress.run(
        folder / "progress", str(r.base), data, r.progress, r.rows, r.seed,
        r.lora_of("progress"), r.compute, r.ppo.train_layers,
    )  # fmt: skip
    annotate.run(
        folder / "annotated.jsonl", str(r.base), data[0], folder / "progress", r.credit, r.rows,
        r.seed, compute=r.compute,
    )  # fmt: skip
    train_ppo.run(
        folder / "ppo", str(policy), folder / "annotated.jsonl", r.ppo, r.rows,
        r.seed + iteration, r.lora_of("ppo"), r.base, r.compute,
    )  # fmt: skip


def play_heldout(r: Run, name: str, policy: pathlib.Path) -> evaluation.Summary:
    """Plays the held-out games: W/eval/NAME."""
    sampling = dataclasses.replace(r.sampling, temperature=r.run.eval_temperature)
    games = config_lib.ExploreConfig(
        rollouts=1, games=r.run.heldout_games, split=r.run.heldout_split
    )
    out = r.workdir / "eval" / name
    return evaluate.run(
        out, str(policy), r.env, sampling, games, r.seed, r.chat.chat_format, r.compute
    )


def evaluate_policy(r: Run, name: str, policy: pathlib.Path) -> evaluation.Summary:
    """Plays the held-out games, and annotates what is read of them.

    Of the base's that is all, which the estimator is judged on; else what the report shows.
    """
    summary = play_heldout(r, name, policy)
    last = r.workdir / f"iteration_{r.run.iterations - 1}" / "progress"
    path = r.workdir / "eval" / name / "trajectories.jsonl"
    keys = None
    if name != BASE:
        won, lost = evaluation.examples(store.read(path))
        keys = {t.key for t in (*won, *lost)}
    annotate.run(path, str(r.base), path, last, r.credit, r.rows, r.seed, keys, r.compute)
    return summary


def judge_estimator(r: Run) -> dict[str, float]:
    """The last estimator on the base policy's held-out episodes."""
    played = episodes.completed(store.read(r.workdir / "eval" / BASE / "trajectories.jsonl"))
    contributions = [[step.contribution or 0.0 for step in t.steps] for t in played]
    return evaluation.estimator_validity(
        np.array([sum(c) for c in contributions]),
        np.array([t.final_reward for t in played]),
        contributions,
    )


def execute(r: Run) -> Run:
    """All stages; prints the table and the RESULT line; returns the run on its games."""
    started = time.time()
    first = r.base if r.run.base or r.base.exists() else r.policy
    common.check_chat_format(first, r.chat.chat_format)
    r = generate_games(r)
    check_splits(r)
    train_base(r)
    for iteration in range(r.run.iterations):
        train_round(r, iteration)
    newest = train_ppo.policy_before(r.workdir, r.run.iterations)
    base = evaluate_policy(r, BASE, r.base)
    spa = evaluate_policy(r, SPA, newest)
    validity = judge_estimator(r)
    common.write_json(r.workdir / "estimator.json", validity)
    report = r.workdir / "report.html"
    distributed.first_alone("report", lambda: write_report(r.workdir, report))
    print("\nHeld-out games\n")
    print(evaluation.table({"base (SFT)": base, "SPA": spa}))
    print(
        f"\nEstimator on {validity['trajectories']} held-out episodes of the base: "
        f"MSE/Var {validity['mse_over_var']:.2f}, AUC {validity['auc']:.2f}, "
        f"spread of c within an episode {validity['spread']:.3f}\n"
    )
    print(
        f"RESULT base_success={base.success_rate:.4f} spa_success={spa.success_rate:.4f} "
        f"spa_grounding={spa.grounding:.4f} games={spa.games} "
        f"seconds={time.time() - started:.1f} report={report}"
    )
    return r


def define_flags() -> None:
    """The flags of a whole run."""
    flags.DEFINE_string("policy", "models/smollm2-135m-instruct", common.POLICY_HELP)
    flags_lib.define(*CONFIGS.values())


def from_flags() -> Run:
    """The run that the flags describe."""
    configs: dict[str, Any] = {name: flags_lib.read(kind) for name, kind in CONFIGS.items()}
    config_lib.check_together(configs["ppo"], configs["credit"], configs["explore"])
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    made = Run(workdir=workdir, policy=flags.FLAGS.policy, seed=flags_lib.SEED.value, **configs)
    config_lib.fit_attention(made.compute, made.rows)
    for stage, settings in (("sft", made.sft), ("ppo", made.ppo)):
        flag = f"--{stage}_train_layers"
        config_lib.check_trained(made.lora_of(stage), settings.train_layers, flag)
    return made


def main(argv: Sequence[str]) -> None:
    del argv
    execute(from_flags())


if __name__ == "__main__":
    define_flags()
    flags_lib.define(config_lib.DistributedConfig)
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
