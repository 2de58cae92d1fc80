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
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
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
# How long after its deadline a call is ended from outside, because it could not end itself.
_LATE_S = 0.5
_LONGEST_TEXT = 4_000_000  # characters of an observation: longer than any context
_MB = 2**20
# Between games a process is replaced when it has this share of its memory limit.
_WORN = 0.75

# Why a process was ended.
CAUSES = ("died", "deadline", "memory", "failed", "worn_out")
DIED, DEADLINE, MEMORY, FAILED, WORN_OUT = CAUSES


def start_fork_server(benchmark: Benchmark) -> None:
    """Starts the process that workers are forked from; it imports on its own time."""
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
            now = engine.reset(request[1], **request[2])
        else:
            now = engine.step(request[1])
        if len(now.text) > _LONGEST_TEXT:
            said = f"an observation of {len(now.text)} characters; {_LONGEST_TEXT} are the most"
            return "env_error", (said, "")
        return "ok", now
    except UserError as error:
        return "user_error", str(error)
    # Whatever the engine does, the server must hear of it: SystemExit too.
    except BaseException as error:
        return "env_error", (boundary.one_line(error), boundary.full_traceback(error))


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


class _Watch:
    """Ends processes whose calls are late by themselves: while a message is sent, or half read.

    A pipe holds only so much: a process that was stopped lets whoever sends it more wait for ever,
    and so does one that was stopped in the middle of an answer.
    """

    def __init__(self) -> None:
        self._ends: dict[Any, tuple[float, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._started = False

    @contextlib.contextmanager
    def over(self, deadline_s: float, end: Callable[[], None]) -> Iterator[None]:
        """Calls `end` in a thread if the block takes much longer than `deadline_s`."""
        key = object()
        with self._lock:
            self._ends[key] = (time.monotonic() + deadline_s + _LATE_S, end)
            if not self._started:
                self._started = True
                threading.Thread(target=self._look, daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._ends.pop(key, None)

    def _look(self) -> None:
        while True:
            time.sleep(_LATE_S / 2)
            now = time.monotonic()
            with self._lock:
                late = [key for key, (end, _) in self._ends.items() if end < now]
                ends = [self._ends.pop(key)[1] for key in late]
            for end in ends:
                end()


_watch = _Watch()


def _start(process: Any, deadline_s: float) -> None:
    """Starts a process; replaces a fork server that does not answer.

    Raises:
      EnvError: it did not answer for `deadline_s`; another try may find the next one.
      OSError, EOFError: the process cannot be started.
    """
    forks = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    began, errors = threading.Event(), []

    def start() -> None:
        try:
            process.start()
        except Exception as error:
            errors.append(error)
        began.set()

    threading.Thread(target=start, daemon=True).start()
    if not began.wait(deadline_s):
        now = getattr(forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
        if now is not None and now == forks:  # nobody else has replaced it
            with contextlib.suppress(ProcessLookupError):
                os.kill(now, signal.SIGKILL)
        began.wait(_LATE_S)
        raise EnvError(
            f"the process that starts environments did not answer for {deadline_s:g} s, and was "
            "replaced; reset to go on"
        )
    if errors:
        raise errors[0]


class Worker:
    """One environment process.  Calls block; one at a time.

    Args:
      benchmark: what it plays.
      memory_mb: the most memory it may have, as `memory_mb()` counts it; 0: any.
      start_deadline_s: how long its start may take.

    Raises:
      EnvError, OSError, EOFError: it cannot be started.

    Attributes:
      games: how many games it has been asked to start.
      ended_by: why it was ended, such as DEADLINE; empty while it lives.
    """

    def __init__(
        self, benchmark: Benchmark, memory_mb: int = 0, start_deadline_s: float = 120.0
    ) -> None:
        self.games = 0
        self.ended_by = ""
        self._memory_mb = memory_mb
        self._watched: psutil.Process | None = None
        self._lock = threading.Lock()
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_main, args=(theirs, benchmark), daemon=True)
        try:
            _start(self._process, start_deadline_s)
        finally:
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
                with _watch.over(deadline_s, lambda: self._end(DEADLINE)):
                    self._connection.send(request)
                    self._wait(deadline_s)
                    kind, value = self._connection.recv()
            except (EOFError, OSError) as error:
                if self.ended_by == DEADLINE:
                    self.kill(DEADLINE)
                    raise EnvError(f"the environment took longer than {deadline_s:g} s") from error
                self._process.join(timeout=1)
                code = self._process.exitcode
                self.kill(DIED)
                raise EnvError(
                    f"environment process {self.pid} died ({_ending(code)}); reset to go on"
                ) from error
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

    def _end(self, cause: str) -> None:
        """Ends the process; whoever waits for it notices."""
        self.ended_by = self.ended_by or cause
        self._process.kill()

    def kill(self, cause: str) -> None:
        """Ends the process now, also one that is stopped."""
        self._end(cause)
        self._process.join(timeout=5)
        self._connection.close()


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "it does not say how"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class WorkerPool:
    """Workers that no session uses at the moment.  Safe to use from several threads.

    Args:
      benchmark: what they play.
      games_per_worker: a worker is replaced after that many games.
      memory_mb: the most memory that one may have; 0: any.
      start_deadline_s: how long the start of one may take.
      on_end: called with each worker that is given up, with its `ended_by` set.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        *,
        games_per_worker: int,
        memory_mb: int,
        start_deadline_s: float,
        on_end: Callable[[Worker], None],
    ):
        self._benchmark, self._games_per_worker = benchmark, games_per_worker
        self._memory_mb, self._on_end = memory_mb, on_end
        self._start_deadline_s = start_deadline_s
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
        # Not under the lock: while one process starts, others are given and taken back.
        try:
            worker = Worker(self._benchmark, self._memory_mb, self._start_deadline_s)
        except (OSError, EOFError) as error:
            raise EnvError(f"no environment process can be started: {error}") from error
        with self._lock:
            if not self._closed:
                self._all.add(worker)
                return worker
        worker.kill(WORN_OUT)
        raise EnvError("the server is shutting down")

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
