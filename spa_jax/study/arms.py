"""The arms of a study: names for settings, so that whoever compares writes no flags.

    sft,terminal,spa                              names of `ARMS`
    spa:ppo_kl_coef=0.02:gae_lambda=1             a variant of one: NAME:FLAG=VALUE:FLAG=VALUE

An arm is the preset with some settings of its own; all else is the preset's.  What the base is
made from, and which games are played, belong to the study: no arm changes them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from spa_jax import settings as settings_lib
from spa_jax.errors import UserError
from spa_jax.stage_config import Settings

Kind = Literal["base", "sft", "rounds"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train, as settings that differ from the preset.

    Attributes:
      what: what it is, for a reader.
      flags: "FLAG=VALUE ..." that differ from the preset.
      kind: base: the base as it is; sft: SFT goes on from the base; rounds: the method's rounds.
    """

    what: str
    flags: str = ""
    kind: Kind = "rounds"


# What an objective without PPO's critic cannot heed, whatever the preset says.
_NO_CRITIC = "critic=head gae=step"
_NO_ADVANTAGE = "step_baseline=false kl=loss ppo_kl_coef=0 ppo_entropy_coef=0 ppo_truncate_ratio=0"
_FINAL = "credit=terminal"

# Terminal credit is R at the last step.  The penalty for what cannot be executed (--beta) is the
# preset's in every arm but spa_no_grounding: arms differ in their credit, and not in what they
# know of grounding.
ARMS: dict[str, Arm] = {
    "sft": Arm("the base as it is", kind="base"),
    "continued_sft": Arm("SFT goes on, for as many tokens as the rounds' updates", kind="sft"),
    "rft": Arm("SFT on the won episodes", f"objective=rft credit=spa {_NO_CRITIC} {_NO_ADVANTAGE}"),
    "terminal": Arm("PPO on the final reward, with the preset's critic", _FINAL),
    "ppo_token": Arm(
        "PPO on the final reward: a trained head, GAE over tokens (what the paper calls PPO)",
        f"{_FINAL} critic=head gae=token step_baseline=false",
    ),
    "ppo_step": Arm(
        "PPO on the final reward: a trained head, GAE over steps", f"{_FINAL} critic=head gae=step"
    ),
    "ridge": Arm(
        "PPO on the final reward: a ridge critic, GAE over steps", f"{_FINAL} critic=ridge gae=step"
    ),
    "grpo": Arm("GRPO", f"objective=grpo {_FINAL} {_NO_CRITIC} step_baseline=false kl=loss"),
    "rloo": Arm("RLOO", f"objective=rloo {_FINAL} {_NO_CRITIC} step_baseline=false"),
    "reinforce++": Arm("REINFORCE++", f"objective=reinforce++ {_FINAL} {_NO_CRITIC}"),
    "gigpo": Arm(
        "GiGPO: rollouts against each other, and steps from equal states",
        f"objective=gigpo {_FINAL} {_NO_CRITIC} step_baseline=false kl=loss",
    ),
    "gagpo": Arm(
        "GAGPO: GAE with the mean return of equal states as the value",
        f"objective=gagpo {_FINAL} {_NO_CRITIC} step_baseline=false kl=loss",
    ),
    "ragen": Arm(
        "RAGEN (StarPO-S): PPO on the most uncertain tasks, clipped less upwards",
        f"objective=ragen {_FINAL} kl=loss ppo_kl_coef=0",
    ),
    "archer": Arm(
        "ArCHer: an utterance's Q less its state's V",
        f"objective=archer {_FINAL} {_NO_CRITIC} step_baseline=false kl=loss",
    ),
    "prm4a": Arm("PPO on a process model of Monte-Carlo returns (AgentPRM)", "credit=prm4a"),
    "spa": Arm("SPA: the preset as it is"),
    "spa_paper": Arm(
        "SPA with the paper's estimator",
        "credit=spa estimator=paper progress_epochs=60 progress_width=256",
    ),
    "spa_no_grounding": Arm("SPA without grounding", "credit=spa beta=0"),
    # The paper's ablation rewards grounding at each step and R at the last: `terminal`, where the
    # preset has a grounding weight.  It stays a name of its own, for the paper's table.
    "spa_no_progress": Arm("SPA without progress: grounding, and R at the last step", _FINAL),
    "spa_no_critic": Arm(
        "SPA's credit without a critic: its returns, whitened",
        f"objective=reinforce++ credit=spa {_NO_CRITIC}",
    ),
    "uniform": Arm("placebo: SPA's total, the same for every step", "credit=uniform"),
    "shuffled": Arm("placebo: SPA's contributions, shuffled in an episode", "credit=shuffled"),
    "random": Arm("placebo: SPA's total, dealt out at random", "credit=random"),
    "subgoal": Arm("upper bound: the environment's own progress", "credit=subgoal"),
    # With gamma = 0 the return of a step is its own reward, so its advantage is V' - V and no more.
    "branching": Arm(
        "upper bound: true advantages by branching (VinePPO)",
        f"objective=reinforce++ credit=branching credit_residual=false gamma=0 {_NO_CRITIC}",
    ),
}

