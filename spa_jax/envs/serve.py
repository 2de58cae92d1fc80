"""Serves an environment: the process of a server.

    python -m spa_jax.envs.serve '{"env": "webshop", "data_dir": "DIR"}' --port=8700

The argument holds fields of `spa_jax.server_config.ServerConfig`.  A `LocalServer` starts this, and
`python -m experiments.serve_env` is the same with a flag for each setting.

Each environment process imports the server's main module again, so this one imports what the
server needs only when it serves.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from spa_jax.errors import UserError, complaint
from spa_jax.server_config import ServerConfig


def serve(
    config: ServerConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8700,
    token_file: str = "",
    allowed_hosts: Sequence[str] = (),
    address_file: str = "",
    exit_with_parent: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT.  A line says the address when it listens.

    Args:
      config: the environment.
      host: the address to listen on; beyond loopback it needs a token.
      port: the port; 0 takes a free one.
      token_file: the file of the token that clients must know; empty: what the environment
        variable SPA_JAX_ENV_TOKEN says, or none.
      allowed_hosts: names by which requests may address it, such as that of a proxy before it,
        beside `host` and those of loopback.
      address_file: gets the address when it listens; empty: none.
      exit_with_parent: whether to end when standard input closes.

    Raises:
      UserError: if the data is missing, a setting makes no sense, the port is taken or a token is
        needed.
    """
    from spa_jax.envs import guard, server

    token = guard.read_token(token_file)
    os.environ.pop(guard.TOKEN_VARIABLE, None)  # environments have no use for it
    door = server.Door(host, port, token, tuple(allowed_hosts), address_file)
    server.run(config, door, exit_with_parent=exit_with_parent)


def _read_config(text: str) -> ServerConfig:
    """The settings in a JSON object.

    Raises:
      UserError: if it is none, or a field is unknown or missing.
    """
    try:
        return ServerConfig(**json.loads(text))
    except (ValueError, TypeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(ServerConfig))
        raise UserError(f"not the settings of a server ({error}); there are: {known}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m spa_jax.envs.serve",
        description="Serves an environment.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", help="the server's settings as a JSON object")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8700, help="port; 0: a free one")
    parser.add_argument("--token_file", default="", help="file of the token of its clients")
    parser.add_argument(
        "--allowed_hosts",
        type=lambda names: names.split(","),
        default=[],
        help="names by which requests may address it too, comma-separated",
    )
    parser.add_argument("--address_file", default="", help="file to write the address to")
    parser.add_argument(
        "--exit_with_parent", action="store_true", help="end when standard input closes"
    )
    options = vars(parser.parse_args(argv))
    try:
        serve(_read_config(options.pop("config")), **options)
    except Exception as error:
        said = complaint(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
