"""Stage 2: plays episodes of a split and records each of them exactly once.

    python -m experiments.explore --workdir=W --policy=W/sft/policy --alfworld_data=DIR
    python -m experiments.explore --workdir=W --policy=expert --out=W/demos/train ...

Appends to OUT/trajectories.jsonl as episodes end (OUT is W/iteration_0/explore by default).
Killed and run again, it plays what is missing.  Of several processes each plays its own tasks, in
its own environments, and appends to OUT/trajectories.process_I.jsonl; in the end all are in one.
"""

import pathlib
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import common
from experiments import flags as flags_lib
from spa_jax import evaluation, rollout
from spa_jax.chat import TEMPLATE
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ChatConfig,
    ComputeConfig,
    DistributedConfig,
    EnvConfig,
    ExploreConfig,
    SamplingConfig,
)
from spa_jax.envs.client import EnvClient
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.runtime import distributed
from spa_jax.sampling.engine import Engine
from spa_jax.sampling.parallel import ParallelEngine
from spa_jax.trajectory import Trajectory


def choose_games(client: EnvClient, explore: ExploreConfig) -> list[Task]:
    """The games of --split that --first_game and --games name, in a shuffled order.

    The order is the split's own, whatever the seed of the run: sorted by name, one task type
    would follow the other, and a part of the split would hold only some of them.

    Raises:
      UserError: if the split has fewer games.
    """
    tasks = client.tasks(explore.split)
    order = np.random.default_rng(len(tasks)).permutation(len(tasks))
    tasks = [tasks[i] for i in order]
    last = explore.first_game + (explore.games or len(tasks) - explore.first_game)
    if not explore.first_game < last <= len(tasks):
        raise UserError(
            f"--first_game={explore.first_game} --games={explore.games}: split "
            f"{explore.split} has {len(tasks)} games"
        )
    return tasks[explore.first_game : last]


def run(
    out: pathlib.Path,
    policy_folder: str,
    env: EnvConfig,
    sampling: SamplingConfig,
    explore: ExploreConfig,
    seed: int,
    title: str = "explore",
    chat_format: str = TEMPLATE,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> list[Trajectory]:
    """Plays `explore.rollouts` episodes of every chosen game; returns those of all processes."""
    started = time.time()
    expert = policy_folder == common.EXPERT
    policy = None if expert else common.load_policy(policy_folder, chat_format, compute)
    if policy:
        common.record_chat_format(out, policy)
    slots = 2 if expert else sampling.slots
    with common.open_env(env, slots, out / "server.log") as client:
        games = choose_games(client, explore)
        jobs, own = (
            [rollout.Job(task, seed, i) for task in tasks for i in range(explore.rollouts)]
            for tasks in (games, distributed.share(games))
        )
        used = min(slots, len(own))

        def make_engine() -> Engine | ParallelEngine:
            assert policy is not None  # the expert needs none
            return common.make_engine(policy, sampling, used, seed)

        distributed.assert_equal("number of episodes", len(jobs))
        common.play_jobs(client, own, out, env, policy, make_engine, title)
    played = common.read_played(out, jobs, title)
    common.mark_done(out, started, episodes=len(played), failures=len(jobs) - len(played))
    return played


def main(argv: Sequence[str]) -> None:
    del argv
    started = time.time()
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    played = run(
        pathlib.Path(_OUT.value) if _OUT.value else workdir / "iteration_0" / "explore",
        _POLICY.value or str(workdir / "sft" / "policy"),
        flags_lib.read(EnvConfig),
        flags_lib.read(SamplingConfig),
        flags_lib.read(ExploreConfig),
        flags_lib.SEED.value,
        chat_format=flags_lib.read(ChatConfig).chat_format,
        compute=flags_lib.read(ComputeConfig),
    )
    summary = evaluation.summarize(played)
    print(
        f"RESULT success={summary.success_rate:.4f} grounding={summary.grounding:.4f} "
        f"episodes={summary.games} seconds={time.time() - started:.1f}"
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string(
        "policy", "", "Folder of the policy, or 'expert'; W/sft/policy by default."
    )
    _OUT = flags.DEFINE_string("out", "", "Folder to write; W/iteration_0/explore by default.")
    flags_lib.define(
        EnvConfig, SamplingConfig, ExploreConfig, ChatConfig, ComputeConfig, DistributedConfig
    )
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
