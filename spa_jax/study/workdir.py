"""The files of a study.  W is --workdir, S a seed:

    W/study.json, W/study.html    what was found
    W/games/                      the games of all runs (not with --<env>_data)
    W/base/                       a run that ends with SFT: the base of all runs (not with --base)
          seed_S/                 with --base_per_seed: the base of a seed
    W/start/seed_S/               a run: what all arms of a seed begin with, played once: the base's
                                  episodes of round 0, the preset's estimator of them, the base on
                                  the held-out games
    W/ARM/seed_S/                 a run: an ordinary workdir, with eval/round_I after each round
                 result.json      what the study reads of it, written when all is done
                 log.txt          what it said

Below the folder of a run, `run.Run` spells the files.
"""

import dataclasses
import pathlib

BASE, START = "base", "start"
ARMS_OF_ALL = (BASE, START)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where the files of a study lie.

    Attributes:
      root: W.
    """

    root: pathlib.Path

    @property
    def json(self) -> pathlib.Path:
        """What was found."""
        return self.root / "study.json"

    @property
    def page(self) -> pathlib.Path:
        """The same as a page."""
        return self.root / "study.html"

    @property
    def lock(self) -> pathlib.Path:
        """Held while a study runs in the folder."""
        return self.root / ".study.lock"

    def base(self, seed: int | None) -> pathlib.Path:
        """The run that makes the base of a seed; None: of all."""
        return self.root / BASE if seed is None else self.folder(BASE, seed)

    def folder(self, arm: str, seed: int) -> pathlib.Path:
        """The run of an arm, by the name of its folder, and a seed."""
        return self.root / arm / f"seed_{seed}"


def result(folder: pathlib.Path) -> pathlib.Path:
    """What the study reads of a run."""
    return folder / "result.json"


def log(folder: pathlib.Path) -> pathlib.Path:
    """What a run said."""
    return folder / "log.txt"


def round_name(number: int) -> str:
    """The evaluation after so many rounds."""
    return f"round_{number}"