_OF_THE_STUDY = ("data", "env")  # sections that no arm changes
_OWN = ("base", "demonstrations")  # and these settings


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An arm of a study.

    Attributes:
      name: as it was asked for.
      arm: the entry of `ARMS`.
      settings: of its runs, without its base.
      changed: what differs from the preset, by flag.
    """

    name: str
    arm: Arm
    settings: Settings
    changed: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.+=-]", "_", self.name)

    def same_as(self, other: "Chosen") -> bool:
        """Whether the two would compute the same."""
        return self.arm.kind == other.arm.kind and self.settings == other.settings


def choose(names: Sequence[str], preset: Settings) -> list[Chosen]:
    """The arms that were asked for, in order.

    Args:
      names: of `ARMS`, or variants NAME:FLAG=VALUE...
      preset: the settings of the study.

    Raises:
      UserError: an arm is unknown, named twice, sets what belongs to the study, or its settings
        do not go together.
    """
    if not names:
        raise UserError(f"--arms is empty; give some of {', '.join(ARMS)}")
    found = [_choose(name.strip(), preset) for name in names]
    folders = [chosen.folder for chosen in found]
    twice = [name for name, folder in zip(names, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise UserError(f"--arms names {twice[0]} twice; drop one")
    return found


def _choose(name: str, preset: Settings) -> Chosen:
    stem, *given = name.split(":")
    if stem not in ARMS:
        raise UserError(f"--arms: {stem!r} is none of {', '.join(ARMS)}; give one of them")
    arm = ARMS[stem]
    if given and arm.kind == "base":
        raise UserError(f"--arms: {name}: {stem} is the base as it is: nothing of it can be set")
    pairs = [_pair(name, word, arm.kind) for word in given]
    own = [_split(word) for word in arm.flags.split()]
    settings = apply(preset, dict(own) | dict(pairs), f"--arms: {name}")
    before, after = settings_lib.by_flag(preset), settings_lib.by_flag(settings)
    changed = {flag: value for flag, (_, value) in after.items() if value != before[flag][1]}
    return Chosen(name, arm, settings, changed)


def _split(word: str) -> tuple[str, str]:
    flag, _, value = word.partition("=")
    return flag, value


def _pair(name: str, word: str, kind: Kind) -> tuple[str, str]:
    """FLAG=VALUE of a variant.

    Raises:
      UserError: it is no such word, or the flag is the study's.
    """
    flag, equals, value = word.removeprefix("--").partition("=")
    sections = {
        settings_lib.flag_of(field): section
        for section, config in settings_lib.sections(Settings())
        for field in settings_lib.fields(type(config))
    }
    if not equals or flag not in sections:
        raise UserError(
            f"--arms: {name}: {word!r} is no FLAG=VALUE of a setting; "
            "python -m experiments.run_spa --helpfull lists them"
        )
    if sections[flag] in _OF_THE_STUDY or flag in _OWN:
        raise UserError(
            f"--arms: {name}: all arms have the same games and the same base, so an arm cannot "
            f"set --{flag}; set it for the whole study"
        )
    if sections[flag] == "sft" and kind != "sft":
        raise UserError(
            f"--arms: {name}: --{flag} makes the base, which all arms share; set it for the whole "
            "study"
        )
    return flag, value


def apply(settings: Settings, given: Mapping[str, str], where: str) -> Settings:
    """Settings with other values.

    Args:
      settings: of a run.
      given: values as they are written on a command line, by flag.
      where: what a complaint begins with.

    Raises:
      UserError: a value is none of its setting's, or the settings do not go together.
    """
    sections: dict[str, Any] = {}
    try:
        for section, config in settings_lib.sections(settings):
            new = {
                field.name: _read(field, given[flag])
                for field in settings_lib.fields(type(config))
                if (flag := settings_lib.flag_of(field)) in given
            }
            if new:
                sections[section] = dataclasses.replace(config, **new)
        return dataclasses.replace(settings, **sections)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _read(field: dataclasses.Field, text: str) -> Any:
    """The value of a field that is written as `text`."""
    default: Any = field.default
    flag = settings_lib.flag_of(field)
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"--{flag}={text}: give true or false")
        return text.lower() in ("true", "1")
    if isinstance(default, tuple):
        return tuple(filter(None, text.split(",")))
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise UserError(f"--{flag}={text}: {text!r} is not {kind}") from None
    return text


def seeds(text: str) -> list[int]:
    """The seeds that "0-9", "0,3,5" or "0-2,7" name, in this order.

    Raises:
      UserError: it is none of these, or names a seed twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds={text}: {part!r} is no seed; give 0-9 or 0,1,2")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise UserError(f"--seeds={text} names a seed twice; drop one")
    return found
