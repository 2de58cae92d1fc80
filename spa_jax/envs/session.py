"""One client's session: its messages, checked and answered by a worker process.

Nothing from the wire is evaluated, unpickled or used as a path: a message is JSON, its fields are
checked by type, and names of splits and tasks are compared with those that the index knows.
"""

import dataclasses
import json
import logging
import threading
import time
from typing import Any

import pydantic

from spa_jax.envs import protocol
from spa_jax.envs.benchmarks import Benchmark, open_index
from spa_jax.envs.protocol import EnvError, Observation, Task
from spa_jax.envs.telemetry import Metrics, note
from spa_jax.envs.text import parse_action
from spa_jax.envs.worker import Worker, WorkerPool
from spa_jax.errors import UserError

_LOG = logging.getLogger(__name__)


class _Request(pydantic.BaseModel):
    """What a client sends; fields that we do not know are let be, as OpenEnv's servers do."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")


class ResetRequest(_Request):
    """The data of a reset; nothing at all is the first task of the first split."""

    task: str | None = pydantic.Field(None, max_length=1000)
    split: str | None = pydantic.Field(None, max_length=1000)
    seed: int | None = pydantic.Field(None, ge=0, lt=2**63)
    prompt: str | None = pydantic.Field(None, max_length=100)
    expert: bool | None = None


class StepRequest(_Request):
    """The data of a step; see `protocol` for what both fields mean."""

    text: str
    parsed: bool = False


@dataclasses.dataclass(frozen=True)
class State:
    """The answer to {"type": "state"}."""

    episode_id: str = ""
    step_count: int = 0
    task: str = ""
    split: str = ""
    worker: int = 0


class Games:
    """The index of the data, with the playable games of each split read once."""

    def __init__(self, benchmark: Benchmark, data_dir: str):
        self.index = open_index(benchmark, data_dir)
        self._tasks: dict[str, list[Task]] = {}
        self._lock = threading.Lock()

    def tasks(self, split: str) -> list[Task]:
        """The playable games of a split.

        Raises:
          UserError: if there is no such split or no playable game in it.
        """
        with self._lock:
            if split not in self._tasks:
                self._tasks[split], problems = self.index.tasks(split)
                for problem in problems:
                    note(_LOG, "left out", logging.WARNING, problem=problem)
            return self._tasks[split]

    def choose(self, request: ResetRequest) -> tuple[str, str]:
        """(split, task) of a reset; a client that knows only seeds gets one by its seed."""
        split, task = request.split, request.task
        if not split:
            splits = self.index.splits()
            if not splits:
                raise UserError(f"{self.index.root} holds no split")
            split = splits[0]
        if not task:
            tasks = self.tasks(split)
            task = tasks[(request.seed or 0) % len(tasks)].task
        return split, task


class Places:
    """The places of a server's sessions.  Safe to use from several threads.

    A connection takes one with its first reset, and gives it back when it ends.

    Args:
      capacity: how many there are.
      metrics: shows how many are taken.

    Attributes:
      closed: whether none is given any more, because the server stops.
    """

    def __init__(self, capacity: int, metrics: Metrics):
        self.capacity, self.closed = capacity, False
        self._metrics = metrics
        self._taken = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Takes one.

        Raises:
          EnvError: all are taken.
        """
        with self._lock:
            if self.closed or self._taken >= self.capacity:
                why = f"all {self.capacity} sessions are in use"
                why = "the server is shutting down" if self.closed else why
                raise EnvError(why, protocol.CAPACITY_REACHED)
            self._taken += 1
            self._metrics.sessions.set(self._taken)

    def give(self) -> None:
        """Gives one back."""
        with self._lock:
            self._taken -= 1
            self._metrics.sessions.set(self._taken)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerContext:
    """What all sessions of a server share.

    Attributes:
      benchmark: the environment.
      games: what can be played.
      places: of sessions.
      pool: the environment processes.
      metrics: the server's counts.
      prompt: the instruction of a session that does not choose one itself.
      reset_deadline_s: a reset that takes longer fails, and its process is ended.
      step_deadline_s: the same for a step.
    """

    benchmark: Benchmark
    games: Games
    places: Places
    pool: WorkerPool
    metrics: Metrics
    prompt: str
    reset_deadline_s: float
    step_deadline_s: float


