"""Episodes are played and recorded: a policy or the expert, an environment, a folder.

`rollout` plays; this module opens the environment, makes the engine, finds out which episodes the
folder lacks, and puts each on the disk when it ends.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm

from spa_jax import evaluation, failures, files, provenance, rollout, store
from spa_jax import policy as policy_lib
from spa_jax import run as run_lib
from spa_jax.config import EnvConfig, SamplingConfig
from spa_jax.envs.client import EnvClient
from spa_jax.envs.guard import read_token
from spa_jax.envs.local import LocalServer
from spa_jax.envs.openenv import OPENENV, OpenEnvClient
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.models import limits
from spa_jax.policy import EXPERT, Policy
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.sampling import placement
from spa_jax.sampling.engine import Engine
from spa_jax.sampling.parallel import ParallelEngine
from spa_jax.server_config import ServerConfig
from spa_jax.stage_config import ExploreConfig
from spa_jax.training.metrics import MetricsWriter
from spa_jax.trajectory import Sampling, Status, Trajectory

_EXPERT_SESSIONS = 2
_NAMED = 20  # left out tasks that are named on the terminal


@dataclasses.dataclass(frozen=True)
class Recording:
    """What is played, by whom, and where the episodes go.

    Attributes:
      stage: as `provenance` names it.
      folder: gets trajectories.jsonl, failures.jsonl, metrics.jsonl and done.json.
      policy: the policy's folder, or EXPERT.
      games: which games, and how often.
      sampling: how the policy writes.
      title: of the progress bar.
      slips: the share of steps at which the expert does something else.
      flags: those that give the split, the games and the temperature, where not exploration's.
    """

    stage: str
    folder: pathlib.Path
    policy: str
    games: ExploreConfig
    sampling: SamplingConfig
    title: str
    slips: float = 0.0
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a stage has played.

    Attributes:
      episodes: sorted by key.
      failed: how many more were asked for, which the environment failed at every try.
      left_out: how many more were asked for, whose openings do not fit into the context.
    """

    episodes: list[Trajectory]
    failed: int
    left_out: int = 0

    @property
    def asked(self) -> int:
        """All episodes that were asked for."""
        return len(self.episodes) + self.failed + self.left_out

    def summary(self) -> evaluation.Summary:
        """The figures, with the failed episodes counted among the environment's errors."""
        return evaluation.summarize(self.episodes, failed=self.failed, left_out=self.left_out)


def record(run: Run, recording: Recording) -> Recorded:
    """Plays the episodes that the folder lacks.

    Of several processes each plays its own games.

    Raises:
      UserError: the folder holds episodes of other settings or another policy, the split has
        fewer games, the environment breaks its contract or failed more than --max_failed_share of
        the episodes, or none could be played.
    """
    started, settings, folder = time.time(), run.settings, recording.folder
    expert = recording.policy == EXPERT
    games = recording.games
    same = provenance.check_stage(
        run,
        recording.stage,
        folder,
        inputs={"policy": EXPERT if expert else provenance.policy_digest(recording.policy)},
        settings={
            "rollouts": games.rollouts,
            "split": games.split,
            "games": games.games,
            "first_game": games.first_game,
            "temperature": recording.sampling.temperature,
        },
        flags=recording.flags,
    )
    if same and files.has_all(folder, recording.title):
        played = store.read(folder / run_lib.EPISODES)
        _, left_out = failures.count(folder, {t.key for t in played})
        return Recorded(played, failed=0, left_out=left_out)
    policy = None
    if not expert:
        chat_format = settings.chat.name
        policy = policy_lib.load(recording.policy, chat_format, settings.compute)
        policy_lib.record_chat_format(folder, policy)
    sessions = _EXPERT_SESSIONS if expert else most_slots(recording.sampling)
    with open_env(settings.env, sessions, folder / "server.log") as client:
        chosen = choose_games(client, games)
        jobs, own = (
            [
                rollout.Job(task, run.seed, attempt)
                for task in tasks
                for attempt in range(games.rollouts)
            ]
            for tasks in (chosen, distributed.share(chosen))
        )

        def engine() -> Engine | ParallelEngine:
            assert policy is not None  # the expert needs none
            return make_engine(policy, recording.sampling, len(own), run.seed)

        distributed.assert_equal("number of episodes", len(jobs))
        _play(recording, client, own, policy=policy, make_engine=engine, env=settings.env)
    found = _read_played(recording, jobs)
    _check_failures(recording, found, settings.env)
    files.mark_done(
        folder,
        started,
        episodes=len(found.episodes),
        failures=found.failed,
        left_out=found.left_out,
    )
    return found


