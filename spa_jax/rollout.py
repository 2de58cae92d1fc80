"""The host loop: engine x environment sessions -> trajectories.  The only place that plays.

Every slot of the engine holds one episode.  A round has four parts:

    harvest   takes the observations of the environments that have answered
    read      gives them to the engine; an episode that is over frees its slot for the next job
    advance   the engine reads and writes a few tokens of every slot
    act       sends the actions of the turns that ended to their environments

No slot waits for the slowest one.  The wall clock has four parts too, which `Timing` holds:

    prefill | decode | waiting: no slot has anything to read or write | host: all the rest
"""

import concurrent.futures
import dataclasses
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from spa_jax import replay
from spa_jax.chat import ChatFormat
from spa_jax.envs.client import EnvClient, Session
from spa_jax.envs.protocol import NO_SERVER, USER_ERROR, EnvError, Observation, Task
from spa_jax.envs.text import parse_action
from spa_jax.errors import UserError
from spa_jax.timing import Timing
from spa_jax.trajectory import Sampling, Status, Step, Trajectory

if TYPE_CHECKING:
    from spa_jax.sampling.engine import Engine, Response
    from spa_jax.sampling.parallel import ParallelEngine

# If the engine has nothing to do: seconds that a round waits for other environments, once one has
# answered.  Prompts that are read together cost less.
_GRACE = 0.05
# If the engine has something to do: how long a round waits for environments, as a share of the
# engine's last round.  A slot whose environment answers in that time misses no round.  If the last
# _RECENT steps took longer on average, a round does not wait at all.
_PATIENCE = 0.2
_RECENT = 32
_EXPERT_SESSIONS = 2  # episodes that the expert plays at once


@dataclasses.dataclass(frozen=True)
class Job:
    """One episode to play; (task, seed, attempt) is its key.

    Attributes:
      task: the game.
      seed: of the game.
      attempt: which rollout of both.
      retry: tries before this one that the environment failed.
      prefix: what has been played of the episode already (`replay.cut`); None: nothing.
    """

    task: Task
    seed: int
    attempt: int
    retry: int = 0
    prefix: Trajectory | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """The key that its trajectory will have."""
        return (self.task.task, self.seed, self.attempt)

    @property
    def number(self) -> int:
        """A 32-bit number of the key: seeds the episode's tokens whatever slot it is in."""
        return zlib.crc32(repr(self.key).encode())


@dataclasses.dataclass(frozen=True)
class Player:
    """What an episode needs to know about who plays.

    Attributes:
      env: the environment's name.
      policy: the policy's name for the record.
      version: the update count of its weights.
      max_steps: environment steps an episode may take.
      prompt: the instruction's name.
      max_retries: tries after an environment error.
      give_up_after: actions in a row that could not be executed, after which an episode is a
        failure; 0: never.
    """

    env: str
    policy: str
    version: int
    _: dataclasses.KW_ONLY
    max_steps: int
    prompt: str
    max_retries: int = 3
    give_up_after: int = 0


