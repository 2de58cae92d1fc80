"""Branches: the policy goes on from states of episodes, and every end is recorded once.

A branch is on disk when its line is, so a run that was killed plays none twice, and more episodes
or branches are added to those that are there.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import tqdm

from spa_jax import episodes, replay, rollout, store, truth
from spa_jax import play as play_lib
from spa_jax import policy as policy_lib
from spa_jax.config import SamplingConfig
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.stage_config import BRANCHING
from spa_jax.trajectory import Status, Trajectory
from spa_jax.truth import Branch, Key

MOST = 10_000  # branches of a step, and steps of an episode


def play(
    run: Run,
    chosen: Sequence[Trajectory],
    *,
    policy: str,
    count: int,
    temperature: float,
    path: pathlib.Path,
    log: pathlib.Path,
) -> dict[Key, np.ndarray]:
    """Plays the branches that a file lacks; key -> [n, K] final rewards.

    Args:
      run: the settings of environment and sampling, and the seed.
      chosen: the episodes that are left, before each of their n steps.
      policy: the folder of the policy that goes on.
      count: K, branches from before each step.
      temperature: that it samples at.
      path: branches.jsonl.
      log: what a server of our own says.

    Raises:
      UserError: the environment failed some of them, or there are several processes.
    """
    if distributed.count() > 1:
        raise UserError("--num_processes: branches are played in one process; drop the flag")
    store.repair(path)
    found = {b.key: b for b in truth.read_branches(path)}
    todo = [job for t in chosen for job in _jobs(t, count) if _leaves(job) not in found]
    every = sum(len(t.steps) for t in chosen) * count
    if todo:
        bar = tqdm.tqdm(total=every, initial=every - len(todo), desc="branches", unit="branch")
        with bar:
            sampling = dataclasses.replace(run.settings.sampling, temperature=temperature)
            for branch in _play(
                run, todo, bar, policy=policy, sampling=sampling, path=path, log=log
            ):
                found[branch.key] = branch
    else:
        print(f"branches: all {every} are there ({path})", flush=True)
    missing = [job for job in todo if _leaves(job) not in found]
    if missing:
        raise UserError(
            f"the environment failed {len(missing)} of {every} branches, the first in task "
            f"{missing[0].task.task!r}; run the same command again: it plays these alone"
        )
    return {
        t.key: np.array(
            [
                [found[*t.key, step, b].final_reward for b in range(count)]
                for step in range(len(t.steps))
            ]
        )
        for t in chosen
    }


def of_round(run: Run, number: int, data: pathlib.Path) -> dict[Key, np.ndarray] | None:
    """The branches of a round's episodes for --credit=branching, see `play`; None for others.

    The policy that played the round goes on, as it sampled.

    Args:
      run: the run.
      number: of the round.
      data: its episodes.
    """
    settings, files = run.settings, run.round(number)
    if settings.credit.credit != BRANCHING:
        return None
    return play(
        run,
        episodes.completed(store.read(data)),
        policy=str(run.newest_policy(number)),
        count=settings.credit.branches,
        temperature=settings.sampling.temperature,
        path=files.branches,
        log=files.explore / "server.log",
    )


def _jobs(trajectory: Trajectory, count: int) -> list[rollout.Job]:
    """The branches of an episode, those of a step one after the other: they share their context."""
    t = trajectory
    if len(t.steps) >= MOST:
        raise UserError(f"task {t.task!r} has {len(t.steps)} steps; fewer than {MOST} are judged")
    task = Task(t.task, t.split, t.task_type, layout="")
    return [
        rollout.Job(task, t.seed, _attempt(t.attempt, step, b), prefix=replay.cut(t, step))
        for step in range(len(t.steps))
        for b in range(count)
    ]


def _attempt(attempt: int, step: int, branch: int) -> int:
    """The number of a branch among all rollouts of its task and seed.

    It seeds the branch's tokens, and is no number that a rollout from the start has.
    """
    return (attempt * MOST + step + 1) * MOST + branch


def _leaves(job: rollout.Job | Trajectory) -> tuple[str, int, int, int, int]:
    """The key of a job's, or of a played, branch: what `_attempt` put together."""
    task, seed, number = job.key
    above, branch = divmod(number, MOST)
    attempt, step = divmod(above - 1, MOST)
    return (task, seed, attempt, step, branch)


def _play(
    run: Run,
    jobs: Sequence[rollout.Job],
    bar: tqdm.tqdm,
    *,
    policy: str,
    sampling: SamplingConfig,
    path: pathlib.Path,
    log: pathlib.Path,
) -> list[Branch]:
    """Plays branches; each is on disk when it ends.  Those that the environment failed are not."""
    settings, done = run.settings, []
    player = policy_lib.load(policy, settings.chat.name, settings.compute)
    engine = play_lib.make_engine(player, sampling, len(jobs), run.seed)
    engine.warm_up()

    def on_done(t: Trajectory) -> None:
        if t.status is Status.ENV_ERROR:
            return
        branch = Branch(*_leaves(t), t.final_reward, t.status.value)
        store.append_line(path, branch.line())
        done.append(branch)
        bar.update()

    with play_lib.open_env(settings.env, engine.slots, log) as client:
        limits = play_lib.make_player(settings.env, player)
        playing = rollout.Rollout(engine, player.chat, client, player=limits, on_done=on_done)
        timing = playing.play(jobs)
    if said := timing.bottleneck():
        bar.write(said)
    return done