class Session:
    """Answers the messages of one client, one after the other, in a thread.

    Attributes:
      placed: whether it has one of the server's places: from its first reset on.
      state: what it plays.
    """

    def __init__(self, context: ServerContext):
        self._context = context
        self.placed = False
        self._worker: Worker | None = None
        self._playing = False
        self.state = State()

    def answer(self, message: str | bytes) -> dict[str, Any] | None:
        """The answer to one message; None if it asks to close the session."""
        if not isinstance(message, str):
            return self.error("a message is text, not binary", protocol.INVALID_JSON)
        try:
            request = json.loads(message)
        except (ValueError, RecursionError) as error:
            return self.error(f"not JSON: {error}", protocol.INVALID_JSON)
        if not isinstance(request, dict):
            return self.error("a message is a JSON object", protocol.VALIDATION_ERROR)
        if request.get("type") == "close":
            return None
        return self.ask(request.get("type"), request.get("data"))

    def ask(self, kind: Any, data: Any) -> dict[str, Any]:
        """The answer to a message of that type with that data."""
        data = {} if data is None else data
        try:
            match kind:
                case "reset":
                    return _observation(self._reset(ResetRequest.model_validate(data)))
                case "step":
                    return _observation(self._step(StepRequest.model_validate(data)))
                case "state":
                    return {"type": "state", "data": dataclasses.asdict(self.state)}
        except pydantic.ValidationError as error:
            return self.error(_what_is_wrong(error), protocol.VALIDATION_ERROR)
        except UserError as error:
            return self.error(str(error), protocol.USER_ERROR)
        except EnvError as error:
            if error.code == protocol.CAPACITY_REACHED:
                return self.error(str(error), error.code, error.retryable)
            note(
                _LOG,
                "environment error",
                logging.WARNING,
                code=error.code,
                message=str(error),
                **({"traceback": error.traceback} if error.traceback else {}),
                **dataclasses.asdict(self.state),
            )
            return self.error(str(error), error.code, error.retryable, error.traceback)
        return self.error(f"unknown message type {str(kind)[:100]!r}", protocol.UNKNOWN_TYPE)

    def error(
        self, message: str, code: str, retryable: bool = False, traceback: str = ""
    ) -> dict[str, Any]:
        """An error message, counted."""
        self._context.metrics.errors.labels(code).inc()
        data = {"message": message, "code": code, "retryable": retryable}
        return {"type": "error", "data": data | ({"traceback": traceback} if traceback else {})}

    def _reset(self, request: ResetRequest) -> Observation:
        self._playing = False
        context, started = self._context, time.perf_counter()
        if not self.placed:
            context.places.take()
            self.placed = True
        split, task = context.games.choose(request)
        place = context.games.index.place(split, task)
        worker, self._worker = self._worker, None
        self._worker = context.pool.acquire(worker)
        options: dict[str, Any] = {
            "task": task,
            "prompt": request.prompt or context.prompt,
            "expert": bool(request.expert),
            "seed": request.seed or 0,
        }
        self.state = State(f"{split}/{task}", 0, task, split, self._worker.pid)
        observation = self._worker.reset(place, options, context.reset_deadline_s)
        self._playing = True
        context.metrics.resets.inc()
        context.metrics.seconds.labels("reset").observe(time.perf_counter() - started)
        return observation

    def _step(self, request: StepRequest) -> Observation:
        if not self._playing or self._worker is None:
            raise EnvError("no game is running in this session: reset it first")
        action = request.text if request.parsed else parse_action(request.text)
        context, started = self._context, time.perf_counter()
        try:
            observation = self._worker.step(action, context.step_deadline_s)
        except EnvError:
            self._playing = False
            raise
        self.state = dataclasses.replace(self.state, step_count=self.state.step_count + 1)
        context.metrics.steps.inc()
        context.metrics.seconds.labels("step").observe(time.perf_counter() - started)
        return observation

    def close(self) -> None:
        """Gives back the worker, and then the place: the next client finds both free."""
        if self._worker is not None:
            self._context.pool.release(self._worker)
            self._worker = None
        if self.placed:
            self._context.places.give()
            self.placed = False


def _observation(observation: Observation) -> dict[str, Any]:
    return {"type": "observation", "data": protocol.observation_to_wire(observation)}


def _what_is_wrong(error: pydantic.ValidationError) -> str:
    """One line, without what was sent: that may be huge."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    places = (("data." + ".".join(map(str, e["loc"]))).rstrip(".") for e in found)
    return "; ".join(f"{p}: {e['msg']}" for p, e in zip(places, found, strict=True))
