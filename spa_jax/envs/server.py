"""An environment server: sessions over WebSockets, each with a process of its own.

It speaks OpenEnv's session protocol (`spa_jax.envs.protocol`) on /ws and answers GET
/health, /metadata and /schema, and /tasks?split=... for what can be played.  No JAX, and
no environment's engine: that lives in the workers (`spa_jax.envs.worker`), which start when they
are needed, so that the server answers at once.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import fastapi
import pydantic
import uvicorn

from spa_jax.envs import protocol
from spa_jax.envs.benchmarks import BENCHMARKS, Benchmark, load
from spa_jax.envs.client import EnvClient
from spa_jax.envs.protocol import EnvError, Observation, Task
from spa_jax.envs.worker import Worker, WorkerPool, start_fork_server
from spa_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_LISTENING = re.compile(r"^listening on (http://\S+)$", re.MULTILINE)
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What a server is started with.

    Attributes:
      data_dir: the environment's data, such as ALFWorld's json_2.1.1, its parent, or a folder
        that holds splits.
      prompt: the instruction of a session that does not choose one itself.
      max_sessions: how many sessions may be open at once; each has a process.
      games_per_worker: a process is replaced after that many games; 0: as many as suit the
        environment.
      reset_deadline_s: a reset that takes longer fails, and its process is ended.
      step_deadline_s: the same for a step.
      env: the environment's name, one of `benchmarks.BENCHMARKS`.
    """

    data_dir: str
    prompt: str = "paper"
    max_sessions: int = 16
    games_per_worker: int = 0
    reset_deadline_s: float = 120.0
    step_deadline_s: float = 60.0
    env: str = "alfworld"


@dataclasses.dataclass(frozen=True)
class _State:
    """The answer to {"type": "state"}."""

    episode_id: str
    step_count: int
    task: str
    split: str
    worker: int


class _Games:
    """The index of the data, with the playable games of each split read once."""

    def __init__(self, benchmark: Benchmark, data_dir: str):
        self.index = load(benchmark, benchmark.index)(data_dir)
        self._tasks: dict[str, list[Task]] = {}
        self._lock = threading.Lock()

    def tasks(self, split: str) -> list[Task]:
        with self._lock:
            if split not in self._tasks:
                self._tasks[split], problems = self.index.tasks(split)
                for problem in problems:
                    _LOG.warning("left out: %s", problem)
            return self._tasks[split]

    def choose(self, data: dict[str, Any]) -> tuple[str, str]:
        """(split, task) of a reset; a client that knows only seeds gets one by its seed."""
        split, task = data.get("split"), data.get("task")
        if not split:
            splits = self.index.splits()
            if not splits:
                raise UserError(f"{self.index.root} holds no split")
            split = splits[0]
        if not task:
            tasks = self.tasks(split)
            task = tasks[(data.get("seed") or 0) % len(tasks)].task
        return split, task


class _Session:
    """One connection: answers its messages, one after the other, in a thread."""

    def __init__(self, config: ServerConfig, games: _Games, pool: WorkerPool):
        self._config, self._games, self._pool = config, games, pool
        self._worker: Worker | None = None
        self._playing = False
        self._state = _State("", 0, "", "", 0)

    def answer(self, message: str) -> dict[str, Any] | None:
        """The answer to one message; None if it asks to close the session."""
        try:
            request = json.loads(message)
        except ValueError as error:
            return _error(f"not JSON: {error}", protocol.INVALID_JSON, False)
        if not isinstance(request, dict):
            return _error("a message is a JSON object", protocol.VALIDATION_ERROR, False)
        kind, data = request.get("type"), request.get("data") or {}
        try:
            match kind:
                case "reset":
                    return _observation(self._reset(_checked(data, _RESET_FIELDS)))
                case "step":
                    return _observation(self._step(_checked(data, _STEP_FIELDS)))
                case "state":
                    return {"type": "state", "data": dataclasses.asdict(self._state)}
                case "close":
                    return None
        except UserError as error:
            return _error(str(error), protocol.USER_ERROR, False)
        except EnvError as error:
            return _error(str(error), error.code, error.retryable)
        return _error(f"unknown message type {kind!r}", protocol.UNKNOWN_TYPE, False)

    def _reset(self, data: dict[str, Any]) -> Observation:
        self._playing = False
        split, task = self._games.choose(data)
        folder = self._games.index.folder(split, task)
        worker, self._worker = self._worker, None
        self._worker = self._pool.acquire(worker)
        options = {
            "task": task,
            "prompt": data.get("prompt") or self._config.prompt,
            "expert": bool(data.get("expert")),
        }
        observation = self._worker.reset(folder, options, self._config.reset_deadline_s)
        self._playing = True
        self._state = _State(f"{split}/{task}", 0, task, split, self._worker.pid)
        return observation

    def _step(self, data: dict[str, Any]) -> Observation:
        if not self._playing or self._worker is None:
            raise EnvError("no game is running in this session: reset it first")
        if "text" not in data:
            raise EnvError('a step needs "text"', protocol.VALIDATION_ERROR, False)
        try:
            observation = self._worker.step(data["text"], self._config.step_deadline_s)
        except EnvError:
            self._playing = False
            raise
        self._state = dataclasses.replace(self._state, step_count=self._state.step_count + 1)
        return observation

    def close(self) -> None:
        """Gives the worker back."""
        if self._worker is not None:
            self._pool.release(self._worker)
            self._worker = None


