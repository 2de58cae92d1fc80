"""Who may use a server, and how much of it: token, pages of others, rate."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import os
import stat
import sys
import time
import urllib.parse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from spa_jax.errors import UserError

TOKEN_VARIABLE = "SPA_JAX_ENV_TOKEN"
_SHORTEST_TOKEN = 16
_GUESS_S = 0.25  # what a wrong token waits for its answer

_HOW = f"""\
put it into the environment variable {TOKEN_VARIABLE} or into a file for --token_file, here and \
where the trainer runs. Nothing is encrypted by this server: listen on 127.0.0.1 behind a proxy \
that speaks TLS (caddy reverse-proxy --from HOST --to 127.0.0.1:PORT), or use an SSH tunnel \
(ssh -L PORT:127.0.0.1:PORT HOST); see docs/environments.md"""


def read_token(file: str = "", flag: str = "--token_file") -> str:
    """The shared secret in `file`, or else in the environment; empty if there is none.

    A file that other users of the machine can read is told of on standard error.

    Raises:
      UserError: if the file cannot be read, or the token is too short to be a secret or is not
        printable ASCII.
    """
    token, source = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
    if file:
        source = f"{flag}={file}"
        try:
            token = Path(file).read_text()
            mode = Path(file).stat().st_mode
        except (OSError, ValueError) as error:
            raise UserError(f"{source} cannot be read: {error}") from error
        if mode & (stat.S_IRGRP | stat.S_IROTH) and stat.S_ISREG(mode):
            print(
                f"warning: {source} can be read by other users of this machine, who can then use "
                f"the server: chmod 600 {file}",
                file=sys.stderr,
            )
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


def split_secret(address: str) -> tuple[str, str]:
    """An address without the name and password in it, and the password; "" if it has none."""
    scheme, separator, rest = address.partition("://")
    secret, at, place = rest.rpartition("@")
    if not separator or not at or "/" in secret:
        return address, ""
    return f"{scheme}://{place}", urllib.parse.unquote(secret.partition(":")[2])


class Guard:
    """ASGI middleware: whoever is no client is answered 401 or 403, before a socket opens.

    The token comes as `Bearer TOKEN`, or as the password of `Basic` for clients that can only
    be given an address (ws://any:TOKEN@host).  /health needs none.

    A browser lets any web page send requests to this machine.  It says whose page it is (Origin);
    a page whose own name was pointed at this machine gives itself away by that name (Host).

    Args:
      app: what is guarded.
      token: the secret; empty: nobody needs one.
      hosts: names by which requests may address the server, beside those of loopback.
      refused: is told of each request that is refused: why, and by whom.
    """

    def __init__(
        self,
        app: Any,
        token: str,
        hosts: Collection[str] = (),
        refused: Callable[[str, str], None] = lambda why, who: None,
    ):
        self._app, self._token, self._refused = app, token.encode(), refused
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        known = self._knows_token(headers)
        why = self._refusal(headers, known)
        if not why:
            await self._app(scope, receive, send)
            return
        self._refused(why, str((scope.get("client") or ("unknown",))[0]))
        if why == "token":
            await asyncio.sleep(_GUESS_S)
        status, code, message = _ANSWERS[why]
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = [(b"content-type", b"application/json")]
        if status == 401:
            answer.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": answer})
        body = f'{{"message": "{message}", "code": "{code}"}}'.encode()
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, headers: dict[bytes, bytes], known: bool) -> str:
        """Why a request is refused, a key of `_ANSWERS`; "" if it is not."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = urllib.parse.urlsplit(f"//{host}").hostname if _is_authority(host) else ""
        # Who knows the token is no page that a name was pointed at.
        trusted = (known and bool(self._token)) or not host
        if not trusted and not (name and (name in self._hosts or is_loopback(name))):
            return "host"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            return "origin"
        if known:
            return ""
        return "token" if headers.get(b"authorization") else "no_token"

    def _knows_token(self, headers: dict[bytes, bytes]) -> bool:
        if not self._token:
            return True
        kind, _, value = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value.strip()).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(value.strip(), self._token)


def _is_authority(host: str) -> bool:
    """Whether a Host header is a name or an address, maybe with a port."""
    try:
        urllib.parse.urlsplit(f"//{host}").port  # noqa: B018  it raises
    except ValueError:
        return False
    return not set(host) & set("/@?# ")


# Why a request is refused -> status, code and message of the answer.
_ANSWERS = {
    "host": (403, "FORBIDDEN", "this server does not go by that name: see --allowed_hosts"),
    "origin": (403, "FORBIDDEN", "this server does not answer pages of others"),
    "token": (401, "UNAUTHORIZED", "this server wants its token"),
    "no_token": (401, "UNAUTHORIZED", "this server wants its token"),
}


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
