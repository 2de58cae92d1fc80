"""absl flags from the settings of `spa_jax`: a default and its help are written once.

    if __name__ == "__main__":
        flags_lib.run_program(main, reads=(EnvConfig, SamplingConfig), stage_policy=True)

A program that takes a run knows all flags of a run, so that it reads a whole run's flagfile; it
shows those that it reads itself, in three groups (`help_pages.py`).
"""

import dataclasses
import difflib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tqdm
from absl import app, flags

from experiments import help_pages
from spa_jax import settings as settings_lib
from spa_jax.config import DistributedConfig
from spa_jax.data_config import at_horizon
from spa_jax.errors import UserError, complaint
from spa_jax.run import Run
from spa_jax.runtime import interrupt
from spa_jax.stage_config import Settings

Config = TypeVar("Config")
Main = Callable[[Sequence[str]], None]
_POLICY = "models/smollm2-135m-instruct"
_POLICY_HELP = (
    "The pretrained policy: a Hugging Face folder, a GGUF file, or ORGANISATION/MODEL of the hub."
)
_REVISION_HELP = (
    "The branch, tag or commit of --policy, a model of the hub; empty: its main branch. A commit "
    "makes a run repeatable. ORGANISATION/MODEL@REVISION says the same wherever a policy is named."
)
_STAGE_POLICY_HELP = (
    "The policy of this stage, a folder or 'expert' where it plays; empty: the run's. A --policy "
    "in a whole run's flagfile (one that sets flags which this stage does not read) is the "
    "pretrained policy of the run, and not this stage's."
)
_SHARED = ("workdir", "seed")
_GIVEN = re.compile(r"--?([^=]+)(?:=(.*))?", re.DOTALL)

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: every stage reads and writes below it."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)


@dataclasses.dataclass
class _Parsed:
    """What is known of the command line beside the flags' values.

    Attributes:
      given: the flags of the command line, and of flagfiles of the stage's own; None: not parsed
        here.
      policy: of the stage.
    """

    given: set[str] | None = None
    policy: str = ""


_parsed = _Parsed()


# --- definition -------------------------------------------------------------------------------


def define(*configs: type) -> None:
    """Defines a flag for every setting of the dataclasses."""
    for config in configs:
        for field in settings_lib.fields(config):
            _define(field)


def _define(field: dataclasses.Field) -> None:
    name, text = settings_lib.flag_of(field), field.metadata["help"]
    default: Any = field.default
    choices = settings_lib.choices(field)
    help_pages.SETTINGS[name] = field
    if isinstance(default, tuple):
        flags.DEFINE_list(name, list(default), text)
    elif choices:
        flags.DEFINE_enum(name, default, list(choices), text)
    elif isinstance(default, bool):
        flags.DEFINE_bool(name, default, text)
    elif isinstance(default, int):
        flags.DEFINE_integer(name, default, text)
    elif isinstance(default, float):
        flags.DEFINE_float(name, default, text)
    else:
        flags.DEFINE_string(name, default, text)


def define_run() -> None:
    """Defines all flags of a run."""
    if "redo" in flags.FLAGS:
        return
    flags.DEFINE_string("policy", _POLICY, _POLICY_HELP)
    flags.DEFINE_string("revision", "", _REVISION_HELP)
    flags.DEFINE_string(
        "redo",
        "",
        "Remove this stage and what follows from it, and make them anew: games, demos, sft, "
        "explore, progress, annotate, ppo (or one of these four with :ROUND), evaluate, "
        "evaluate:NAME or truth.",
    )
    define(*(type(config) for _, config in settings_lib.sections(Settings())), DistributedConfig)


# --- values -----------------------------------------------------------------------------------


def read(config: type[Config], **overrides: Any) -> Config:
    """The dataclass with the flags' values.

    Args:
      config: the dataclass.
      **overrides: fields with other values, and those that are no flags.

    Raises:
      UserError: a setting is out of range, or settings contradict each other.
    """
    fields = settings_lib.fields(config)
    values = {f.name: flags.FLAGS[settings_lib.flag_of(f)].value for f in fields}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return config(**(values | overrides))


