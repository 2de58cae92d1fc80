"""An environment server: sessions over WebSockets, each with a process of its own.

It speaks OpenEnv's session protocol (`spa_jax.envs.protocol`) on /ws and its HTTP pages (/health,
/metadata, /schema, /state, and one game a request with POST /reset and /step), and answers GET
/tasks?split=... for what can be played and /metrics for Prometheus.  No JAX, and no environment's
engine: that lives in the workers (`spa_jax.envs.worker`), which start when they are needed, so
that the server answers at once.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any, TypeVar

import fastapi
import prometheus_client
import pydantic
import uvicorn

from spa_jax.config import ServerConfig
from spa_jax.envs import capacity, protocol
from spa_jax.envs.benchmarks import BENCHMARKS, Benchmark, prompt_names
from spa_jax.envs.guard import Guard, Rate, check_host, is_loopback
from spa_jax.envs.protocol import Observation
from spa_jax.envs.session import Games, ServerContext, Session, State, StepRequest
from spa_jax.envs.telemetry import Metrics, log_json, note
from spa_jax.envs.worker import Worker, WorkerPool, start_fork_server
from spa_jax.errors import UserError
from spa_jax.runtime import children, interrupt

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_TURN_AWAY_S = 30.0  # how long a client that is turned away may take to say something
# Of the answers to one-shot requests.
_HTTP_STATUS = {
    protocol.INVALID_JSON: 422,
    protocol.VALIDATION_ERROR: 422,
    protocol.USER_ERROR: 400,
    protocol.CAPACITY_REACHED: 503,
}


def _check(config: ServerConfig, benchmark: Benchmark) -> None:
    """Raises UserError at settings that make no sense."""
    prompts = prompt_names(benchmark)
    if config.prompt not in prompts:
        raise UserError(f"--prompt={config.prompt}: choose one of {', '.join(prompts)}")
    for name, value in dataclasses.asdict(config).items():
        if not isinstance(value, str) and value < 0:
            raise UserError(f"--{name}={value:g} must not be negative")
    for name in ("reset_deadline_s", "step_deadline_s", "max_message_kb"):
        if not getattr(config, name):
            raise UserError(f"--{name} must be more than 0")


class _Sessions:
    """The sessions of a server: opens them up to its capacity, and serves its connections.

    Attributes:
      context: what all sessions share.
      capacity: how many may be open.
      draining: whether the server is about to stop.
      busy: calls that are being answered.
    """

    def __init__(self, config: ServerConfig):
        benchmark = BENCHMARKS[config.env]
        _check(config, benchmark)
        games = Games(benchmark, config.data_dir)
        self.config = config
        fitting = capacity.sessions(benchmark, capacity.free_mb())
        self.capacity = config.max_sessions or fitting
        metrics = Metrics(self.capacity)
        pool = WorkerPool(
            benchmark,
            games_per_worker=config.games_per_worker or benchmark.games_per_worker,
            memory_mb=config.worker_memory_mb or benchmark.limit_mb,
            on_end=self._on_worker_end,
        )
        self.context = ServerContext(
            benchmark=benchmark,
            games=games,
            pool=pool,
            metrics=metrics,
            prompt=config.prompt,
            reset_deadline_s=config.reset_deadline_s,
            step_deadline_s=config.step_deadline_s,
        )
        self.draining, self.busy = False, 0
        self._open: set[Session] = set()
        # Every open session may have a call waiting; the others are for /tasks.
        self._threads = concurrent.futures.ThreadPoolExecutor(self.capacity + 2)

    def _on_worker_end(self, worker: Worker) -> None:
        self.context.metrics.worker_ends.labels(worker.ended_by).inc()
        note(_LOG, "worker ended", cause=worker.ended_by, pid=worker.pid, games=worker.games)

    async def in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        """The function's value, without holding up the others."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def close(self) -> None:
        """Ends all environment processes."""
        self.context.pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def refusal(self) -> str:
        """Why no session can be opened now; empty if one can."""
        if self.draining:
            return "the server is shutting down"
        if len(self._open) >= self.capacity:
            return f"all {self.capacity} sessions are in use"
        return ""

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Session]:
        """A session that counts as open until its process is free again."""
        session = Session(self.context)
        self._open.add(session)
        self.context.metrics.sessions.set(len(self._open))
        try:
            yield session
        finally:
            # First the process, then the place: the next client finds both free.
            await self.in_thread(session.close)
            self._open.discard(session)
            self.context.metrics.sessions.set(len(self._open))

    async def serve_socket(self, socket: fastapi.WebSocket) -> None:
        """Serves one connection from its opening to its end."""
        await socket.accept()
        if why := self.refusal:
            await self._turn_away(socket, why)
            return
        started, state = time.monotonic(), State()
        how = "gone"
        try:
            async with self.opened() as session:
                try:
                    how = await self._converse(socket, session)
                finally:
                    state = session.state
            # After the release: a client that waits for this finds a free place.
            if how != "gone":
                await socket.close(1012 if how == "shutdown" else 1000)
        except fastapi.WebSocketDisconnect:
            pass
        finally:
            self.context.metrics.session_ends.labels(how).inc()
            note(
                _LOG,
                "session ended",
                how=how,
                episode=state.episode_id,
                seconds=round(time.monotonic() - started, 3),
            )

    async def _converse(self, socket: fastapi.WebSocket, session: Session) -> str:
        """Answers until the session is over; how it ended (see `telemetry.Metrics`)."""
        rate = Rate(self.config.messages_per_s)
        while not self.draining:
            try:
                async with asyncio.timeout(self.config.idle_timeout_s or None):
                    event = await socket.receive()
            except TimeoutError:
                why = f"nothing was heard for {self.config.idle_timeout_s:g} s: session closed"
                answer = session.error(why, protocol.SESSION_ERROR, retryable=True)
                await socket.send_text(json.dumps(answer))
                return "idle"
            if event["type"] == "websocket.disconnect":
                return "shutdown" if self.draining else "gone"
            await rate.wait()
            message = event["bytes"] if event.get("text") is None else event["text"]
            self.busy += 1
            try:
                reply = await self.in_thread(session.answer, message)
                if reply is None:
                    return "closed"
                await socket.send_text(json.dumps(reply))
            finally:
                self.busy -= 1
        return "shutdown"

    async def _turn_away(self, socket: fastapi.WebSocket, why: str) -> None:
        """Answers a client's first message with the reason; closing at once could overtake it."""
        self.context.metrics.session_ends.labels("turned_away").inc()
        error = Session(self.context).error(why, protocol.CAPACITY_REACHED, retryable=True)
        try:
            async with asyncio.timeout(_TURN_AWAY_S):
                await socket.receive()
                await socket.send_text(json.dumps(error))
            await socket.close()
        except (fastapi.WebSocketDisconnect, RuntimeError, TimeoutError):
            pass

    async def serve_once(self, request: fastapi.Request, step: bool) -> fastapi.Response:
        """Plays one game's reset, and its first step if asked to, in a session of its own."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.config.max_message_kb * 1024:
                why = f"a message has at most {self.config.max_message_kb} KiB"
                return _respond(Session(self.context).error(why, protocol.VALIDATION_ERROR), 413)
        if why := self.refusal:
            error = Session(self.context).error(why, protocol.CAPACITY_REACHED, retryable=True)
            return _respond(error)
        self.busy += 1
        try:
            async with self.opened() as session:
                return _respond(await self.in_thread(_play_once, session, bytes(body), step))
        finally:
            self.busy -= 1


def _play_once(session: Session, body: bytes, step: bool) -> dict[str, Any]:
    try:
        data = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        return session.error(f"not JSON: {error}", protocol.INVALID_JSON)
    answer = session.ask("reset", data)
    if step and answer["type"] == "observation":
        answer = session.ask("step", data.get("action"))
    return answer


def _respond(answer: dict[str, Any], status: int = 0) -> fastapi.Response:
    code = answer["data"].get("code")
    status = status or (_HTTP_STATUS.get(code, 500) if code else 200)
    return fastapi.responses.JSONResponse(answer["data"], status_code=status)


def make_app(config: ServerConfig) -> tuple[fastapi.FastAPI, _Sessions]:
    """The server's application and its sessions.

    Raises:
      UserError: if the data folder is missing or a setting makes no sense.
    """
    sessions = _Sessions(config)
    benchmark = sessions.context.benchmark

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        start_fork_server(benchmark)
        yield
        sessions.close()

    app = fastapi.FastAPI(title=f"spa_jax {benchmark.name}", lifespan=lifespan)
    _add_pages(app, sessions)

    @app.websocket("/ws")
    async def session(socket: fastapi.WebSocket) -> None:
        await sessions.serve_socket(socket)

    @app.post("/reset")
    async def reset(request: fastapi.Request) -> fastapi.Response:
        return await sessions.serve_once(request, step=False)

    @app.post("/step")
    async def step(request: fastapi.Request) -> fastapi.Response:
        return await sessions.serve_once(request, step=True)

    return app, sessions


def _add_pages(app: fastapi.FastAPI, sessions: _Sessions) -> None:
    """The GET pages."""
    context = sessions.context

    @app.get("/health")
    async def health() -> fastapi.Response:
        well = not sessions.draining
        content = {"status": "healthy" if well else "unhealthy"}
        return fastapi.responses.JSONResponse(content, status_code=200 if well else 503)

    @app.get("/metadata")
    async def metadata() -> dict[str, Any]:
        return {"name": context.benchmark.name, "description": context.benchmark.description}

    @app.get("/schema")
    async def schema() -> dict[str, Any]:
        return {
            "action": StepRequest.model_json_schema(),
            "observation": pydantic.TypeAdapter(Observation).json_schema(),
            "state": pydantic.TypeAdapter(State).json_schema(),
        }

    @app.get("/state")
    async def state() -> dict[str, Any]:
        return dataclasses.asdict(State())  # as OpenEnv's: that of a session which plays nothing

    @app.get("/tasks")
    async def tasks(split: str) -> Any:
        try:
            found = await sessions.in_thread(context.games.tasks, split)
        except UserError as error:
            return _respond(Session(context).error(str(error), protocol.USER_ERROR))
        return [dataclasses.asdict(task) for task in found]

    @app.get("/metrics")
    async def metrics() -> fastapi.Response:
        context.metrics.workers.set(len(context.pool))
        return fastapi.Response(
            context.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )


class _Uvicorn(uvicorn.Server):
    """Told to stop, it lets the calls in progress finish before it closes anything."""

    def __init__(self, config: uvicorn.Config, sessions: _Sessions):
        super().__init__(config)
        self._sessions = sessions
        self._interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes that it must stop; a second Ctrl-C ends the process."""
        if sig == signal.SIGINT:
            if self._interrupted:
                interrupt.end_at_once()
            self._interrupted = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._sessions.draining = True
        note(_LOG, "stopping", busy=self._sessions.busy)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._sessions.config.drain_s):
                while self._sessions.busy:
                    await asyncio.sleep(0.01)
        await super().shutdown(sockets)