def _check_failures(recording: Recording, found: Recorded, env: EnvConfig) -> None:
    """Refuses episodes that are those of the survivors, and says what was left out.

    Raises:
      UserError: says how many failed, and of what the last one; or that nothing was played.
    """
    title, folder, limit = recording.title, recording.folder, env.max_failed_share
    if found.left_out and distributed.is_first():
        known = failures.left_out(folder)
        names = sorted({task for task, _, _ in known})
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        print(
            f"{title}: {found.left_out} of {found.asked} episodes were left out, because their "
            f"openings do not fit: tasks {', '.join(names[:_NAMED])}{more} "
            "(--long_openings=error makes this an error)",
            file=sys.stderr,
        )
    if found.failed and (not found.episodes or found.failed > limit * found.asked):
        raise UserError(
            f"{title}: the environment failed {found.failed} of {found.asked} episodes "
            f"({folder / failures.FAILURES} says why; the last: "
            f"{failures.last(folder)[:300] or 'nothing'}): mend it and run the same command again"
            f"{', with --redo if a class is another one then' if env.env == 'custom' else ''}, "
            f"or allow as many with --max_failed_share (is {limit:g})"
        )
    if not found.episodes:
        said = next(iter(failures.left_out(folder).values()), "nothing was asked for")
        raise UserError(f"{title}: none of {found.asked} episodes could be played: {said}")


def choose_games(client: EnvClient, games: ExploreConfig) -> list[Task]:
    """The games of --split that --first_game and --games name, in a shuffled order.

    The order is the split's own, whatever the seed of the run: sorted by name, one task type
    would follow the other, and a part of the split would hold only some of them.

    Raises:
      UserError: if the split has fewer games.
    """
    tasks = client.tasks(games.split)
    order = np.random.default_rng(len(tasks)).permutation(len(tasks))
    tasks = [tasks[i] for i in order]
    last = games.first_game + (games.games or len(tasks) - games.first_game)
    if not games.first_game < last <= len(tasks):
        raise UserError(
            f"--first_game={games.first_game} --games={games.games}: split "
            f"{games.split} has {len(tasks)} games"
        )
    return tasks[games.first_game : last]


def most_slots(sampling: SamplingConfig) -> int:
    """Episodes that this process can play at once: --slots on each of its engines.

    Raises:
      UserError: --sampling_tensor does not divide the devices.
    """
    return sampling.slots * len(placement.groups(jax.local_devices(), sampling.sampling_tensor))