def settings() -> Settings:
    """All settings of a run.

    Raises:
      UserError: as `read`.
    """
    parts = {name: read(type(c)) for name, c in settings_lib.sections(Settings())}
    given = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    parts["data"], parts["env"] = at_horizon(parts["data"], parts["env"], given)
    return Settings(**parts)


def workdir() -> pathlib.Path:
    """The folder of the run.

    Raises:
      UserError: --workdir is not set.
    """
    if not WORKDIR.value:
        raise UserError(
            "--workdir is not set: name the folder of the run, for example --workdir=runs/mine"
        )
    return pathlib.Path(WORKDIR.value)


def from_flags() -> Run:
    """The run that the flags describe.

    Raises:
      UserError: --workdir is not set, or as `read`.
    """
    policy = flags.FLAGS.policy
    if not _parsed.policy:  # else the revision is of that
        policy = _at_revision(policy)
    return Run(workdir(), policy, SEED.value, settings())


def _at_revision(policy: str) -> str:
    if not flags.FLAGS.revision:
        return policy
    from spa_jax.models.io import pretrained  # it imports JAX, and --help waits for nobody

    return pretrained.at_revision(policy, flags.FLAGS.revision)


def given(name: str) -> bool:
    """Whether a flag was given on the command line, or in a flagfile of the stage's own.

    A whole run's flagfile, one that sets flags that this stage does not read, speaks of the run:
    its --split is exploration's, say, whatever stage reads the file.
    """
    return flags.FLAGS[name].present > 0 if _parsed.given is None else name in _parsed.given


def stage_policy() -> str:
    """The policy that was given for this stage alone; "": the run's is meant."""
    return _at_revision(_parsed.policy) if _parsed.policy else ""


def _adopt(values: Mapping[str, Any]) -> None:
    """Sets flags that nobody gave; names that are no flags of this version are let be."""
    for name, value in values.items():
        if name in flags.FLAGS and not flags.FLAGS[name].present:
            flags.FLAGS[name].value = value


def redo() -> str:
    """The stage that --redo names; "" if none."""
    return flags.FLAGS.redo


# --- programs ---------------------------------------------------------------------------------


def run(main: Main, *shared: flags.FlagHolder, words: int = 0) -> None:
    """Runs a program that takes no run.

    A user's own mistake, or a full disk, is told in one line, with exit code 2.

    Ctrl-C is told in one line too; the exit code is 130.

    Args:
      main: the program.
      *shared: those of `WORKDIR` and `SEED` that it reads: --help shows them.
      words: how many arguments it takes that are no flags.
    """
    own = {flag.name for flag in shared} | _program_flags() | set(help_pages.SETTINGS)
    _start(lambda argv: _guarded(main, argv, words), lambda argv: _parse(argv, own, False))


