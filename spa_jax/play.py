"""Episodes are played and recorded: a policy or the expert, an environment, a folder.

`rollout` plays; this module opens the environment, makes the engine, finds out which episodes the
folder lacks, and puts each on the disk when it ends.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm

from spa_jax import evaluation, files, provenance, rollout, store
from spa_jax import policy as policy_lib
from spa_jax import run as run_lib
from spa_jax.config import EnvConfig, SamplingConfig, ServerConfig
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
from spa_jax.sampling.engine import Engine
from spa_jax.sampling.parallel import ParallelEngine
from spa_jax.stage_config import ExploreConfig
from spa_jax.training.metrics import MetricsWriter
from spa_jax.trajectory import Sampling, Status, Trajectory

_EXPERT_SESSIONS = 2
_FAILURES = "failures.jsonl"


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
      flags: those that give the split, the games and the temperature, where not exploration's.
    """

    stage: str
    folder: pathlib.Path
    policy: str
    games: ExploreConfig
    sampling: SamplingConfig
    title: str
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a stage has played.

    Attributes:
      episodes: sorted by key.
      failed: how many more were asked for, which the environment failed at every try.
    """

    episodes: list[Trajectory]
    failed: int

    def summary(self) -> evaluation.Summary:
        """The figures, with the failed episodes counted among the environment's errors."""
        found = evaluation.summarize(self.episodes)
        return dataclasses.replace(found, env_errors=found.env_errors + self.failed)


def record(run: Run, recording: Recording) -> Recorded:
    """Plays the episodes that the folder lacks.

    Of several processes each plays its own games.

    Raises:
      UserError: the folder holds episodes of other settings or another policy, the split has
        fewer games, or the environment failed more than --max_failed_share of the episodes.
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
        return Recorded(store.read(folder / run_lib.EPISODES), failed=0)
    policy = None
    if not expert:
        chat_format = settings.chat.chat_format
        policy = policy_lib.load(recording.policy, chat_format, settings.compute)
        policy_lib.record_chat_format(folder, policy)
    slots = _EXPERT_SESSIONS if expert else recording.sampling.slots
    with open_env(settings.env, slots, folder / "server.log") as client:
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
            return make_engine(policy, recording.sampling, min(slots, len(own)), run.seed)

        distributed.assert_equal("number of episodes", len(jobs))
        _play(recording, client, own, policy=policy, make_engine=engine, env=settings.env)
    played = _read_played(recording, jobs)
    found = Recorded(played, failed=len(jobs) - len(played))
    _check_failures(recording, found, settings.env.max_failed_share)
    files.mark_done(folder, started, episodes=len(played), failures=found.failed)
    return found


def _check_failures(recording: Recording, found: Recorded, limit: float) -> None:
    """Refuses episodes that are those of the survivors.

    Raises:
      UserError: says how many failed, and of what the last one.
    """
    asked = len(found.episodes) + found.failed
    if not found.failed or (found.episodes and found.failed <= limit * asked):
        return
    failures = recording.folder / _FAILURES
    why = ""
    for path in (failures, store.shard(failures, 0)):
        if path.exists():
            why = json.loads(path.read_text().splitlines()[-1])["final_observation"]
    raise UserError(
        f"{recording.title}: the environment failed {found.failed} of {asked} episodes ({failures} "
        f"says why; the last: {why[:200] or 'nothing'}): mend it and run the same command again, "
        f"or allow as many with --max_failed_share (is {limit:g})"
    )


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


def make_engine(
    policy: Policy, sampling: SamplingConfig, slots: int, seed: int
) -> Engine | ParallelEngine:
    """The generation engine of a policy: one on each local device, as far as there are slots."""
    limits.check_length(policy.config, sampling.context_length, "--context_length")
    drawn = Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        stop=tuple(stop.replace("\\n", "\n") for stop in sampling.stop),
    )
    ends = (policy.chat.end_of_turn, *policy_lib.other_ends(policy))

    def make(slots: int, device: jax.Device) -> Engine:
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
            device=device,
        )

    devices = jax.local_devices()[:slots]
    return make(slots, devices[0]) if len(devices) == 1 else ParallelEngine(make, slots, devices)


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
        yield EnvClient(server.address, wait_s=env.env_wait_s)


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
    path, failures = _own(every), _own(folder / _FAILURES)
    todo = [job for job in jobs if job.key not in done]
    bar = tqdm.tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, unit="episode")
    wins, played = 0, 0
    engine = None if policy is None or not todo else make_engine()
    if engine is not None:
        engine.warm_up()
    started = time.time()

    def on_done(trajectory: Trajectory) -> None:
        nonlocal wins, played
        if trajectory.status is Status.ENV_ERROR:
            store.append(failures, trajectory)
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
    with bar:
        if policy is None:
            rollout.play_expert(client, todo, player=player, on_done=on_done)
        elif engine is not None:
            playing = rollout.Rollout(engine, policy.chat, client, player=player, on_done=on_done)
            timing = playing.play(todo)
            with MetricsWriter(folder, enabled=distributed.is_first()) as writer:
                writer.write(len(done) + played, timing.metrics() | {"compiled": engine.compiled})
            if said := timing.bottleneck():
                bar.write(said)


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


def _read_played(recording: Recording, jobs: Sequence[rollout.Job]) -> list[Trajectory]:
    """The episodes of all processes' jobs, sorted by key, once every process has played its own."""
    path, title = recording.folder / run_lib.EPISODES, recording.title
    distributed.barrier(f"{title}: the episodes")
    distributed.first_alone(f"{title}: all episodes", lambda: store.merge(path))
    wanted = {job.key for job in jobs}
    return [t for t in (store.read(path) if path.exists() else []) if t.key in wanted]


def _own(path: pathlib.Path) -> pathlib.Path:
    """The file that this process writes in place of one that a single process would."""
    return store.shard(path, distributed.index()) if distributed.count() > 1 else path
