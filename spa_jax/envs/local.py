"""An environment server of one's own, on this machine.

Who trains starts one through this.  It is `spa_jax.envs.serve` in a process of its own, which alone
imports what serves, in half a second.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from spa_jax.envs.client import EnvClient
from spa_jax.envs.guard import TOKEN_VARIABLE
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

_ERROR = "error: "  # how a server begins to say why it does not start


class LocalServer:
    """A server in a process of its own on this machine, for as long as the `with` block.

    It ends with this process, however this process ends.  Only who is given its token can use it.

    Args:
      config: the environment.
      log: where the server's output goes; a temporary file if None.
      start_deadline_s: how long the start may take.
      token: what clients must know; None: a random one, which only this process knows; "": nothing.

    Attributes:
      address: "http://127.0.0.1:PORT", inside the block.
      token: what its clients must know.
      log: the file of its output, inside the block.
    """

    def __init__(
        self,
        config: ServerConfig,
        log: Path | None = None,
        start_deadline_s: float = 60.0,
        token: str | None = None,
    ):
        self.address = ""
        self.token = secrets.token_hex() if token is None else token
        self._config, self.log, self._start_deadline_s = config, log, start_deadline_s
        self._temporary = log is None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def client(self, *, timeout_s: float = 180.0, wait_s: float = 120.0) -> EnvClient:
        """A client of it; see `EnvClient`."""
        return EnvClient(self.address, timeout_s=timeout_s, wait_s=wait_s, token=self.token)

    def __enter__(self) -> "LocalServer":
        output: IO[bytes]
        if self.log is None:
            output = tempfile.NamedTemporaryFile(prefix="serve_env-", suffix=".log", delete=False)
            self.log = Path(output.name)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("wb")
        # A folder that nobody else can look into, and that no other server writes to: what a log
        # says could be another server's, or the environment's own words.
        with output, tempfile.TemporaryDirectory(prefix="serve_env-") as private:
            try:
                self.address = self._start(output, Path(private))
            except BaseException:
                self.__exit__()
                raise
        return self

    def _start(self, output: IO[bytes], private: Path) -> str:
        """Starts the process; returns its address."""
        address, secret = private / "address", []
        if self.token:
            (private / "token").write_text(self.token)
            (private / "token").chmod(0o600)
            secret = [f"--token_file={private / 'token'}"]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "spa_jax.envs.serve"),
                json.dumps(dataclasses.asdict(self._config)),
                "--port=0",
                *secret,
                f"--address_file={address}",
                "--exit_with_parent",
            ],
            stdin=subprocess.PIPE,  # its end tells of ours
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE},
            start_new_session=True,  # Ctrl-C on the terminal is ours
        )
        deadline = time.monotonic() + self._start_deadline_s
        while time.monotonic() < deadline:
            if address.exists():  # it is renamed when it is whole, and the server listens
                return address.read_text()
            if self._process.poll() is not None:
                raise UserError(
                    f"the environment server did not start; it said: {self._last_words()} "
                    f"(log: {self.log})"
                )
            time.sleep(0.02)
        raise UserError(f"the environment server did not start in time; see {self.log}")

    def _last_words(self) -> str:
        assert self.log is not None
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        begins = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
        return "\n".join(lines[begins[-1] :]).removeprefix(_ERROR) if begins else lines[-1]

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=12)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._temporary and self.address and self.log is not None:
            self.log.unlink(missing_ok=True)
