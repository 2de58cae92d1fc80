"""Who may use a server, and how much of it: token, message size, rate."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import os
import time
from pathlib import Path
from typing import Any

from spa_jax.errors import UserError

TOKEN_VARIABLE = "SPA_JAX_ENV_TOKEN"
_SHORTEST_TOKEN = 16

_HOW = f"""\
put it into the environment variable {TOKEN_VARIABLE} or into a file for --token_file, here and \
where the trainer runs. Nothing is encrypted by this server: listen on 127.0.0.1 behind a proxy \
that speaks TLS (caddy reverse-proxy --from HOST --to 127.0.0.1:PORT), or use an SSH tunnel \
(ssh -L PORT:127.0.0.1:PORT HOST); see docs/environments.md"""


def read_token(file: str = "", flag: str = "--token_file") -> str:
    """The shared secret in `file`, or else in the environment; empty if there is none.

    Raises:
      UserError: if the file cannot be read, or the token is too short to be a secret or is not
        printable ASCII.
    """
    token, source = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
    if file:
        source = f"{flag}={file}"
        try:
            token = Path(file).read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"{source} cannot be read: {error}") from error
    token = token.strip()
    if not token and not file:
        return ""
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"{source} holds no token: it is at least {_SHORTEST_TOKEN} printable ASCII "
            'characters; make one with python -c "import secrets; print(secrets.token_hex())"'
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may be anything


def check_host(host: str, token: str) -> None:
    """Refuses to listen beyond loopback without a token.

    Raises:
      UserError: says how to go on.
    """
    if not token and not is_loopback(host):
        raise UserError(
            f"--host={host} can be reached from other machines, so a token is needed: {_HOW}"
        )


def authorization(token: str) -> dict[str, str]:
    """The header that a client sends."""
    return {"Authorization": f"Bearer {token}"} if token else {}


class Guard:
    """ASGI middleware: answers 401 to whoever lacks the token, and to a socket before it opens.

    The token comes as `Bearer TOKEN`, or as the password of `Basic` for clients that can only
    be given an address (ws://any:TOKEN@host).  /health needs none.

    Args:
      app: what is guarded.
      token: the secret; empty: nobody needs one.
    """

    def __init__(self, app: Any, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"www-authenticate", b"Bearer"), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b'{"message": "this server wants its token", "code": "UNAUTHORIZED"}'
            await send({"type": "http.response.body", "body": body})

    def _allowed(self, scope: Any) -> bool:
        if not self._token:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, value = given.partition(b" ")
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value.strip()).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(value.strip(), self._token)


class Rate:
    """A token bucket of one second: `wait` lets `per_s` messages a second pass; 0: all of them."""

    def __init__(self, per_s: float):
        self._per_s, self._left, self._then = per_s, per_s, time.monotonic()

    async def wait(self) -> None:
        """Returns when the next message may be handled; meanwhile its sender's TCP waits too."""
        if not self._per_s:
            return
        now = time.monotonic()
        self._left = min(self._per_s, self._left + (now - self._then) * self._per_s)
        self._then = now
        self._left -= 1
        if self._left < 0:
            await asyncio.sleep(-self._left / self._per_s)
