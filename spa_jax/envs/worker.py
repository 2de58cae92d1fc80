"""The process that owns one environment, and the server's handle on it.

Server and worker talk through a pipe, one answer a request:

    ("reset", place, {"task", "prompt", "expert", "seed"}) or ("step", action)
    -> ("ok", Observation) | ("user_error", message) | ("env_error", (message, traceback))
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from spa_jax.envs import boundary
from spa_jax.envs.benchmarks import Benchmark, make_engine
from spa_jax.envs.contract import Engine
from spa_jax.envs.protocol import USER_ERROR, EnvError, Observation
from spa_jax.errors import UserError
from spa_jax.runtime import interrupt

# Fork servers fork from a process without threads; the server itself has some.
_CONTEXT = multiprocessing.get_context("forkserver")
# How often the memory of a process that is at work is looked at, in seconds.
_LOOK = 0.1
_MB = 2**20
# Between games a process is replaced when it has this share of its memory limit.
_WORN = 0.75

# Why a process was ended.
CAUSES = ("died", "deadline", "memory", "failed", "worn_out")
DIED, DEADLINE, MEMORY, FAILED, WORN_OUT = CAUSES


def start_fork_server(benchmark: Benchmark) -> None:
    """Starts the process that workers are forked from; it imports on its own time."""
    from multiprocessing import forkserver

    _CONTEXT.set_forkserver_preload([benchmark.preload] if benchmark.preload else [])
    with interrupt.unseen():  # nor do the workers see it: Ctrl-C is the server's business
        forkserver.ensure_running()


def resident_mb(process: psutil.Process) -> float:
    """A process's resident memory in MiB, without files that are mapped, such as an index."""
    memory = process.memory_info()
    return (memory.rss - memory.shared) / _MB