class _Episode:
    """One episode while it is played."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.observation: Observation  # what the policy reads next; set by the first reset
        # The end of the last turn, if a stop text ended it and the policy did not write it: it is
        # read as context before the next observation.
        self.forced: list[int] = []
        begun = job.prefix
        self.instruction = begun.instruction if begun else ""
        self.initial_progress = begun.initial_progress if begun else None
        self.steps: list[Step] = list(begun.steps) if begun else []
        self.ids: list[int] = list(begun.token_ids) if begun else []
        self.step_id: list[int] = list(begun.step_id) if begun else []
        self.log_probs: list[float] = list(begun.log_probs) if begun else []
        self.unread = self.ids.copy()  # what the engine reads before anything else

    def read(self, ids: list[int]) -> None:
        """Adds context."""
        self.ids += ids
        self.step_id += [-1] * len(ids)
        self.log_probs += [0.0] * len(ids)

    def write(self, ids: list[int], log_probs: list[float]) -> None:
        """Adds what the policy wrote in the current step."""
        self.ids += ids
        self.step_id += [len(self.steps)] * len(ids)
        self.log_probs += log_probs

    def result(
        self,
        player: Player,
        status: Status,
        final: str,
        *,
        sampling: Sampling | None = None,
        reward: float = 0.0,
    ) -> Trajectory:
        """The finished record.

        Args:
          player: who played.
          status: how it ended.
          final: the last observation, which the policy did not answer.
          sampling: how tokens were drawn; None of the expert.
          reward: R, what the environment paid at the end.
        """
        job = self.job
        return Trajectory(
            env=player.env,
            task=job.task.task,
            split=job.task.split,
            seed=job.seed,
            attempt=job.attempt,
            retry=job.retry,
            policy=player.policy,
            status=status,
            final_reward=reward,
            instruction=self.instruction,
            steps=tuple(self.steps),
            final_observation=final,
            initial_progress=self.initial_progress,
            task_type=job.task.task_type,
            sampling=sampling,
            token_ids=tuple(self.ids),
            step_id=tuple(self.step_id),
            log_probs=tuple(self.log_probs),
        )


def _outcome(observation: Observation, steps: Sequence[Step], player: Player) -> Status | None:
    """How the episode ended with this observation; None if it goes on."""
    if observation.success:
        return Status.SUCCESS
    if observation.done:
        return Status.FAILURE
    if len(steps) >= player.max_steps:
        return Status.MAX_STEPS
    tries = player.give_up_after
    stuck = 0 < tries <= len(steps) and not any(step.grounded for step in steps[-tries:])
    return Status.FAILURE if stuck else None


def _final_reward(episode: _Episode) -> float:
    """R: what the environment paid when it ended the episode; 0 if it did not end it."""
    return episode.observation.reward if episode.observation.done else 0.0


def _raise_if_final(error: EnvError) -> None:
    """Raises UserError if no other episode can go well either.

    The user's data or request is wrong, or the server is gone.
    """
    if error.code in (USER_ERROR, NO_SERVER):
        raise UserError(str(error)) from error


class Rollout:
    """Plays episodes with an engine's policy.

    Args:
      engine: the policy.
      chat: how texts become ids.
      client: where the environments are.
      player: what the records say of the policy, and the limits of an episode.
      on_done: called with each finished trajectory, in order of arrival.  One with status
        ENV_ERROR will be tried again, or has failed for the last time.  One with CONTEXT_FULL and
        no step was not played: its opening does not fit.
    """

    def __init__(
        self,
        engine: "Engine | ParallelEngine",
        chat: ChatFormat,
        client: EnvClient,
        *,
        player: Player,
        on_done: Callable[[Trajectory], None],
    ) -> None:
        self.engine = engine
        self.chat = chat
        self.client = client
        self.player = player
        self.on_done = on_done

    def play(self, jobs: Iterable[Job]) -> Timing:
        """Plays every job; returns where the time went.

        Raises:
          UserError: if the environment says that the data or the request is wrong or breaks its
            contract, its server is gone, or a job's prefix is longer than the context.
        """
        self.jobs = deque(jobs)
        self.sessions: list[Session | None] = [None] * self.engine.slots
        self.episodes: dict[int, _Episode] = {}  # slot -> its episode
        self.waiting: dict[concurrent.futures.Future, int] = {}  # an environment's answer -> slot
        self.waiting_s = 0.0
        self.advance_s = 0.0  # seconds of the engine's last round
        self.env_seconds: list[float] = []  # of each step; the pool's threads append to it
        before, started = dataclasses.replace(self.engine.usage), time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(self.engine.slots) as self.pool:
            try:
                self._loop()
            finally:
                for session in filter(None, self.sessions):
                    session.close()
        return Timing(
            wall_s=time.perf_counter() - started,
            waiting_s=self.waiting_s,
            env_s=sum(self.env_seconds),
            env_steps=len(self.env_seconds),
            slots=self.engine.slots,
            usage=self.engine.usage.since(before),
        )

    def _loop(self) -> None:
        self._fill()
        while self.episodes:
            for slot in self._harvest():
                self._read(slot)
            self._fill()
            started = time.perf_counter()
            ended = self.engine.advance()
            self.advance_s = time.perf_counter() - started
            for slot, response in ended.items():
                self._act(slot, response)
            self._fill()

    def _fill(self) -> None:
        """Gives free slots the next jobs."""
        for slot in range(self.engine.slots):
            if slot not in self.episodes and self.jobs:
                episode = self.episodes[slot] = _Episode(self.jobs.popleft())
                self.engine.open(slot, episode.job.number)
                self.waiting[self.pool.submit(self._reset, slot, episode.job)] = slot

    def _reset(self, slot: int, job: Job) -> Observation:
        session = self.sessions[slot] = self.sessions[slot] or self.client.session()
        first = session.reset(job.task.task, job.task.split, job.seed, prompt=self.player.prompt)
        return first if job.prefix is None else replay.play(session, first, job.prefix)

    def _harvest(self) -> list[int]:
        """Slots whose environment has answered; if the engine is idle, waits until one has."""
        started, idle = time.perf_counter(), not self.engine.busy
        if idle:
            concurrent.futures.wait(self.waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        grace = _GRACE if idle else self._patience()
        done, _ = concurrent.futures.wait(self.waiting, timeout=grace)
        self.waiting_s += time.perf_counter() - started
        ready = []
        for future in done:
            slot = self.waiting.pop(future)
            try:
                self.episodes[slot].observation = future.result()
                ready.append(slot)
            except EnvError as error:
                self._fail(slot, error)
        return sorted(ready)

    def _patience(self) -> float:
        """Seconds that a busy engine waits for environments: 0 if they would take longer."""
        recent = self.env_seconds[-_RECENT:]
        allowed = _PATIENCE * self.advance_s
        return allowed if recent and sum(recent) / len(recent) <= allowed else 0.0

    def _fail(self, slot: int, error: EnvError) -> None:
        """An environment error is not the policy's failure: it is recorded, and tried again."""
        _raise_if_final(error)
        episode = self.episodes[slot]
        self._end(slot, Status.ENV_ERROR, error.full_message)
        job = episode.job
        if error.retryable and job.retry < self.player.max_retries:
            self.jobs.append(dataclasses.replace(job, retry=job.retry + 1))
        session, self.sessions[slot] = self.sessions[slot], None
        if session is not None:
            session.close()

    def _end(self, slot: int, status: Status, final: str) -> None:
        episode = self.episodes.pop(slot)
        reward = 0.0 if status is Status.ENV_ERROR else _final_reward(episode)
        sampling = self.engine.sampling
        self.on_done(episode.result(self.player, status, final, sampling=sampling, reward=reward))

    def _read(self, slot: int) -> None:
        """Shows the policy what came back, or ends the episode."""
        episode, observation = self.episodes[slot], self.episodes[slot].observation
        status = _outcome(observation, episode.steps, self.player)
        if status is not None:
            self._end(slot, status, observation.text)
            return
        if episode.unread:
            ids, episode.unread = episode.unread, []
            if not self.engine.fits(slot, ids):
                raise UserError(f"task {episode.job.task.task!r}: {self._too_long(ids)}")
            self.engine.submit(slot, ids)  # the record has them
            return
        if not episode.ids:
            episode.instruction = observation.instruction
            episode.initial_progress = observation.progress
            ids = self.chat.first_turn(observation.instruction, observation.text)
            if not self.engine.fits(slot, ids):
                self._end(slot, Status.CONTEXT_FULL, self._too_long(ids))
                return
        else:
            ids = episode.forced + self.chat.next_turn(observation.text)
            episode.forced = []
            if not self.engine.fits(slot, ids):
                self._end(slot, Status.CONTEXT_FULL, observation.text)
                return
        episode.read(ids)
        self.engine.submit(slot, ids)

    def _too_long(self, ids: list[int]) -> str:
        """What to say of an opening for which the context has no room."""
        return (
            f"its opening has {len(ids)} tokens, for which --context_length="
            f"{self.engine.context_length} has no room: raise it"
        )

    def _act(self, slot: int, response: "Response") -> None:
        """Records a turn and sends its action to the environment, unless a limit cut it."""
        episode = self.episodes[slot]
        text = self.chat.decode(response.ids)
        action = parse_action(text.split(response.stop)[0] if response.stop else text)
        episode.write(response.ids, response.log_probs)
        step = Step(
            observation=episode.observation.text,
            response=text,
            action=action,
            grounded=False,  # until the environment has answered
            progress=episode.observation.progress,
            policy_version=self.player.version,
            partial=not response.ended,
        )
        episode.steps.append(step)
        if not response.ended:
            self._end(slot, Status(response.ending.value), "")
            return
        if response.stop:
            episode.forced = [self.chat.end_of_turn]
        self.waiting[self.pool.submit(self._step, slot, action)] = slot

    def _step(self, slot: int, action: str) -> Observation:
        session = self.sessions[slot]
        assert session is not None  # a step comes after a reset
        started = time.perf_counter()
        observation = session.step(action, parsed=True)
        self.env_seconds.append(time.perf_counter() - started)
        steps = self.episodes[slot].steps
        steps[-1] = dataclasses.replace(
            steps[-1], grounded=observation.grounded, progress=observation.progress
        )
        return observation