_RESET_FIELDS: dict[str, type] = {
    "task": str, "split": str, "seed": int, "prompt": str, "expert": bool,
}  # fmt: skip
_STEP_FIELDS: dict[str, type] = {"text": str}


def _checked(data: Any, fields: dict[str, type]) -> dict[str, Any]:
    """`data` if it is an object whose known fields have their types; others are let be."""
    if not isinstance(data, dict):
        raise EnvError('"data" must be an object', protocol.VALIDATION_ERROR, False)
    for name, kind in fields.items():
        if data.get(name) is not None and not isinstance(data[name], kind):
            raise EnvError(f'"{name}" must be {kind.__name__}', protocol.VALIDATION_ERROR, False)
    return data


def _observation(observation: Observation) -> dict[str, Any]:
    return {"type": "observation", "data": protocol.observation_to_wire(observation)}


def _error(message: str, code: str, retryable: bool) -> dict[str, Any]:
    data = {"message": message, "code": code, "retryable": retryable}
    return {"type": "error", "data": data}


def make_app(config: ServerConfig) -> fastapi.FastAPI:
    """The server's application.

    Raises:
      UserError: if the data folder is missing or the prompt is unknown.
    """
    benchmark = BENCHMARKS[config.env]
    prompts = load(benchmark, benchmark.prompts).PROMPTS
    if config.prompt not in prompts:
        raise UserError(f"--prompt={config.prompt}: choose one of {', '.join(prompts)}")
    if config.max_sessions < 1 or config.games_per_worker < 0:
        raise UserError("--max_sessions must be at least 1, --games_per_worker at least 0")
    games = _Games(benchmark, config.data_dir)
    pool = WorkerPool(benchmark, config.games_per_worker or benchmark.games_per_worker)
    # Every open session may have a call waiting; the others are for /tasks.
    threads = concurrent.futures.ThreadPoolExecutor(config.max_sessions + 2)

    async def in_thread(function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        start_fork_server(benchmark)
        yield
        pool.close()
        threads.shutdown(wait=False, cancel_futures=True)

    app = fastapi.FastAPI(title=f"spa_jax {benchmark.name}", lifespan=lifespan)
    _add_pages(app, benchmark, games, in_thread)
    open_sessions: set[_Session] = set()

    @app.websocket("/ws")
    async def session(socket: fastapi.WebSocket) -> None:
        await socket.accept()
        if len(open_sessions) >= config.max_sessions:
            await _turn_away(socket, f"all {config.max_sessions} sessions are in use")
            return
        session = _Session(config, games, pool)
        open_sessions.add(session)
        try:
            while answer := await in_thread(session.answer, await socket.receive_text()):
                await socket.send_text(json.dumps(answer))
        except fastapi.WebSocketDisconnect:
            return
        finally:
            open_sessions.discard(session)
            await in_thread(session.close)
        # After the release: a client that waits for this finds a free place.
        await socket.close()

    return app


async def _turn_away(socket: fastapi.WebSocket, message: str) -> None:
    """Answers a client's first message with the reason; closing at once could overtake it."""
    try:
        async with asyncio.timeout(30):
            await socket.receive_text()
            await socket.send_text(json.dumps(_error(message, protocol.CAPACITY_REACHED, True)))
        await socket.close()
    except (fastapi.WebSocketDisconnect, TimeoutError):
        pass


def _add_pages(
    app: fastapi.FastAPI, benchmark: Benchmark, games: _Games, in_thread: Callable[..., Any]
) -> None:
    """The GET pages."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.get("/metadata")
    async def metadata() -> dict[str, Any]:
        return {
            "name": benchmark.name,
            "description": benchmark.description,
            "splits": games.index.splits(),
            "prompts": list(load(benchmark, benchmark.prompts).PROMPTS),
        }

    @app.get("/schema")
    async def schema() -> dict[str, Any]:
        text = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
        return {
            "action": text,
            "observation": pydantic.TypeAdapter(Observation).json_schema(),
            "state": pydantic.TypeAdapter(_State).json_schema(),
        }

    @app.get("/tasks")
    async def tasks(split: str) -> Any:
        try:
            found = await in_thread(games.tasks, split)
        except UserError as error:
            data = _error(str(error), protocol.USER_ERROR, False)["data"]
            return fastapi.responses.JSONResponse(data, status_code=400)
        return [dataclasses.asdict(task) for task in found]


def _exit_with_parent(server: uvicorn.Server) -> None:
    """Ends the server when standard input closes: whoever held its other end is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        server.should_exit = True
        time.sleep(5)
        os._exit(1)  # a session did not end in time

    threading.Thread(target=wait, daemon=True).start()


def serve(
    config: ServerConfig, host: str = "127.0.0.1", port: int = 8700, exit_with_parent: bool = False
) -> None:
    """Serves until SIGTERM or SIGINT.  `port` 0 takes a free one; the first line printed says it.

    Args:
      config: the environment.
      host: the address to listen on; beyond loopback anybody who reaches it can play.
      port: the port.
      exit_with_parent: whether to end when standard input closes.

    Raises:
      UserError: if the data folder is missing or the port is taken.
    """
    app = make_app(config)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: {error.strerror}; choose another (0: any free one)"
        ) from error
    # Clients that compile for minutes answer late; those that are gone must free their session.
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ws_ping_interval=60,
            ws_ping_timeout=600,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
    )
    if exit_with_parent:
        _exit_with_parent(server)
    print(f"listening on http://{host}:{listener.getsockname()[1]}", flush=True)
    server.run(sockets=[listener])