def run_program(
    main: Main,
    *,
    reads: Sequence[type | str] = (),
    stage: bool = True,
    stage_policy: bool = False,
    needs_workdir: bool = True,
    made_with: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Runs a program that takes a run, as `run`.

    Args:
      main: the program.
      reads: the dataclasses of settings, or single flags, that it reads; --workdir, --seed and
        the flags that it defines itself are added.
      stage: it plays or trains: it heeds --policy and --redo, and several processes can share it.
      stage_policy: its --policy is the stage's, see `stage_policy`.
      needs_workdir: it uses the run's folder.
      made_with: what a finished run, at which it looks, was made with: flag -> value where nobody
        gave one.
    """
    define_run()
    if stage_policy:
        flags.FLAGS["policy"].help = _STAGE_POLICY_HELP
    own = {*_SHARED} | _program_flags()
    own |= {"policy", "redo", "revision"} | _names(DistributedConfig) if stage else set()
    for part in reads:
        own |= {part} if isinstance(part, str) else _names(part)

    def checked(argv: Sequence[str]) -> None:
        if made_with:
            _adopt(made_with())
        if needs_workdir:
            from_flags()  # a mistake is told before anything is started
        main(argv)

    _start(lambda argv: _guarded(checked, argv, 0), lambda argv: _parse(argv, own, stage_policy))


def _start(main: Main, parse: Callable[[Sequence[str]], list[str]]) -> None:
    """`app.run`, with Ctrl-C answered from the first moment on."""
    interrupt.install()
    with interrupt.answered_by(interrupt.Answer(interrupt.raise_interrupt)):
        app.run(main, flags_parser=parse)


def _guarded(main: Main, argv: Sequence[str], words: int) -> None:
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


def _names(config: type) -> set[str]:
    return {settings_lib.flag_of(field) for field in settings_lib.fields(config)}


def _program_flags() -> set[str]:
    """The flags that the program itself defines."""
    defined = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], ())
    return {flag.name for flag in defined}


def _parse(argv: Sequence[str], own: set[str], stage_policy: bool) -> list[str]:
    """Sets the flags; what is left of the arguments."""
    try:
        if page := help_pages.asked(argv):
            _print(help_pages.page(page, own, stage_policy))
            sys.exit(0)
        words = list(_expanded(argv[1:], own))
        _parsed.given = {name for word, mine in words if mine and (name := _name(word))}
        words.sort(
            key=lambda word: word[1]
        )  # what speaks of the program itself comes last: it wins
        plain = _without_stage_policy(words) if stage_policy else [word for word, _ in words]
        return flags.FLAGS([argv[0], *plain])
    except flags.UnrecognizedFlagError as error:
        said = _unknown(error.flagname)
    except flags.Error as error:
        said = f"{str(error).removeprefix('ERROR:: ')}; --help lists the flags"
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)


def _print(text: str) -> None:
    """Prints what a reader such as `head` may not read to its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unknown(name: str) -> str:
    """What to say of a flag that there is not."""
    near = difflib.get_close_matches(name, list(flags.FLAGS), n=1)
    meant = f"did you mean --{near[0]}? " if near else ""
    return f"unknown flag --{name}; {meant}--help and --helpfull list the flags"


def _expanded(words: Sequence[str], own: set[str]) -> Iterator[tuple[str, bool]]:
    """(argument, whether it speaks of this program) with flagfiles replaced by what they say.

    Those of a whole run's flagfile, one with flags that are not the program's own, speak of the
    run.
    """
    rest = iter(words)
    for word in rest:
        match = _GIVEN.fullmatch(word) if word.startswith("-") else None
        if word == "--":
            yield from ((word, True) for word in (word, *rest))
            return
        if match is None or match[1] != "flagfile":
            yield word, True
            continue
        file = match[2] if match[2] is not None else next(rest, "")
        said = flags.FLAGS.read_flags_from_files([f"--flagfile={file}"])
        mine = all(_name(one) in own for one in said if one.startswith("-"))
        yield from ((one, mine) for one in said)


def _name(word: str) -> str:
    """The name of the flag that an argument sets; "" if it sets none."""
    match = _GIVEN.fullmatch(word) if word.startswith("-") else None
    if match is None:
        return ""
    name = match[1]
    off = name.removeprefix("no")
    return off if name not in flags.FLAGS and off in flags.FLAGS else name


def _without_stage_policy(words: Sequence[tuple[str, bool]]) -> list[str]:
    """The arguments without a --policy of this stage, which is kept apart."""
    left, rest = [], iter(words)
    for word, mine in rest:
        match = _GIVEN.fullmatch(word) if mine and word.startswith("-") else None
        if match is None or match[1] != "policy":
            left.append(word)
        else:
            _parsed.policy = match[2] if match[2] is not None else next(rest, ("", mine))[0]
    return left