def _answer(engine: Engine, request: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        if request[0] == "reset":
            return "ok", engine.reset(request[1], **request[2])
        return "ok", engine.step(request[1])
    except UserError as error:
        return "user_error", str(error)
    # Whatever the engine does, the server must hear of it: SystemExit too.
    except BaseException as error:
        return "env_error", (boundary.one_line(error), boundary.whole(error))


def _main(connection: Connection, benchmark: Benchmark) -> None:
    """Runs in the worker until the server goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    engine = make_engine(benchmark)
    while True:
        try:
            request = connection.recv()
            connection.send(_answer(engine, request))
        except (EOFError, OSError):
            os._exit(0)  # the server has ended; the engine has nothing to clean up


class Worker:
    """One environment process.  Calls block; one at a time.

    Args:
      benchmark: what it plays.
      memory_mb: the most memory it may have, as `memory_mb()` counts it; 0: any.

    Attributes:
      games: how many games it has been asked to start.
      ended_by: why it was ended, such as DEADLINE; empty while it lives.
    """

    def __init__(self, benchmark: Benchmark, memory_mb: int = 0) -> None:
        self.games = 0
        self.ended_by = ""
        self._memory_mb = memory_mb
        self._watched: psutil.Process | None = None
        self._lock = threading.Lock()
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_main, args=(theirs, benchmark), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid or 0

    def alive(self) -> bool:
        """Whether it can still be asked."""
        return not self.ended_by and self._process.is_alive()

    def memory_mb(self) -> float:
        """Its resident memory without files that are mapped, such as an index; 0 if it is gone."""
        try:
            self._watched = self._watched or psutil.Process(self.pid)
            return resident_mb(self._watched)
        except psutil.Error:
            return 0.0

    def worn_out(self, games: int) -> bool:
        """Whether it has played that many games, or is near its memory limit."""
        return self.games >= games or 0 < _WORN * self._memory_mb < self.memory_mb()

    def reset(self, place: Any, options: dict[str, Any], deadline_s: float) -> Observation:
        """Starts a game, by `Engine.reset`; errors as `_call`."""
        self.games += 1
        return self._call(("reset", place, options), deadline_s)

    def step(self, action: str, deadline_s: float) -> Observation:
        """Plays one action; errors as `_call`."""
        return self._call(("step", action), deadline_s)

    def _call(self, request: tuple[Any, ...], deadline_s: float) -> Observation:
        """Asks and waits.

        Raises:
          EnvError: if the environment failed, died, outgrew its memory or took longer than
            `deadline_s` (the process is gone then), or the user's data is wrong (it lives on).
        """
        with self._lock:
            try:
                self._connection.send(request)
                self._wait(deadline_s)
                kind, value = self._connection.recv()
            except (EOFError, OSError) as error:
                self.kill(DIED)
                raise EnvError(f"environment process {self.pid} died; reset to go on") from error
        if kind == "user_error":
            raise EnvError(value, USER_ERROR, retryable=False)
        if kind == "env_error":
            self.kill(FAILED)
            message, traceback = value
            raise EnvError(f"the environment failed: {message}", traceback=traceback)
        self._check_memory()
        return value

    def _wait(self, deadline_s: float) -> None:
        """Returns when an answer is there, or the process's end is."""
        end = time.monotonic() + deadline_s
        while not self._connection.poll(max(0.0, min(_LOOK, end - time.monotonic()))):
            if time.monotonic() >= end:
                self.kill(DEADLINE)
                raise EnvError(f"the environment took longer than {deadline_s:g} s")
            self._check_memory()

    def _check_memory(self) -> None:
        if 0 < self._memory_mb < (used := self.memory_mb()):
            self.kill(MEMORY)
            raise EnvError(
                f"environment process {self.pid} had {used:.0f} MB of memory, more than its "
                f"{self._memory_mb}"
            )

    def kill(self, cause: str) -> None:
        """Ends the process now, also one that is stopped."""
        self.ended_by = self.ended_by or cause
        self._process.kill()
        self._process.join(timeout=5)
        self._connection.close()


class WorkerPool:
    """Workers that no session uses at the moment.  Safe to use from several threads.

    Args:
      benchmark: what they play.
      games_per_worker: a worker is replaced after that many games.
      memory_mb: the most memory that one may have; 0: any.
      on_end: called with each worker that is given up, with its `ended_by` set.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        *,
        games_per_worker: int,
        memory_mb: int,
        on_end: Callable[[Worker], None],
    ):
        self._benchmark, self._games_per_worker = benchmark, games_per_worker
        self._memory_mb, self._on_end = memory_mb, on_end
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._all)

    def acquire(self, current: Worker | None) -> Worker:
        """A living worker for a session's next game: `current` if it will do.

        Raises:
          EnvError: if no process can be started.
        """
        if current is not None:
            self.release(current)
        with self._lock:
            if self._closed:
                raise EnvError("the server is shutting down")
            while self._idle:
                if (idle := self._idle.pop()).alive():
                    return idle
                self._give_up(idle)
            try:
                worker = Worker(self._benchmark, self._memory_mb)
            except (OSError, EOFError) as error:
                raise EnvError(f"no environment process can be started: {error}") from error
            self._all.add(worker)
            return worker

    def release(self, worker: Worker) -> None:
        """Takes a worker back, or ends it if it is worn out or dead."""
        alive = worker.alive()
        worn_out = worker.worn_out(self._games_per_worker)
        with self._lock:
            if alive and not worn_out and not self._closed:
                self._idle.append(worker)
                return
            self._give_up(worker)

    def _give_up(self, worker: Worker) -> None:
        """Ends a worker; under the lock."""
        worker.kill(WORN_OUT if worker.alive() else DIED)
        if worker in self._all:
            self._all.discard(worker)
            self._on_end(worker)

    def close(self) -> None:
        """Ends all workers."""
        with self._lock:
            self._closed = True
            workers, self._all, self._idle = self._all, set(), []
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.kill(WORN_OUT)
