"""Serves an environment to trainers, here or on another machine.

    python -m experiments.serve_env --alfworld_data=DIR
    python -m experiments.serve_env --env=webshop --webshop_data=DIR

`explore` and `evaluate` start one by themselves when no --env_address is given.  Beyond this
machine (--host) a token is needed, and something that encrypts: see docs/environments.md.
"""

import dataclasses
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.config import EnvConfig
from spa_jax.envs.benchmarks import BENCHMARKS
from spa_jax.envs.serve import serve
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

_TOKEN_FILE_HELP = (
    "File of the token that clients must know; empty: the environment variable SPA_JAX_ENV_TOKEN, "
    "if it is set."
)

_ENV = flags.DEFINE_enum("env", "alfworld", list(BENCHMARKS), "Which environment.")
for _field in dataclasses.fields(EnvConfig):
    if _field.name.endswith("_data"):
        flags.DEFINE_string(_field.name, "", _field.metadata["help"])
_PROMPT = flags.DEFINE_string("prompt", "paper", "Instruction shown to the policy: paper, short.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8700, "Port to listen on; 0 takes a free one.")
_TOKEN_FILE = flags.DEFINE_string("token_file", "", _TOKEN_FILE_HELP)
_HOSTS = flags.DEFINE_list(
    "allowed_hosts",
    [],
    "Names by which requests may address the server, such as that of a proxy before it, beside "
    "--host and those of this machine's loopback.",
)
flags_lib.define(ServerConfig)
_PARENT = flags.DEFINE_bool("exit_with_parent", False, "End when standard input closes.")


def main(argv: Sequence[str]) -> None:
    """Serves until it is told to stop."""
    del argv
    data = flags.FLAGS[f"{_ENV.value}_data"].value
    if not data:
        raise UserError(
            f"--{_ENV.value}_data is not set: give the folder of the environment's data"
        )
    serve(
        flags_lib.read(ServerConfig, env=_ENV.value, data_dir=data, prompt=_PROMPT.value),
        host=_HOST.value,
        port=_PORT.value,
        token_file=_TOKEN_FILE.value,
        allowed_hosts=_HOSTS.value,
        exit_with_parent=_PARENT.value,
    )


if __name__ == "__main__":
    flags_lib.run(main)
