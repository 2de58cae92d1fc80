"""Serves an environment to trainers, here or on another machine.

    python -m experiments.serve_env --alfworld_data=DIR
    python -m experiments.serve_env --env=webshop --webshop_data=DIR

`explore` and `evaluate` start one by themselves when no --env_address is given.  Beyond this
machine (--host) a token is needed, and something that encrypts: see docs/environments.md.
"""

import dataclasses
import sys
from typing import Any, NoReturn

from absl import app, flags

from spa_jax.config import EnvConfig
from spa_jax.envs.benchmarks import BENCHMARKS
from spa_jax.errors import UserError

_ENV = flags.DEFINE_enum("env", "alfworld", list(BENCHMARKS), "Which environment.")
for _field in dataclasses.fields(EnvConfig):
    if _field.name.endswith("_data"):
        flags.DEFINE_string(_field.name, "", _field.metadata["help"])
_PROMPT = flags.DEFINE_string("prompt", "paper", "Instruction shown to the policy: paper, short.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8700, "Port to listen on; 0 takes a free one.")
_TOKEN_FILE = flags.DEFINE_string(
    "token_file", "", "File of the token that clients must know; empty: the environment variable "
    "SPA_JAX_ENV_TOKEN, if it is set.",
)  # fmt: skip
flags.DEFINE_integer(
    "max_sessions", 0, "Sessions at once, each with a process; 0: what free memory has room for."
)
flags.DEFINE_integer("games_per_worker", 0, "Games after which a process is replaced; 0: as suits.")
flags.DEFINE_integer(
    "worker_memory_mb", 0, "Memory (no mapped files) above which a process is ended; 0: as suits."
)
flags.DEFINE_float("reset_deadline_s", 120.0, "Seconds that a reset may take.")
flags.DEFINE_float("step_deadline_s", 60.0, "Seconds that a step may take.")
flags.DEFINE_float(
    "idle_timeout_s", 1800.0, "Seconds without a message after which a session ends; 0: never."
)
flags.DEFINE_integer("max_message_kb", 1024, "The longest message, in KiB.")
flags.DEFINE_float(
    "messages_per_s", 1000.0, "Messages a second of a session; more are slowed down; 0: any."
)
flags.DEFINE_float("drain_s", 5.0, "Seconds that calls in progress have at SIGTERM.")
_SETTINGS = (
    "max_sessions", "games_per_worker", "worker_memory_mb", "reset_deadline_s", "step_deadline_s",
    "idle_timeout_s", "max_message_kb", "messages_per_s", "drain_s",
)  # fmt: skip
_PARENT = flags.DEFINE_bool("exit_with_parent", False, "End when standard input closes.")


def main(argv: list[str]) -> None:
    """Serves until it is told to stop."""
    if len(argv) > 1:
        _refuse(f"unknown argument {argv[1]!r}; flags begin with --")
    # Each environment process imports this file: what only the server needs is imported here.
    from spa_jax.envs.guard import read_token
    from spa_jax.envs.server import ServerConfig, serve

    data = flags.FLAGS[f"{_ENV.value}_data"].value
    if not data:
        _refuse(f"--{_ENV.value}_data is not set: give the folder of the environment's data")
    settings: dict[str, Any] = {name: flags.FLAGS[name].value for name in _SETTINGS}
    config = ServerConfig(env=_ENV.value, data_dir=data, prompt=_PROMPT.value, **settings)
    try:
        serve(config, _HOST.value, _PORT.value, _PARENT.value, read_token(_TOKEN_FILE.value))
    except UserError as error:
        _refuse(str(error))


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(f"{error}; --help lists the flags")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
