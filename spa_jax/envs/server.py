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

from spa_jax.envs import capacity, connections, protocol
from spa_jax.envs.benchmarks import BENCHMARKS, Benchmark, prompt_names
from spa_jax.envs.guard import Guard, Rate, check_host, is_loopback
from spa_jax.envs.protocol import Observation
from spa_jax.envs.session import Games, Places, ServerContext, Session, State, StepRequest
from spa_jax.envs.telemetry import Metrics, log_json, note
from spa_jax.envs.worker import Worker, WorkerPool, start_fork_server
from spa_jax.errors import UserError
from spa_jax.runtime import children, interrupt
from spa_jax.server_config import ServerConfig

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_QUIET_S = 5.0  # requests that are refused for the same reason are logged once in that time
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


@dataclasses.dataclass(frozen=True)
class Door:
    """Where a server listens, and for whom.

    Attributes:
      host: the address; beyond loopback it needs a token.
      port: the port; 0: a free one.
      token: what clients must know; empty: nothing.
      hosts: names by which requests may address it, beside `host` and those of loopback.
      address_file: gets the address when it listens; empty: none.
    """

    host: str
    port: int
    token: str = ""
    hosts: tuple[str, ...] = ()
    address_file: str = ""


class _Sessions:
    """The sessions of a server: opens them up to its capacity, and serves its connections.

    Attributes:
      context: what all sessions share.
      capacity: how many may play.
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
            start_deadline_s=config.reset_deadline_s,
            on_end=self._on_worker_end,
        )
        self.context = ServerContext(
            benchmark=benchmark,
            games=games,
            pool=pool,
            metrics=metrics,
            prompt=config.prompt,
            places=Places(self.capacity, metrics),
            reset_deadline_s=config.reset_deadline_s,
            step_deadline_s=config.step_deadline_s,
        )
        self.draining, self.busy = False, 0
        self._waiting = connections.Waiting(config.max_waiting)
        self._posts = 0
        self._refusals: dict[str, tuple[float, int]] = {}  # why -> when it was logged, and since
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

    def refused(self, why: str, who: str) -> None:
        """Counts a request of no client; the log tells of the first, and then how many there were.

        Args:
          why: as `Guard` says.
          who: the address that it came from.
        """
        self.context.metrics.refused.labels(why).inc()
        then, count = self._refusals.get(why, (-_QUIET_S, 0))
        now = time.monotonic()
        if now - then < _QUIET_S:
            self._refusals[why] = (then, count + 1)
            return
        self._refusals[why] = (now, 0)
        note(_LOG, "refused", logging.WARNING, why=why, client=who, others_before=count)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Session]:
        """A session; behind it, its process is free again."""
        session = Session(self.context)
        try:
            yield session
        finally:
            await self.in_thread(session.close)

    async def serve_socket(self, socket: fastapi.WebSocket) -> None:
        """Serves one connection from its opening to its end."""
        await socket.accept()
        started, state = time.monotonic(), State()
        how = "gone"
        try:
            async with self.opened() as session:
                try:
                    how = await self._converse(socket, session)
                finally:
                    state = session.state
                    self._waiting.discard(socket)
                    self.context.metrics.waiting.set(len(self._waiting))
            # After the release: a client that waits for this finds a free place.
            if how != "gone":
                await socket.close(1012 if how == "shutdown" else 1000)
        except (fastapi.WebSocketDisconnect, RuntimeError, TimeoutError):
            pass  # it is gone, or reads nothing
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
        while not (self.draining and session.placed):  # a newcomer is told to come again
            try:
                event = await self._heard(socket, session)
            except TimeoutError:
                why = "the server heard nothing for too long, or too many wait: session closed"
                await self._send(socket, session.error(why, protocol.SESSION_ERROR, retryable=True))
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
                await self._send(socket, reply)
                if not session.placed and reply["data"].get("code") == protocol.CAPACITY_REACHED:
                    return "turned_away"
            finally:
                self.busy -= 1
        return "shutdown"

    async def _heard(self, socket: fastapi.WebSocket, session: Session) -> Any:
        """The next event of a connection.

        Raises:
          TimeoutError: there was none for too long; before a session's first reset that is sooner,
            and sooner still where too many wait.
        """
        limit = self.config.idle_timeout_s if session.placed else self.config.first_message_s
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit or None) as clock:
            if session.placed:
                self._waiting.discard(socket)
            else:
                self._waiting.add(socket, lambda: clock.reschedule(loop.time()))
            self.context.metrics.waiting.set(len(self._waiting))
            return await socket.receive()

    async def _send(self, socket: fastapi.WebSocket, answer: dict[str, Any]) -> None:
        """Sends an answer to a client that reads it in time; TimeoutError if it does not."""
        async with asyncio.timeout(self.config.idle_timeout_s or None):
            await socket.send_text(json.dumps(answer))

    async def serve_once(self, request: fastapi.Request, step: bool) -> fastapi.Response:
        """Plays one game's reset, and its first step if asked to, in a session of its own."""
        refused = Session(self.context).error
        if self.draining or self._posts >= self.config.max_waiting:
            why = "the server is shutting down" if self.draining else "too many requests at once"
            return _respond(refused(why, protocol.CAPACITY_REACHED, retryable=True))
        self._posts += 1
        try:
            async with asyncio.timeout(self.config.first_message_s):
                body = await self._body(request)
        except TimeoutError:
            return _respond(refused("the body came too slowly", protocol.VALIDATION_ERROR), 408)
        finally:
            self._posts -= 1
        if body is None:
            why = f"a message has at most {self.config.max_message_kb} KiB"
            return _respond(refused(why, protocol.VALIDATION_ERROR), 413)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of somebody else's can send a form or a text, but no JSON.
        if kind != "application/json" and (body or kind):
            why = f"a body is application/json, not {kind[:100] or 'of no type'}"
            return _respond(refused(why, protocol.VALIDATION_ERROR), 415)
        self.busy += 1
        try:
            async with self.opened() as session:
                return _respond(await self.in_thread(_play_once, session, body, step))
        finally:
            self.busy -= 1

    async def _body(self, request: fastapi.Request) -> bytes | None:
        """What a request brings; None if it is too long."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.config.max_message_kb * 1024:
                return None
        return bytes(body)


def _play_once(session: Session, body: bytes, step: bool) -> dict[str, Any]:
    try:
        data = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        return session.error(f"not JSON: {error}", protocol.INVALID_JSON)
    if data is None and not step:
        data = {}
    if not isinstance(data, dict):
        return session.error("a body is a JSON object", protocol.VALIDATION_ERROR)
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
    """Says when it listens; told to stop, it lets calls in progress finish before it closes."""

    def __init__(self, config: uvicorn.Config, sessions: _Sessions, listens: Callable[[], None]):
        super().__init__(config)
        self._sessions, self._listens = sessions, listens
        self._interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listens()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes that it must stop; a second Ctrl-C ends the process."""
        if sig == signal.SIGINT:
            if self._interrupted:
                interrupt.end_at_once()
            self._interrupted = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._sessions.draining = self._sessions.context.places.closed = True
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


