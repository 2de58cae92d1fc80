"""The trainer's way to an environment server: blocking, one thread a session."""

import collections
import dataclasses
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync.client import ClientConnection, connect

from spa_jax.envs import boundary, protocol
from spa_jax.envs.guard import (
    TOKEN_VARIABLE,
    authorization,
    is_loopback,
    read_token,
    split_secret,
)
from spa_jax.envs.protocol import EnvError, Observation, Task
from spa_jax.errors import UserError
from spa_jax.texts import replace_surrogates

# Codes of answers that another try gets again.
_FINAL = (
    protocol.INVALID_JSON,
    protocol.UNKNOWN_TYPE,
    protocol.VALIDATION_ERROR,
    protocol.USER_ERROR,
)
_LONGEST_MESSAGE = 64 * 2**20  # bytes
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # between tries, in seconds


class Wire:
    """How one session's requests and answers look on the wire: as our own servers have them."""

    def reset(
        self, task: str, split: str, *, seed: int, expert: bool, prompt: str
    ) -> dict[str, Any]:
        """The data of a reset."""
        data = {"task": task, "split": split, "seed": seed, "expert": expert}
        return data | ({"prompt": prompt} if prompt else {})

    def step(self, text: str, parsed: bool) -> dict[str, Any]:
        """The data of a step."""
        return {"text": text} | ({"parsed": True} if parsed else {})

    def read(self, data: dict[str, Any]) -> Observation:
        """The observation in an answer.

        Raises:
          EnvError: if there is none.
        """
        return boundary.observation_from_wire(data)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token goes to the address that it was given for, and to none that answers from there."""

    def redirect_request(self, *_: Any) -> None:
        """Follows none."""


class EnvClient:
    """A server's address and what can be asked of it.

    Args:
      address: "http://host:port" or "ws://host:port" (https and wss too); a password in it is the
        token, and is never shown.
      timeout_s: how long an answer may take; longer than the server's own deadlines.
      wait_s: how long a session waits for a server that is away, or has no free place.
      token: what the server wants to know; None: what the environment variable says.

    Attributes:
      notes: what was done to answers, and to how many.
      near: whether the server is on this machine.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = 180.0,
        wait_s: float = 120.0,
        token: str | None = None,
    ):
        address, secret = split_secret(address.rstrip("/"))
        scheme, separator, rest = address.partition("://")
        if not separator or scheme not in ("http", "https", "ws", "wss") or not rest:
            raise UserError(f"--env_address={address}: expected http://host:port")
        secure = "s" if scheme in ("https", "wss") else ""
        self.http = f"http{secure}://{rest}"
        self.websocket = f"ws{secure}://{rest}/ws"
        self.timeout_s, self.wait_s = timeout_s, wait_s
        try:
            host = urllib.parse.urlsplit(self.http).hostname or ""
        except ValueError as error:
            raise UserError(f"--env_address={address}: {error}") from error
        # What is on this machine is not behind a proxy, whatever the variables say.
        self.near = is_loopback(host)
        handlers = [urllib.request.ProxyHandler({})] if self.near else []
        self._opener = urllib.request.build_opener(_NoRedirects, *handlers)
        token = read_token() if token is None else token
        self.headers = authorization(secret or token)
        self._lock = threading.Lock()
        self.notes: collections.Counter[str] = collections.Counter()

    def noted(self, what: str) -> None:
        """Counts something that was done to an answer, for `notes`."""
        with self._lock:
            self.notes[what] += 1

    def _get(self, path: str, timeout_s: float) -> Any:
        request = urllib.request.Request(self.http + path, headers=self.headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise _wants_token(self.http) from error
            if place := error.headers.get("Location"):
                message = f"{self.http + path} points to {place}: give that server as --env_address"
                raise UserError(message) from error
            try:
                message = json.load(error)["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{self.http + path} answers {error.code}: is it our server?"
            raise UserError(message) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(
                f"no environment server answers at {self.http} ({error}); start one with "
                "python -m experiments.serve_env, or leave out --env_address"
            ) from error

    def health(self) -> None:
        """Returns if the server is well.

        Raises:
          UserError: if nothing, or something else, answers at the address.
        """
        answer = self._get("/health", timeout_s=10.0)
        if not isinstance(answer, dict) or answer.get("status") != "healthy":
            raise UserError(f"{self.http} answers, but is not a healthy environment server")

    def tasks(self, split: str) -> list[Task]:
        """The playable tasks of a split, sorted by name.

        Raises:
          UserError: if there is no such split, no playable game in it, or no server.
        """
        query = urllib.parse.urlencode({"split": split})
        answer = self._get(f"/tasks?{query}", self.timeout_s)
        try:
            tasks = [Task(**task) for task in answer]
        except TypeError as error:
            raise UserError(f"{self.http}/tasks answers no list of tasks: {error}") from error
        boundary.names(f"{self.http}/tasks of {split!r}", [task.task for task in tasks], "task")
        return tasks

    def wire(self) -> Wire:
        """How a new session talks."""
        return Wire()

    def session(self) -> "Session":
        """Opens a session; waits for the server if it is away.

        Raises:
          UserError: if no server answers.
        """
        return Session(self)


def _clean(text: str) -> str:
    """A text that can be printed and written whatever the encoding."""
    return replace_surrogates(text)[0]


def _wants_token(address: str) -> UserError:
    return UserError(
        f"{address} wants a token that this client does not have: put the server's into "
        f"{TOKEN_VARIABLE}, or into a file for --env_token_file"
    )


def _tries(wait_s: float) -> Iterator[None]:
    """Gives tries with growing pauses between them, at least one, for `wait_s` seconds."""
    end, pause = time.monotonic() + wait_s, _FIRST_WAIT
    yield
    while (left := end - time.monotonic()) > 0:
        # Clients that were cut off together do not come back together.
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(2 * pause, _LONGEST_WAIT)
        yield


class Session:
    """One environment on the server.  Used by one thread; a context manager.

    After an `EnvError` that is retryable, `reset` goes on: it connects again if need be, and
    waits, with growing pauses, for a server that is away or full.
    """

    def __init__(self, client: EnvClient):
        self._client = client
        self._wire = client.wire()
        self._connection: ClientConnection | None = None
        try:
            self._connect()
        except EnvError as error:
            raise UserError(
                f"{error}; start a server with python -m experiments.serve_env, or leave out "
                "--env_address"
            ) from error

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> ClientConnection:
        address, failure = self._client.websocket, None
        for _ in _tries(self._client.wait_s):
            try:
                # No pings from here: a process that compiles answers late, and TCP tells the rest.
                self._connection = connect(
                    address,
                    open_timeout=20,
                    close_timeout=5,
                    ping_interval=None,
                    max_size=_LONGEST_MESSAGE,
                    additional_headers=self._client.headers,
                    **({"proxy": None} if self._client.near else {}),
                )
                return self._connection
            except InvalidURI as error:
                raise UserError(f"--env_address: {error}") from error
            except (OSError, InvalidHandshake) as error:
                if isinstance(error, InvalidStatus) and error.response.status_code in (401, 403):
                    raise _wants_token(address) from error
                failure = error
        raise EnvError(
            f"no environment server answers at {address} for {self._client.wait_s:g} s "
            f"({failure}); start it, and this program again: it goes on where it was",
            protocol.NO_SERVER,
        ) from failure

    def _ask(self, kind: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = self._connection or self._connect()
        try:
            try:
                connection.send(json.dumps({"type": kind} | ({"data": data} if data else {})))
            except ConnectionClosed:
                pass  # what the server said before it closed can still be read
            answer = json.loads(connection.recv(timeout=self._client.timeout_s))
            content = answer.get("data") or {}
            content.keys()
        except (WebSocketException, OSError, ValueError, AttributeError) as error:
            # OSError: TimeoutError too
            self._drop()
            raise EnvError(f"lost the environment server: {error or type(error)}") from error
        if answer.get("type") == "error":
            code = content.get("code", protocol.ENV_ERROR)
            if code in (protocol.CAPACITY_REACHED, protocol.SESSION_ERROR):
                self._drop()
            # OpenEnv's own servers do not say whether another try can help.
            retryable = content.get("retryable", code not in _FINAL)
            raise EnvError(
                _clean(str(content.get("message", "unknown error"))),
                code,
                retryable,
                _clean(str(content.get("traceback") or "")),
            )
        return content

    def _read(self, data: dict[str, Any]) -> Observation:
        """The observation in an answer, with texts that every encoding can write."""
        now = self._wire.read(data)
        text, count = replace_surrogates(now.text)
        instruction, more = replace_surrogates(now.instruction)
        if count + more:
            self._client.noted(
                "a text of the environment held lone surrogates, which no encoding can write: each "
                "was replaced by U+FFFD"
            )
            now = dataclasses.replace(now, text=text, instruction=instruction)
        return now

    def _drop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def reset(
        self, task: str, split: str, seed: int = 0, expert: bool = False, prompt: str = ""
    ) -> Observation:
        """Starts a game.

        Args:
          task: one of `EnvClient.tasks(split)`.
          split: the split.
          seed: of what is random in the game.
          expert: whether observations carry `expert_action` and `admissible`.
          prompt: which instruction; the server's default if empty.

        Raises:
          EnvError: if the environment failed (retryable: try again), the server stayed away or
            full, or the game's files are broken (`code` USER_ERROR, not retryable).
        """
        data = self._wire.reset(task, split, seed=seed, expert=expert, prompt=prompt)
        full = None
        for _ in _tries(self._client.wait_s):
            try:
                return self._read(self._ask("reset", data))
            except EnvError as error:
                if error.code != protocol.CAPACITY_REACHED:
                    raise
                full = error
        assert full is not None  # there is at least one try
        raise full

    def step(self, text: str, *, parsed: bool = False) -> Observation:
        """Plays an action.

        Args:
          text: what a policy wrote, of which the server reads the action; or the action.
          parsed: whether it is the action.

        Raises:
          EnvError: if the environment failed; only `reset` goes on then.
        """
        return self._read(self._ask("step", self._wire.step(text, parsed)))

    def state(self) -> dict[str, Any]:
        """Where the session stands: task, split, step_count, worker (a process id)."""
        return self._ask("state")

    def close(self) -> None:
        """Ends the session and waits until its place and process are free for another one."""
        if self._connection is None:
            return
        try:
            self._connection.send(json.dumps({"type": "close"}))
            self._connection.recv(timeout=5)  # nothing comes but the server's closing
        except (WebSocketException, OSError):
            pass
        self._drop()