def _exit_with_parent(server: uvicorn.Server) -> None:
    """Ends the server when standard input closes: whoever held its other end is gone."""

    def stop() -> None:
        server.should_exit = True
        time.sleep(8)
        os._exit(1)  # a session did not end in time

    children.at_end_of_parent(stop)


def _raise_file_limit() -> None:
    """Every session has a socket, a pipe and a process handle: 1,024 files are not enough."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run(config: ServerConfig, *, host: str, port: int, token: str, exit_with_parent: bool) -> None:
    """Serves until it is told to stop: `spa_jax.envs.serve`, with the token itself.

    Raises:
      UserError: if the data folder is missing, the port is taken or a token is needed.
      KeyboardInterrupt: at Ctrl-C, when it has stopped in good order.
    """
    check_host(host, token)
    log_json()
    _raise_file_limit()
    app, sessions = make_app(config)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: {error.strerror}; choose another (0: any free one)"
        ) from error
    server = _Uvicorn(_uvicorn_config(config, Guard(app, token), sessions.capacity), sessions)
    if exit_with_parent:
        _exit_with_parent(server)
    # Uvicorn raises the signal again when it has stopped: stopped in good order is no failure.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    if not is_loopback(host):
        note(_LOG, "not encrypted: put a proxy that speaks TLS in front", logging.WARNING)
    note(_LOG, "serving", env=config.env, capacity=sessions.capacity, pid=os.getpid())
    print(f"listening on http://{host}:{listener.getsockname()[1]}", flush=True)
    server.run(sockets=[listener])


def _uvicorn_config(config: ServerConfig, app: Guard, most: int) -> uvicorn.Config:
    # Clients that compile for minutes answer late; those that are gone must free their session.
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        ws_ping_interval=60,
        ws_ping_timeout=600,
        ws_max_size=config.max_message_kb * 1024,
        ws_per_message_deflate=False,
        limit_concurrency=4 * most + 64,
        timeout_graceful_shutdown=2,
    )
