"""The process that owns one environment, and the server's handle on it.

Server and worker talk through a pipe, one answer a request:

    ("reset", folder, {"task", "prompt", "expert"}) or ("step", text)
    -> ("ok", Observation) | ("user_error", message) | ("env_error", message)
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spa_jax.envs.benchmarks import Benchmark, load
from spa_jax.envs.protocol import USER_ERROR, EnvError, Observation
from spa_jax.errors import UserError

# Fork servers fork from a process without threads; the server itself has some.
_CONTEXT = multiprocessing.get_context("forkserver")


def start_fork_server(benchmark: Benchmark) -> None:
    """Starts the process that workers are forked from; it imports on its own time."""
    from multiprocessing import forkserver

    _CONTEXT.set_forkserver_preload([benchmark.preload] if benchmark.preload else [])
    forkserver.ensure_running()


def _answer(engine: Any, request: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        if request[0] == "reset":
            return "ok", engine.reset(request[1], **request[2])
        return "ok", engine.step(request[1])
    except UserError as error:
        return "user_error", str(error)
    except Exception as error:  # whatever the engine does, the server must hear of it
        return "env_error", f"{type(error).__name__}: {error}"


def _main(connection: Connection, benchmark: Benchmark) -> None:
    """Runs in the worker until the server goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    engine = load(benchmark, benchmark.engine)()
    while True:
        try:
            request = connection.recv()
            connection.send(_answer(engine, request))
        except (EOFError, OSError):
            os._exit(0)  # the server has ended; the engine has nothing to clean up


class Worker:
    """One environment process.  Calls block; one at a time.

    Attributes:
      games: how many games it has been asked to start.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self.games = 0
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
        return self._process.is_alive()

    def reset(self, folder: Path, options: dict[str, Any], deadline_s: float) -> Observation:
        """Starts a game; see `call` for errors."""
        self.games += 1
        return self._call(("reset", folder, options), deadline_s)

    def step(self, text: str, deadline_s: float) -> Observation:
        """Plays one step; see `call` for errors."""
        return self._call(("step", text), deadline_s)

    def _call(self, request: tuple[Any, ...], deadline_s: float) -> Observation:
        """Asks and waits.

        Raises:
          EnvError: if the environment failed, died or took longer than `deadline_s`
            (the process is gone then), or the user's data is wrong (it lives on).
        """
        with self._lock:
            try:
                self._connection.send(request)
                if not self._connection.poll(deadline_s):
                    self.kill()
                    raise EnvError(f"the environment took longer than {deadline_s:g} s")
                kind, value = self._connection.recv()
            except (EOFError, OSError) as error:
                self.kill()
                raise EnvError(f"environment process {self.pid} died; reset to go on") from error
        if kind == "user_error":
            raise EnvError(value, USER_ERROR, retryable=False)
        if kind == "env_error":
            self.kill()
            raise EnvError(f"the environment failed: {value}")
        return value

    def kill(self) -> None:
        """Ends the process now."""
        self._process.kill()
        self._process.join(timeout=5)
        self._connection.close()


class WorkerPool:
    """Workers that no session uses at the moment.  Safe to use from several threads.

    Args:
      benchmark: what they play.
      games_per_worker: a worker is replaced after that many games.
    """

    def __init__(self, benchmark: Benchmark, games_per_worker: int):
        self._benchmark, self._games_per_worker = benchmark, games_per_worker
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def acquire(self, current: Worker | None) -> Worker:
        """A living worker for a session's next game: `current` if it will do."""
        if current is not None:
            self.release(current)
        with self._lock:
            if self._closed:
                raise EnvError("the server is shutting down")
            if self._idle:
                return self._idle.pop()
            worker = Worker(self._benchmark)
            self._all.add(worker)
            return worker

    def release(self, worker: Worker) -> None:
        """Takes a worker back, or ends it if it is worn out or dead."""
        with self._lock:
            if worker.alive() and worker.games < self._games_per_worker and not self._closed:
                self._idle.append(worker)
                return
            self._all.discard(worker)
        worker.kill()

    def close(self) -> None:
        """Ends all workers."""
        with self._lock:
            self._closed = True
            workers, self._all, self._idle = self._all, set(), []
        for worker in workers:
            worker.kill()
