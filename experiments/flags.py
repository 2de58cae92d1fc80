"""absl flags from the frozen dataclasses of `spa_jax.config`: a default is written once."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tqdm
from absl import app, flags

from spa_jax import config as config_lib
from spa_jax.errors import UserError, complaint
from spa_jax.runtime import interrupt

Config = TypeVar("Config")

WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "Folder of the run: every stage reads and writes below it."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random in the stage.")


def define(*configs: type) -> None:
    """Defines a flag for every setting of the dataclasses."""
    for config in configs:
        for field in _settings(config):
            name, help_text = _flag(field), field.metadata["help"]
            default: Any = field.default
            if field.metadata["choices"]:
                flags.DEFINE_enum(name, default, list(field.metadata["choices"]), help_text)
            elif field.type is bool or field.type == "bool":
                flags.DEFINE_bool(name, default, help_text)
            elif isinstance(default, int):
                flags.DEFINE_integer(name, default, help_text)
            elif isinstance(default, float):
                flags.DEFINE_float(name, default, help_text)
            elif isinstance(default, tuple):
                flags.DEFINE_list(name, list(default), help_text)
            else:
                flags.DEFINE_string(name, default, help_text)


def read(config: type[Config], **overrides: Any) -> Config:
    """The dataclass with the flags' values, checked.

    Args:
      config: the dataclass.
      **overrides: fields with other values, and those that are no flags.

    Raises:
      UserError: if settings contradict each other.
    """
    values = {field.name: flags.FLAGS[_flag(field)].value for field in _settings(config)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    made = config(**(values | overrides))
    config_lib.check(made)
    return made


def run(main: Callable[[Sequence[str]], None], *shared: flags.FlagHolder, words: int = 0) -> None:
    """`app.run`, with a user's own mistake, or a full disk, told in one line and exit code 2.

    Ctrl-C is told in one line too; the exit code is 130.

    Args:
      main: the binary.
      *shared: those of `WORKDIR` and `SEED` that it reads: --help shows them.
      words: how many arguments it takes that are no flags.
    """
    others = {flag.name for flag in (WORKDIR, SEED)} - {flag.name for flag in shared}
    for flag in flags.FLAGS.flags_by_module_dict()[__name__]:
        if flag.name not in others:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1 + words:
                raise UserError(f"unknown argument {argv[1 + words]!r}; flags begin with --")
            main(argv)
        except Exception as error:
            said = complaint(error)
            if said is None:
                raise
            tqdm.tqdm.write(f"error: {said}", file=sys.stderr)  # on a line of its own
            sys.exit(2)
        except KeyboardInterrupt:
            interrupt.say(interrupt.STOPPED)
            sys.exit(interrupt.EXIT_CODE)

    interrupt.install()
    with interrupt.answered_by(interrupt.Answer(interrupt.raise_interrupt)):
        app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(2)
    except SystemExit:  # absl ends --help with 1, as if it were a mistake
        sys.exit(0)


def _settings(config: type) -> list[dataclasses.Field]:
    """The fields that are flags: those with a help text."""
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def _flag(field: dataclasses.Field) -> str:
    return field.metadata["flag"] or field.name