def make_engine(
    policy: Policy, sampling: SamplingConfig, episodes: int, seed: int
) -> Engine | ParallelEngine:
    """The generation engine of a policy: one on each --sampling_tensor local devices.

    Args:
      policy: who writes.
      sampling: how; its slots are those of each engine.
      episodes: to be played, at least 1: there are no more engines and slots than they can fill.
      seed: the base of every episode's random key.

    Raises:
      UserError: the model takes no context of this length, or --sampling_tensor divides neither
        its key heads nor the devices.
    """
    limits.check_length(policy.config, sampling.context_length, "--context_length")
    drawn = Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        stop=tuple(stop.replace("\\n", "\n") for stop in sampling.stop),
    )
    ends = (policy.chat.end_of_turn, *policy_lib.other_ends(policy))

    def make(slots: int, devices: placement.Devices) -> Engine:
        return Engine(
            policy.config,
            policy.params,
            slots=slots,
            context_length=sampling.context_length,
            sampling=drawn,
            end_of_turn=ends,
            seed=seed,
            text=policy.chat.decode,
            turn_deadline_s=sampling.turn_deadline_s,
            devices=devices,
            cache_dtype=sampling.cache_dtype,
        )

    placement.check(policy.config, sampling.sampling_tensor)
    groups = placement.groups(jax.local_devices(), sampling.sampling_tensor)[:episodes]
    each = min(sampling.slots, -(-episodes // len(groups)))
    if len(groups) == 1:
        return make(each, groups[0])
    return ParallelEngine(make, each * len(groups), groups)


@contextlib.contextmanager
def open_env(env: EnvConfig, sessions: int, log: pathlib.Path) -> Iterator[EnvClient]:
    """A client of --env_address, or of a server of our own that ends with the block.

    Args:
      env: which environment, and where.
      sessions: episodes at once.
      log: what a server of our own says.

    Raises:
      UserError: no data is given, or no server answers.
    """
    if env.env_address or env.env == OPENENV:
        client = _client_of(env)
        client.health()
        yield client
        return
    if not env.data:
        give = (
            "MODULE:CLASS of your environment"
            if env.env == "custom"
            else "the folder of the environment's data (make some with python -m "
            f"spa_jax.envs.{env.env}.generate)"
        )
        raise UserError(
            f"--{env.env}_data is not set: give {give}, or --env_address of a running server"
        )
    config = ServerConfig(data_dir=env.data, prompt=env.prompt, max_sessions=sessions, env=env.env)
    with LocalServer(config, _own(log)) as server:
        yield server.client(wait_s=env.env_wait_s)


def _client_of(env: EnvConfig) -> EnvClient:
    """A client of the server at --env_address."""
    if not env.env_address:
        raise UserError("--env=openenv needs --env_address: where does the environment run?")
    token = read_token(env.env_token_file, "--env_token_file")
    if env.env == OPENENV:
        return OpenEnvClient(env.env_address, env, wait_s=env.env_wait_s, token=token)
    return EnvClient(env.env_address, wait_s=env.env_wait_s, token=token)


def _play(
    recording: Recording,
    client: EnvClient,
    jobs: Sequence[rollout.Job],
    *,
    policy: Policy | None,
    make_engine: Callable[[], Engine | ParallelEngine],
    env: EnvConfig,
) -> None:
    """Plays the jobs that the folder does not hold yet; each episode is on disk when it ends.

    Args:
      recording: what is played.
      client: the environments.
      jobs: this process's episodes of the stage.
      policy: the policy; None for the expert.
      make_engine: makes the policy's engine, if there is anything left to play.
      env: the environment's settings.
    """
    folder, title = recording.folder, recording.title
    every = folder / run_lib.EPISODES
    distributed.first_alone(f"{title}: earlier episodes", lambda: store.merge(every))
    done = store.keys(every)
    path, failed = _own(every), _own(folder / failures.FAILURES)
    store.repair(failed)
    strict = env.long_openings == "error"
    known = done if strict else done | failures.left_out(folder).keys()
    todo = [job for job in jobs if job.key not in known]
    bar = tqdm.tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, unit="episode")
    wins, played = 0, 0
    engine = None if policy is None or not todo else make_engine()
    if engine is not None:
        engine.warm_up()
    started, told = time.time(), failures.Told()

    def on_done(trajectory: Trajectory) -> None:
        nonlocal wins, played
        left_out = failures.is_left_out(trajectory)
        if left_out and strict:
            raise UserError(
                f"--long_openings=error: task {trajectory.task!r}: {trajectory.final_observation}"
            )
        if left_out or trajectory.status is Status.ENV_ERROR:
            store.append(failed, trajectory)
            told.tell(trajectory)
            return
        store.append(path, trajectory)
        wins, played = wins + trajectory.success, played + 1
        shown = {"success": f"{wins / played:.2f}"}
        if engine is not None:
            rate = engine.usage.generated / (time.time() - started)
            shown |= {"tokens/s": f"{rate:.0f}", "occupancy": f"{engine.usage.occupancy:.0%}"}
        bar.set_postfix(shown, refresh=False)
        bar.update()

    player = make_player(env, policy)
    with bar, _concluded(told, client, folder):
        if policy is None:
            rollout.play_expert(client, todo, player=player, on_done=on_done, slips=recording.slips)
        elif engine is not None:
            playing = rollout.Rollout(engine, policy.chat, client, player=player, on_done=on_done)
            timing = playing.play(todo)
            with MetricsWriter(folder, enabled=distributed.is_first()) as writer:
                writer.write(len(done) + played, timing.metrics() | {"compiled": engine.compiled})
            if said := timing.bottleneck():
                bar.write(said)


@contextlib.contextmanager
def _concluded(told: failures.Told, client: EnvClient, folder: pathlib.Path) -> Iterator[None]:
    """Says in the end, however it comes, what failed and what was done to answers."""
    try:
        yield
    finally:
        told.conclude(folder)
        for what, count in client.notes.items():
            often = f" ({count} times)" if count > 1 else ""
            tqdm.tqdm.write(f"note: {what}{often}", file=sys.stderr)


def make_player(env: EnvConfig, policy: Policy | None) -> rollout.Player:
    """Who plays, within the limits of an episode.

    Args:
      env: the environment's settings.
      policy: None for the expert.
    """
    return rollout.Player(
        env=env.env,
        policy=EXPERT if policy is None else str(policy.folder),
        version=policy.version if policy else 0,
        max_steps=env.max_steps,
        prompt=env.prompt,
        max_retries=env.max_retries,
        give_up_after=env.give_up_after,
    )


def _read_played(recording: Recording, jobs: Sequence[rollout.Job]) -> Recorded:
    """What came of all processes' jobs, once every process has played its own."""
    path, title = recording.folder / run_lib.EPISODES, recording.title
    distributed.barrier(f"{title}: the episodes")
    distributed.first_alone(f"{title}: all episodes", lambda: store.merge(path))
    wanted = {job.key for job in jobs}
    played = [t for t in (store.read(path) if path.exists() else []) if t.key in wanted]
    missing = wanted - {t.key for t in played}
    left_out = len(missing & failures.left_out(recording.folder).keys())
    return Recorded(played, failed=len(missing) - left_out, left_out=left_out)


def _own(path: pathlib.Path) -> pathlib.Path:
    """The file that this process writes in place of one that a single process would."""
    return store.shard(path, distributed.index()) if distributed.count() > 1 else path
