"""Checks an environment: your own class, or one of ours against recordings of the original.

    python -m experiments.check_env --env=custom --custom_data=MODULE:CLASS [--policy=FOLDER]
    python -m experiments.check_env --env=custom --custom_data=MODULE:CLASS --play
    python -m experiments.check_env --env=webshop --data=DIR --cases=DIR

Of a class: the contract of docs/environments.md, its rewards, that its splits share no task, that a
replay says the same, that its expert wins, and with --policy the tokens that this policy will read.
Prints what holds and what does not, and ends with 1 if anything is wrong.
"""

import importlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax import env_check
from spa_jax.envs.benchmarks import BENCHMARKS, open_index
from spa_jax.envs.boundary import one_line
from spa_jax.envs.conformance import Report
from spa_jax.envs.custom import load_class
from spa_jax.envs.local import LocalServer
from spa_jax.errors import UserError, complaint
from spa_jax.server_config import ServerConfig

_RECORDED = ("virtualhome", "webshop")  # of the original there are recordings

_ENV = flags.DEFINE_enum("env", None, list(BENCHMARKS), "Which environment.", required=True)
_DATA = flags.DEFINE_string("data", "", "The environment's data.")
_CASES = flags.DEFINE_string("cases", "", "The folder of recordings of the original.")
_CLASS = flags.DEFINE_string("custom_data", "", "MODULE:CLASS of an environment of your own.")
_PLAY = flags.DEFINE_bool("play", False, "Play a task by hand, instead of checking.")
_SPLIT = flags.DEFINE_string("split", "", "The split of the task to play; empty: the first.")
_TASK = flags.DEFINE_string("task", "", "The task to play; empty: the split's first.")
_GAMES = flags.DEFINE_integer("games", 4, "Games of each split to check.", lower_bound=1)
_STEPS = flags.DEFINE_integer("max_steps", 40, "Steps of a game.", lower_bound=1)
_POLICY = flags.DEFINE_string("policy", "", "Folder of a policy, whose tokens are counted.")
_FORMAT = flags.DEFINE_string("chat_format", "template", "Its chat format.")
_LENGTH = flags.DEFINE_integer("context_length", 1024, "Tokens of an episode.", lower_bound=2)


def main(argv: Sequence[str]) -> None:
    """Checks, prints and says by its exit code how it went."""
    del argv
    try:
        if _PLAY.value:
            _play()
            return
        report = _check()
    except Exception as error:  # data and recordings are somebody else's: anything may be in them
        if complaint(error) is not None:
            raise
        raise UserError(
            f"the check of {_ENV.value} stopped at {one_line(error)}: the data or the recordings "
            "have another structure than expected"
        ) from error
    for line in report.lines:
        print(line)
    print(f"RESULT agreement={report.agreement:.6f} ok={int(report.ok)}")
    sys.exit(0 if report.ok else 1)


def _data() -> str:
    flag = "custom_data" if _ENV.value == "custom" else "data"
    data = flags.FLAGS[flag].value
    if not data:
        raise UserError(f"--{flag} is not set: what is to be checked?")
    return data


def _check() -> Report:
    data = _data()
    if _ENV.value == "custom":
        return env_check.check(
            env_check.Trial(
                data,
                games=_GAMES.value,
                max_steps=_STEPS.value,
                seed=flags_lib.SEED.value,
                policy=_POLICY.value,
                chat_format=_FORMAT.value,
                context_length=_LENGTH.value,
            )
        )
    if _ENV.value not in _RECORDED:
        raise UserError(
            f"--env={_ENV.value}: there are no recordings of it; choose one of custom, "
            f"{', '.join(_RECORDED)}, or give --play"
        )
    if not _CASES.value:
        raise UserError("--cases is not set: the folder of recordings of the original")
    # Imported here: each environment has its own optional dependencies.
    module = importlib.import_module(f"spa_jax.envs.{_ENV.value}.conformance")
    return module.check(data, _CASES.value)


def _play() -> None:
    data, benchmark = _data(), BENCHMARKS[_ENV.value]
    split = _SPLIT.value or open_index(benchmark, data).splits()[0]
    expert = _ENV.value != "custom" or hasattr(load_class(data), "expert")
    config = ServerConfig(data, env=_ENV.value, prompt="short", max_sessions=1)
    with LocalServer(config, start_deadline_s=120.0) as server:
        env_check.play(
            server.client(wait_s=10.0),
            split,
            _TASK.value,
            seed=flags_lib.SEED.value,
            expert=expert,
            ask=input,
            say=print,
        )


if __name__ == "__main__":
    flags_lib.run(main, flags_lib.SEED)
