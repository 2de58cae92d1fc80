"""The trainer's way to an environment server: blocking, one thread a session."""

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from spa_jax.envs import protocol
from spa_jax.envs.protocol import EnvError, Observation, Task
from spa_jax.errors import UserError


class EnvClient:
    """A server's address and what can be asked of it.

    Args:
      address: "http://host:port" or "ws://host:port" (https and wss too).
      timeout_s: how long an answer may take; longer than the server's own deadlines.
    """

    def __init__(self, address: str, timeout_s: float = 180.0):
        scheme, separator, rest = address.rstrip("/").partition("://")
        if not separator or scheme not in ("http", "https", "ws", "wss") or not rest:
            raise UserError(f"--env_address={address}: expected http://host:port")
        secure = "s" if scheme in ("https", "wss") else ""
        self.http = f"http{secure}://{rest}"
        self.websocket = f"ws{secure}://{rest}/ws"
        self.timeout_s = timeout_s

    def _get(self, path: str, timeout_s: float) -> Any:
        try:
            with urllib.request.urlopen(self.http + path, timeout=timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            try:
                message = json.load(error)["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{self.http + path} answers {error.code}: is it our server?"
            raise UserError(message) from error
        except (OSError, ValueError) as error:
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
        return [Task(**task) for task in self._get(f"/tasks?{query}", self.timeout_s)]

    def session(self) -> "Session":
        """Opens a session.

        Raises:
          UserError: if no server answers.
        """
        return Session(self)


class Session:
    """One environment on the server.  Used by one thread; a context manager.

    After an `EnvError` that is retryable, `reset` goes on: it connects again if need be.
    """

    def __init__(self, client: EnvClient):
        self._client = client
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
        address = self._client.websocket
        try:
            # No pings from here: a process that compiles answers late, and TCP tells the rest.
            self._connection = connect(address, open_timeout=20, ping_interval=None)
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise EnvError(f"no environment server answers at {address} ({error})") from error
        return self._connection

    def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        connection = self._connection or self._connect()
        try:
            connection.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(connection.recv(timeout=self._client.timeout_s))
        except (WebSocketException, OSError, ValueError) as error:  # OSError: TimeoutError too
            self._drop()
            raise EnvError(f"lost the environment server: {error or type(error)}") from error
        content = answer.get("data") or {}
        if answer.get("type") == "error":
            code = content.get("code", protocol.ENV_ERROR)
            if code == protocol.CAPACITY_REACHED:
                self._drop()
            raise EnvError(
                content.get("message", "unknown error"), code, content.get("retryable", True)
            )
        return content

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
          seed: goes to the server; ALFWorld's games have nothing random.
          expert: whether observations carry `expert_action`.
          prompt: which instruction; the server's default if empty.

        Raises:
          EnvError: if the environment failed (retryable: try again), or the game's files
            are broken (`code` USER_ERROR, not retryable).
        """
        data = {"task": task, "split": split, "seed": seed, "expert": expert}
        if prompt:
            data["prompt"] = prompt
        return protocol.observation_from_wire(self._ask("reset", data))

    def step(self, action_text: str) -> Observation:
        """Plays what the policy wrote.

        Raises:
          EnvError: if the environment failed; only `reset` goes on then.
        """
        return protocol.observation_from_wire(self._ask("step", {"text": action_text}))

    def state(self) -> dict[str, Any]:
        """Where the session stands: task, split, step_count, worker (a process id)."""
        return self._ask("state", {})

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
