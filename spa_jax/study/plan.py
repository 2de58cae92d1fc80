"""What a study is: arms, seeds, and the run of each of them; and what a finished run must match."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from spa_jax import provenance
from spa_jax import settings as settings_lib
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.stage_config import Settings
from spa_jax.study import workdir
from spa_jax.study.arms import Chosen
from spa_jax.study.workdir import Workdir

REFERENCE = "terminal"
_MAKES_A_BASE = ("games", "demos", "sft")  # stages


@dataclasses.dataclass(frozen=True)
class Study:
    """Every arm and seed from the same base on the same games.

    Attributes:
      preset: the run that all share; its workdir is the study's.
      arms: in the order of the tables.
      seeds: of the runs, in the order in which they run.
      reference: the name of the arm that the others are compared with; "": terminal if it is one
        of the arms, else the first.
      panel_games: held-out games that are played after each round; 0: all of them.
      base_per_seed: each seed makes a base of its own.
    """

    preset: Run
    arms: tuple[Chosen, ...]
    seeds: tuple[int, ...]
    reference: str = ""
    panel_games: int = 0
    base_per_seed: bool = False

    def __post_init__(self) -> None:
        names = [chosen.name for chosen in self.arms]
        if self.reference and self.reference not in names:
            raise UserError(
                f"--reference={self.reference} is none of the arms {', '.join(names)}; add it to "
                "--arms, or give one of them"
            )
        heldout = self.preset.settings.data.heldout_games
        if heldout and self.panel_games > heldout:
            raise UserError(
                f"--panel_games={self.panel_games} exceeds --heldout_games={heldout}; give fewer"
            )
        base = self.preset.settings.method.base
        if base and self.base_per_seed:
            raise UserError(
                f"--base={base} is one base for all seeds, and --base_per_seed makes one for each; "
                "drop one of them"
            )
        if base and any(chosen.arm.kind == "sft" for chosen in self.arms):
            raise UserError(
                f"--base={base}: continued_sft goes on with the demonstrations that made the base, "
                "so the study must make it; drop --base, or the arm"
            )

    @property
    def files(self) -> Workdir:
        """Where its files lie."""
        return Workdir(self.preset.workdir)

    @property
    def against(self) -> str:
        """The name of the reference."""
        names = [chosen.name for chosen in self.arms]
        return self.reference or (REFERENCE if REFERENCE in names else names[0])

    @property
    def panel(self) -> int:
        """How many held-out games are played after each round; 0: all."""
        heldout = self.preset.settings.data.heldout_games
        return 0 if self.panel_games == heldout else self.panel_games

    def arm(self, folder: str) -> Chosen:
        """The arm with this folder."""
        return next(chosen for chosen in self.arms if chosen.folder == folder)

    def twin(self, chosen: Chosen) -> Chosen:
        """The first arm that computes what this one does: its runs are this one's too."""
        return next(other for other in self.arms if chosen.same_as(other))

    def partner(self) -> Chosen | None:
        """The arm whose update tokens continued SFT gets: SPA, the reference, or the first."""
        trained = {chosen.name: chosen for chosen in self.arms if chosen.arm.kind == "rounds"}
        for name in ("spa", self.against, *trained):
            if name in trained:
                return self.twin(trained[name])
        return None

    # --- runs -------------------------------------------------------------------------------

    def base_run(self, seed: int) -> Run:
        """The run that makes the base of a seed."""
        own = self.base_per_seed
        return dataclasses.replace(
            self.preset,
            workdir=self.files.base(seed if own else None),
            seed=seed if own else self.preset.seed,
            settings=self._on_the_games(self.preset.settings),
        )

    def base(self, seed: int) -> pathlib.Path:
        """The base policy of a seed."""
        return self.base_run(seed).base

    def start(self, seed: int) -> Run:
        """The run that plays what all arms of a seed begin with."""
        return self._from_the_base(workdir.START, seed, self.preset.settings)

    def run(self, chosen: Chosen, seed: int) -> Run:
        """The run of an arm and a seed."""
        return self._from_the_base(chosen.folder, seed, chosen.settings)

    def _from_the_base(self, folder: str, seed: int, settings: Settings) -> Run:
        settings = self._on_the_games(settings)
        method = dataclasses.replace(settings.method, base=str(self.base(seed)))
        return dataclasses.replace(
            self.preset,
            workdir=self.files.folder(folder, seed),
            seed=seed,
            settings=dataclasses.replace(settings, method=method),
        )

    def _on_the_games(self, settings: Settings) -> Settings:
        env = settings.env
        if env.data or env.env_address:
            return settings
        data: dict[str, Any] = {f"{env.env}_data": str(self.preset.games)}
        return dataclasses.replace(settings, env=dataclasses.replace(env, **data))


def made_from(study: Study, run: Run) -> dict[str, Any]:
    """What the result of a run depends on, as JSON has it.

    The base's digest is there once there is a base: a run that makes one has none.
    """
    given = study.preset.settings.method.base
    if run.settings.method.base:
        settings = {
            flag: value
            for flag, (field, value) in settings_lib.by_flag(run.settings).items()
            if not field.metadata["operational"]
        }
        settings["base"] = given  # the study's own lies where the study lies
        there = run.base.exists()
        base = provenance.policy_digest(run.base) if there else None
        panel = study.panel
    else:
        settings = {
            flag: value
            for stage in _MAKES_A_BASE
            for flag, value in provenance.stage_settings(run, stage).items()
        }
        base, panel = None, 0
    env = run.settings.env
    found = {
        "settings": settings,
        "seed": run.seed,
        "panel_games": panel,
        "base": base,
        "environment": provenance.environment_identity(env, study.preset.games),
    }
    return json.loads(json.dumps(found))


def read_result(study: Study, run: Run) -> dict[str, Any] | None:
    """What a finished run left; None if it has not finished.

    Raises:
      UserError: it was made from other settings, or another base; names them.
    """
    path = workdir.result(run.workdir)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        was = found["made_from"]
        differences = _differences(was, made_from(study, run))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a run's result ({error}); remove it, and the study reads the run again"
        ) from error
    if differences:
        raise UserError(
            f"{run.workdir} was made with other settings: {'; '.join(differences)}. Give another "
            f"--workdir, or remove {run.workdir} to make it anew"
        )
    return found


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every difference in words; a setting that is newer than a result had its default."""
    defaults = {flag: f.default for flag, (f, _) in settings_lib.by_flag(Settings()).items()}
    defaults = json.loads(json.dumps(defaults))
    found = []
    for flag, value in now["settings"].items():
        before = was["settings"].get(flag, defaults.get(flag))
        if before != value:
            found.append(f"--{flag} was {before}, is {value}")
    for name in ("seed", "panel_games"):
        if was[name] != now[name]:
            found.append(f"--{name} was {was[name]}, is {now[name]}")
    for name, words in (
        ("base", "the base policy's weights are others"),
        ("environment", "the environment's data are others"),
    ):
        pair = was[name], now[name]
        if pair[0] != pair[1] and None not in pair and provenance.SERVED not in pair:
            found.append(words)
    return found