class LocalServer:
    """A server in a process of its own on this machine, for as long as the `with` block.

    It ends with this process, however this process ends.

    Args:
      config: the environment.
      log: where the server's output goes; a temporary file if None.
      start_deadline_s: how long the start may take.

    Attributes:
      address: "http://127.0.0.1:PORT", inside the block.
    """

    def __init__(
        self, config: ServerConfig, log: Path | None = None, start_deadline_s: float = 60.0
    ):
        self.address = ""
        self._config, self._log, self._start_deadline_s = config, log, start_deadline_s
        self._temporary = log is None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> "LocalServer":
        # The server runs in the repository's folder, wherever we are.
        values = dataclasses.asdict(self._config)
        values[f"{self._config.env}_data"] = os.path.abspath(values.pop("data_dir"))
        flags = [f"--{name}={value}" for name, value in values.items()]
        output: IO[bytes]
        if self._log is None:
            output = tempfile.NamedTemporaryFile(prefix="serve_env-", suffix=".log", delete=False)
            self._log = Path(output.name)
        else:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            output = self._log.open("wb")
        with output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.serve_env", "--port=0", "--exit_with_parent"]
                + flags,
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
        try:
            self.address = self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> str:
        assert self._process is not None and self._log is not None
        deadline = time.monotonic() + self._start_deadline_s
        while time.monotonic() < deadline:
            said = self._log.read_text(errors="replace")
            if match := _LISTENING.search(said):
                with contextlib.suppress(UserError):
                    EnvClient(match.group(1)).health()
                    return match.group(1)
            elif self._process.poll() is not None:
                last = said.strip().splitlines()[-1:] or ["nothing"]
                raise UserError(
                    f"the environment server did not start; it said: {last[0]} (log: {self._log})"
                )
            time.sleep(0.02)
        raise UserError(f"the environment server did not start in time; see {self._log}")

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=8)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._temporary and self.address and self._log is not None:
            self._log.unlink(missing_ok=True)