def play_expert(
    client: EnvClient,
    jobs: Iterable[Job],
    *,
    player: Player,
    on_done: Callable[[Trajectory], None],
    slips: float = 0.0,
) -> None:
    """Plays every job with the environment's own expert.

    Args:
      client: where the environments are.
      jobs: the episodes.
      player: what the records say, and the limits of an episode; its policy is "expert".
      on_done: called with each finished trajectory, from this thread.
      slips: the share of steps at which it does something else that could be done.

    Raises:
      UserError: it is to slip, and the environment does not list what could be done.
    """

    def play(job: Job) -> Trajectory:
        return _expert_episode(client, job, player, slips)

    with concurrent.futures.ThreadPoolExecutor(_EXPERT_SESSIONS) as pool:
        for trajectory in pool.map(play, jobs):
            on_done(trajectory)


def _expert_episode(client: EnvClient, job: Job, player: Player, slips: float) -> Trajectory:
    """One episode of the expert; an environment error is tried again here."""
    while True:
        episode, draw = _Episode(job), random.Random(job.number)
        try:
            with client.session() as session:
                now = session.reset(
                    job.task.task, job.task.split, job.seed, expert=True, prompt=player.prompt
                )
                episode.instruction, episode.initial_progress = now.instruction, now.progress
                while (status := _outcome(now, episode.steps, player)) is None:
                    action = now.expert_action
                    if draw.random() < slips:
                        action = draw.choice(_others(now))
                    after = session.step(action, parsed=True)
                    episode.steps.append(
                        Step(now.text, action, action, after.grounded, progress=after.progress)
                    )
                    now = after
                episode.observation = now
                return episode.result(player, status, now.text, reward=_final_reward(episode))
        except EnvError as error:
            _raise_if_final(error)
            if not error.retryable or job.retry >= player.max_retries:
                return episode.result(player, Status.ENV_ERROR, error.full_message)
            time.sleep(0.5)
            job = dataclasses.replace(job, retry=job.retry + 1)


def _others(now: Observation) -> list[str]:
    """What the expert could do in place of what it would do.

    Raises:
      UserError: the environment does not say.
    """
    others = [action for action in now.admissible if action != now.expert_action]
    if not others:
        raise UserError(
            "--demo_slips: the environment does not list what could be done "
            "(Observation.admissible), so its expert cannot slip; drop the flag"
        )
    return others
