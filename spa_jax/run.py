"""A run is one value: what its stages are told, and where their files lie.

This is the only place that spells a path below the workdir, W:

    W/run.json                                 what ran: settings, command, versions, machine
    W/games/                                   generated games of all splits
    W/demos/{train,valid}/trajectories.jsonl   the expert's episodes, or those of a log
    W/sft/                                     metrics.jsonl, tensorboard/, checkpoints/
          policy/                              the base policy
    W/iteration_I/explore/                     episodes of the newest policy of round I
                  progress/                    the progress estimator
                  annotated.jsonl              the episodes with contributions and rewards
                  ppo/                         metrics.jsonl, tensorboard/, checkpoints/
                      policy/                  the trained policy
    W/eval/NAME/                               held-out episodes of a policy, summary.json
    W/truth/                                   branches.jsonl, truth.json, credits.json
    W/estimator.json                           the estimator judged on held-out episodes
    W/report.html

A stage takes a run, reads what earlier stages wrote, and writes its own folder.
"""

import dataclasses
import pathlib
import re
from typing import Any

from spa_jax.config import LoraConfig
from spa_jax.stage_config import AdaptedStage, ExploreConfig, Settings

BASE, SPA = "sft", "spa"  # names below W/eval: the base policy, and what it became
EPISODES = "trajectories.jsonl"


@dataclasses.dataclass(frozen=True)
class Round:
    """The files of one round.

    Attributes:
      number: of the round, from 0.
      folder: W/iteration_I.
    """

    number: int
    folder: pathlib.Path

    @property
    def explore(self) -> pathlib.Path:
        """The folder of the round's episodes."""
        return self.folder / "explore"

    @property
    def episodes(self) -> pathlib.Path:
        """The round's episodes."""
        return self.explore / EPISODES

    @property
    def branches(self) -> pathlib.Path:
        """How the policy went on from each step of them, with --credit=branching."""
        return self.explore / "branches.jsonl"

    @property
    def features(self) -> pathlib.Path:
        """The base model's hidden states of them: a cache."""
        return features_of(self.episodes)

    @property
    def lower_states(self) -> pathlib.Path:
        """The states that its lower layers make of every token: a cache, which PPO deletes."""
        return lower_states_of(self.episodes)

    @property
    def progress(self) -> pathlib.Path:
        """The folder of the progress estimator."""
        return self.folder / "progress"

    @property
    def annotated(self) -> pathlib.Path:
        """The episodes with contributions and rewards."""
        return self.folder / "annotated.jsonl"

    @property
    def ppo(self) -> pathlib.Path:
        """The folder of the policy's update."""
        return self.folder / "ppo"

    @property
    def policy(self) -> pathlib.Path:
        """The policy that the round trained."""
        return self.ppo / "policy"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the stages are told, and the files that they write.

    Attributes:
      workdir: the folder of the run.
      policy: the pretrained policy that SFT starts from.
      seed: of everything random.
      settings: of every stage.
    """

    workdir: pathlib.Path
    policy: str
    seed: int
    settings: Settings

    @property
    def json(self) -> pathlib.Path:
        """What ran: see `provenance`."""
        return self.workdir / "run.json"

    @property
    def games(self) -> pathlib.Path:
        """The generated games."""
        return self.workdir / "games"

    @property
    def demos(self) -> pathlib.Path:
        """The folder of both parts of the demonstrations."""
        return self.workdir / "demos"

    def demonstrations(self, part: str) -> pathlib.Path:
        """The demonstrations of a part: "train" to learn from, "valid" held out."""
        return self.demos / part / EPISODES

    @property
    def sft(self) -> pathlib.Path:
        """The folder of SFT."""
        return self.workdir / "sft"

    @property
    def base(self) -> pathlib.Path:
        """The base policy: what SFT makes, or --base."""
        given = self.settings.method.base
        return pathlib.Path(given) if given else self.sft / "policy"

    def on_its_games(self) -> "Run":
        """The run with the games that it generated as its environment's data."""
        env = self.settings.env
        data: dict[str, Any] = {f"{env.env}_data": str(self.games)}
        settings = dataclasses.replace(self.settings, env=dataclasses.replace(env, **data))
        return dataclasses.replace(self, settings=settings)

    def round(self, number: int) -> Round:
        """The files of a round, from 0."""
        return Round(number, self.workdir / f"iteration_{number}")

    def rounds(self) -> list[Round]:
        """The rounds that have a folder, in order."""
        found = (re.fullmatch(r"iteration_(\d+)", path.name) for path in self.workdir.glob("*"))
        return [self.round(number) for number in sorted(int(match[1]) for match in found if match)]

    def newest_policy(self, number: int) -> pathlib.Path:
        """The policy that plays, and is trained, in a round: the base, or the last round's."""
        return self.round(number - 1).policy if number else self.base

    def games_of(self, number: int) -> ExploreConfig:
        """What a round explores: each plays games of its own, if --games says how many."""
        explore = self.settings.explore
        first = explore.first_game + number * explore.games
        return dataclasses.replace(explore, first_game=first)

    def lora(self, stage: AdaptedStage) -> LoraConfig:
        """The adapters that a stage trains; none if --lora_stages leaves it out."""
        return self.settings.adapters(stage)

    @property
    def evaluations(self) -> pathlib.Path:
        """The folder of all evaluations."""
        return self.workdir / "eval"

    def evaluation(self, name: str) -> pathlib.Path:
        """The folder of an evaluation."""
        return self.evaluations / name

    @property
    def truth(self) -> pathlib.Path:
        """The folder of what branches say of an evaluation's steps."""
        return self.workdir / "truth"

    @property
    def branches(self) -> pathlib.Path:
        """How the branches ended, a line each."""
        return self.truth / "branches.jsonl"

    @property
    def advantages(self) -> pathlib.Path:
        """The value before, and the true advantage of, each judged step."""
        return self.truth / "truth.json"

    @property
    def credits(self) -> pathlib.Path:
        """Every credit judged by the truth."""
        return self.truth / "credits.json"

    @property
    def estimator(self) -> pathlib.Path:
        """The figures of the estimator on held-out episodes."""
        return self.workdir / "estimator.json"

    @property
    def report(self) -> pathlib.Path:
        """The report."""
        return self.workdir / "report.html"

    @property
    def server_log(self) -> pathlib.Path:
        """What the environment server of a question about splits says."""
        return self.workdir / "server.log"


def at(workdir: pathlib.Path) -> Run:
    """The files of a run whose settings do not matter, for readers."""
    return Run(workdir, policy="", seed=0, settings=Settings())


def features_of(episodes: pathlib.Path) -> pathlib.Path:
    """Where the base model's hidden states of a file of episodes are kept."""
    return episodes.with_name("features.npz")


def lower_states_of(episodes: pathlib.Path) -> pathlib.Path:
    """Where the states of its lower layers are kept."""
    return episodes.with_name("below.npz")


def checkpoints(stage: pathlib.Path) -> pathlib.Path:
    """The checkpoints of a training stage's folder."""
    return stage / "checkpoints"


def done(stage: pathlib.Path) -> pathlib.Path:
    """What says that the stage of a folder has ended."""
    return stage / "done.json"


def fingerprint(stage: pathlib.Path) -> pathlib.Path:
    """What says which settings and inputs a stage's folder, or file, was made from."""
    if stage.suffix == ".jsonl":
        return stage.with_name(f"{stage.stem}.fingerprint.json")
    return stage / "fingerprint.json"