def run(config: ServerConfig, door: Door, *, exit_with_parent: bool) -> None:
    """Serves until it is told to stop: `spa_jax.envs.serve`, with the token itself.

    Raises:
      UserError: if the data folder is missing, the port is taken or a token is needed.
      KeyboardInterrupt: at Ctrl-C, when it has stopped in good order.
    """
    host = door.host
    check_host(host, door.token)
    log_json()
    _raise_file_limit()
    app, sessions = make_app(config)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, door.port))
    except OSError as error:
        raise UserError(
            f"--host={host} --port={door.port}: {error.strerror}; choose another (0: any free one)"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"

    def listens() -> None:
        print(f"listening on {address}", flush=True)
        if door.address_file:
            whole = f"{door.address_file}.tmp"
            with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(address)
            os.replace(whole, door.address_file)

    guard = Guard(app, door.token, {host, *door.hosts}, sessions.refused)
    server = _Uvicorn(_uvicorn_config(config, guard), sessions, listens)
    if exit_with_parent:
        _exit_with_parent(server)
    # Uvicorn raises the signal again when it has stopped: stopped in good order is no failure.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    if not is_loopback(host):
        note(_LOG, "not encrypted: put a proxy that speaks TLS in front", logging.WARNING)
    note(_LOG, "serving", env=config.env, capacity=sessions.capacity, pid=os.getpid())
    server.run(sockets=[listener])


def _uvicorn_config(config: ServerConfig, app: Guard) -> uvicorn.Config:
    # Clients that compile for minutes answer late; those that are gone must free their session.
    return uvicorn.Config(
        app,
        http=connections.bounded(config.max_waiting, config.first_message_s),
        log_config=None,
        log_level="warning",
        ws_ping_interval=60,
        ws_ping_timeout=600,
        ws_max_size=config.max_message_kb * 1024,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=2,
    )
