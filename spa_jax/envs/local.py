"""An environment server of one's own, on this machine.

Who trains starts one through this.  It is `spa_jax.envs.serve` in a process of its own, which alone
imports what serves, in half a second.
"""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from spa_jax.config import ServerConfig
from spa_jax.envs.client import EnvClient
from spa_jax.errors import UserError

_LISTENING = re.compile(r"^listening on (http://\S+)$", re.MULTILINE)


class LocalServer:
    """A server in a process of its own on this machine, for as long as the `with` block.

    It ends with this process, however this process ends.

    Args:
      config: the environment.
      log: where the server's output goes; a temporary file if None.
      start_deadline_s: how long the start may take.

    Attributes:
      address: "http://127.0.0.1:PORT", inside the block.
      log: the file of its output, inside the block.
    """

    def __init__(
        self, config: ServerConfig, log: Path | None = None, start_deadline_s: float = 60.0
    ):
        self.address = ""
        self._config, self.log, self._start_deadline_s = config, log, start_deadline_s
        self._temporary = log is None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> "LocalServer":
        command = [sys.executable, "-m", "spa_jax.envs.serve"]
        config = json.dumps(dataclasses.asdict(self._config))
        output: IO[bytes]
        if self.log is None:
            output = tempfile.NamedTemporaryFile(prefix="serve_env-", suffix=".log", delete=False)
            self.log = Path(output.name)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("wb")
        with output:
            self._process = subprocess.Popen(
                [*command, config, "--port=0", "--exit_with_parent"],
                stdin=subprocess.PIPE,  # its end tells of ours
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the terminal is ours
            )
        try:
            self.address = self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> str:
        assert self._process is not None and self.log is not None
        deadline = time.monotonic() + self._start_deadline_s
        while time.monotonic() < deadline:
            said = self.log.read_text(errors="replace")
            if match := _LISTENING.search(said):
                with contextlib.suppress(UserError):
                    EnvClient(match.group(1)).health()
                    return match.group(1)
            elif self._process.poll() is not None:
                last = said.strip().splitlines()[-1:] or ["nothing"]
                raise UserError(
                    f"the environment server did not start; it said: {last[0]} (log: {self.log})"
                )
            time.sleep(0.02)
        raise UserError(f"the environment server did not start in time; see {self.log}")

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
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
