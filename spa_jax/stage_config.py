"""What the stages of a run do: SFT, exploration, estimator, credit, policy update; and all in one.

`settings.py` says how a setting is written, and `experiments/flags.py` derives the flags.
"""

import dataclasses
import typing
from typing import Literal

from spa_jax.config import (
    DEFAULT_COMPUTE,
    ChatConfig,
    ComputeConfig,
    EnvConfig,
    LoraConfig,
    RowsConfig,
    SamplingConfig,
    fit_attention,
)
from spa_jax.data_config import DataConfig, at_horizon
from spa_jax.errors import UserError
from spa_jax.horizons import HORIZONS
from spa_jax.settings import MAY, MUST, Checked, setting

RFT = "rft"
# Those that compare the rollouts of a task with each other, and those that have a critic.
GROUP_OBJECTIVES = ("grpo", "rloo", "gigpo", "gagpo", "ragen")
CRITIC_OBJECTIVES = ("ppo", "ragen")
CLIP_HIGH = 0.28  # how far a ratio may rise above 1 in ragen; `rl.ragen` says why
BRANCHING = "branching"
ROUND_CREDITS = ("prm4a", BRANCHING)  # made from, or of, the episodes of a round
CreditName = Literal[
    "spa", "terminal", "uniform", "shuffled", "random", "subgoal", "prm4a", "branching"
]
ObjectiveName = Literal[
    "ppo", "grpo", "rloo", "reinforce++", "gigpo", "gagpo", "ragen", "archer", "rft"
]


@dataclasses.dataclass(frozen=True)
class SftConfig(Checked):
    """Behaviour cloning of expert trajectories."""

    learning_rate: float = setting(
        2e-5, "The largest learning rate of SFT.", flag="sft_learning_rate", above=0, group=MAY
    )
    warmup_share: float = setting(
        0.03,
        "Share of SFT's updates in which its learning rate rises to the largest.",
        flag="sft_warmup_share",
        minimum=0,
        maximum=1,
    )
    schedule: Literal["cosine", "constant"] = setting(
        "cosine",
        "SFT's learning rate after the warm-up: a cosine down to zero, or constant (as suits "
        "--sft_ema).",
        flag="sft_schedule",
    )
    ema: float = setting(
        0.0,
        "Keep the exponential moving average of the weights of SFT, of this decay (after n "
        "updates at most n / (n + 9), which lets the first ones go); 0: keep the last weights.",
        flag="sft_ema",
        minimum=0,
        below=1,
    )
    epochs: float = setting(
        3.0, "Passes of SFT over the demonstrations.", flag="sft_epochs", above=0, group=MAY
    )
    batch_size: int = setting(
        16, "Demonstrations in an update of SFT.", flag="sft_batch_size", minimum=1, group=MAY
    )
    eval_every: int = setting(
        0,
        "Updates of SFT between losses on the held-out demonstrations; 0: a pass.",
        flag="sft_eval_every",
        minimum=0,
    )
    patience: int = setting(
        0,
        "SFT stops after this many held-out losses without a new best, and keeps the best "
        "weights; 0: it never stops early, and keeps the last.",
        flag="sft_patience",
        minimum=0,
        group=MAY,
    )
    train_layers: int = setting(
        0,
        "SFT trains only this many of the top layers, and the last norm; 0: everything.",
        flag="sft_train_layers",
        minimum=0,
    )
    updates: int = setting(
        0, "SFT makes this many updates; 0: as --sft_epochs says.", flag="sft_updates", minimum=0
    )
    row_buckets: int = setting(
        0,
        "--row_buckets of SFT, whose updates may be a single short row; 0: as --row_buckets says.",
        flag="sft_row_buckets",
        minimum=0,
        operational=True,
    )
    checkpoint_every: int = setting(
        50,
        "Updates of SFT between checkpoints; 0: one only when it is told to stop.",
        flag="sft_checkpoint_every",
        minimum=0,
        operational=True,
    )


@dataclasses.dataclass(frozen=True)
class ExploreConfig(Checked):
    """Which episodes exploration plays."""

    rollouts: int = setting(
        10, "Episodes of a game that exploration plays in a round.", minimum=1, group=MAY
    )
    games: int = setting(
        0, "Games of the split that are played, in each round others; 0: all.", minimum=0, group=MAY
    )
    first_game: int = setting(
        0, "The first of these games, counted from 0 in the split's shuffled order.", minimum=0
    )
    split: str = setting("train", "The split whose games are played.", group=MAY)


@dataclasses.dataclass(frozen=True)
class ProgressConfig(Checked):
    """The progress estimator."""

    estimator: Literal["answer", "value", "paper"] = setting(
        "answer",
        "What the estimator reads of a step. answer: the state behind the environment's answer, "
        "with a term of its own for what was known before the first step; value: the difference "
        "that the step makes to a prediction of the reward; paper: the end of the action alone.",
        group=MAY,
    )
    prefixes: float = setting(
        0.0,
        "Weight of the errors behind every step beside that at the end, with --estimator=answer "
        "(with value it is 1, and paper has none).",
        flag="progress_prefixes",
        minimum=0,
    )
    trunk: Literal["frozen", "trained"] = setting(
        "frozen",
        "Whether the policy that the estimator reads is trained with it, all of it (adapters on "
        "it: --lora_stages=progress). A trained one reads every episode anew in each epoch.",
        flag="progress_trunk",
    )
    heads: int = setting(
        4,
        "Heads of the estimator that are averaged; --estimator=paper has one.",
        flag="progress_heads",
        minimum=1,
    )
    learning_rate: float = setting(
        3e-4,
        "The largest learning rate of the progress estimator.",
        flag="progress_learning_rate",
        above=0,
        group=MAY,
    )
    epochs: int = setting(
        20,
        "Passes of the estimator over the exploration episodes.",
        flag="progress_epochs",
        minimum=1,
        group=MAY,
    )
    batch_size: int = setting(
        16, "Episodes in an update of the estimator.", flag="progress_batch_size", minimum=1
    )
    weight_decay: float = setting(
        0.01, "AdamW's weight decay of the estimator.", flag="progress_weight_decay", minimum=0
    )
    clip_norm: float = setting(
        1.0,
        "Largest norm of a gradient of the estimator; longer ones are cut.",
        flag="progress_clip_norm",
        above=0,
    )
    width: int = setting(
        64,
        "Units of the estimator's hidden layer; 0: its heads are linear.",
        flag="progress_width",
        minimum=0,
    )

    @property
    def prefix_weight(self) -> float:
        """The weight that the form of the estimator takes."""
        return 1.0 if self.estimator == "value" else self.prefixes


@dataclasses.dataclass(frozen=True)
class CreditConfig(Checked):
    """From contributions to step rewards."""

    alpha: float = setting(1.0, "Weight of a step's contribution in its reward.", group=MAY)
    beta: float = setting(0.5, "Weight of grounding in a step's reward.", group=MAY)
    grounding: Literal["penalty", "bonus"] = setting(
        "penalty",
        "What an action that the environment could not execute costs. penalty: it loses beta; "
        "bonus: every other one gains beta, the paper's formula as printed.",
    )
    credit: CreditName = setting(
        "spa",
        "How an episode's credit is shared among its steps: as the estimator says (spa), or, to "
        "compare, by a placebo of the same total (terminal: R at the last step). subgoal: what "
        "the environment says that the step brought; prm4a: how much a value fitted on returns "
        "rises; branching: how much more the policy wins that goes on from after the step than "
        "from before it (costly).",
        group=MAY,
    )
    branches: int = setting(
        4,
        "Episodes that go on from before each step, with --credit=branching.",
        flag="credit_branches",
        minimum=2,
    )
    credit_residual: bool = setting(
        False, "The last step also gets what the credits lack of the final reward.", group=MAY
    )


@dataclasses.dataclass(frozen=True)
class PpoConfig(Checked):
    """The update of the policy: PPO, or another objective in its place."""

    objective: ObjectiveName = setting(
        "ppo",
        "How the policy is updated. ppo: advantages with a critic; grpo, rloo: a task's rollouts "
        "against each other; gigpo: also its steps from equal states; gagpo: advantages with the "
        "mean return of equal states; ragen: ppo on the tasks whose rollouts differ most; "
        "archer: one with a critic of actions; reinforce++: returns, whitened; rft: SFT on the won "
        "episodes.",
        group=MAY,
    )
    gae: Literal["step", "token"] = setting(
        "step",
        "How ppo estimates advantages. step: one value and one advantage a step; token: one a "
        "token that the policy wrote.",
    )
    learning_rate: float = setting(
        1e-5, "Learning rate of the policy's update.", flag="ppo_learning_rate", above=0, group=MAY
    )
    epochs: int = setting(
        1,
        "Passes of the policy's update over the episodes.",
        flag="ppo_epochs",
        minimum=1,
        group=MAY,
    )
    batch_size: int = setting(
        8, "Episodes in an update of the policy.", flag="ppo_batch_size", minimum=1, group=MAY
    )
    gamma: float = setting(0.99, "Discount of a step.", minimum=0, maximum=1, group=MAY)
    gae_lambda: float = setting(
        0.95, "Lambda of generalised advantage estimation.", minimum=0, maximum=1, group=MAY
    )
    critic: Literal["head", "ridge"] = setting(
        "head",
        "Where the values of ppo come from. head: from a head that is trained with the policy; "
        "ridge: from ridge regression of the returns on the reference policy's hidden states, "
        "fitted on the other tasks' episodes.",
        group=MAY,
    )
    step_baseline: bool = setting(
        False, "Subtract from each advantage the mean of the other episodes' at the same step."
    )
    train_layers: int = setting(
        0,
        "The policy's update trains only this many of the top layers, and the last norm; 0: "
        "everything.",
        flag="ppo_train_layers",
        minimum=0,
        group=MAY,
    )
    clip: float = setting(
        0.2,
        "How far the ratio of new to old probability may move from 1 before it is clipped.",
        flag="ppo_clip",
        above=0,
    )
    value_clip: float = setting(
        0.2, "How far a value may move before it is clipped.", flag="ppo_value_clip", above=0
    )
    value_coef: float = setting(
        0.1, "Weight of the value head's loss.", flag="ppo_value_coef", minimum=0
    )
    kl_coef: float = setting(
        0.0, "Weight of the KL to the reference policy.", flag="ppo_kl_coef", minimum=0, group=MAY
    )
    kl_target: float = setting(
        0.0,
        "With --kl=reward: the KL of an episode, in nats, that the weight is adapted to; a larger "
        "one raises it, a smaller one lowers it. 0: the weight stays.",
        flag="ppo_kl_target",
        minimum=0,
    )
    kl_horizon: float = setting(
        10_000.0,
        "Episodes over which an adapted weight of the KL moves by about its own size.",
        flag="ppo_kl_horizon",
        above=0,
    )
    kl: Literal["loss", "reward"] = setting(
        "loss",
        "Where the KL to the reference policy enters. loss: as a term of the loss (k3); reward: "
        "each step's KL, with the policy at the update's start, is taken from its reward.",
    )
    truncate_ratio: float = setting(
        0.0,
        "Ratios to the policy that played count as this much at most (for old episodes); 0: as "
        "they are.",
        flag="ppo_truncate_ratio",
        minimum=0,
    )
    entropy_coef: float = setting(
        0.0, "Weight of the entropy bonus.", flag="ppo_entropy_coef", minimum=0
    )
    checkpoint_every: int = setting(
        50,
        "Updates of the policy between checkpoints; 0: one only when it is told to stop.",
        flag="ppo_checkpoint_every",
        minimum=0,
        operational=True,
    )
    allow_truncated_behaviour: bool = setting(
        False,
        "Train on episodes that were sampled greedily or with --top_k or --top_p: their recorded "
        "log-probabilities are not those of what they were drawn from.",
    )

    def check(self) -> None:
        """Refuses what an objective would not heed."""
        for wrong, flag, why in _unheeded(self):
            if wrong:
                raise UserError(
                    f"{flag} with --objective={self.objective}: {why}; drop one of them"
                )


def _unheeded(ppo: PpoConfig) -> list[tuple[bool, str, str]]:
    """(whether it is so, flag, why not) of what does not go together."""
    name, in_reward = ppo.objective, ppo.kl == "reward"
    has_critic = name in CRITIC_OBJECTIVES
    grouped = name in GROUP_OBJECTIVES and not has_critic
    own = "rft has no advantage" if name == RFT else "a task's rollouts are the baseline already"
    spread = (
        "rewards are divided by their spread in a group, so a KL among them would weigh more the "
        "less they differ; --kl=loss is the paper's"
    )
    wide = f"its upper clip is {CLIP_HIGH:g}, no narrower than the lower one"
    ratio = f"--ppo_truncate_ratio={ppo.truncate_ratio:g}"
    upper = CLIP_HIGH if name == "ragen" else ppo.clip
    least = f"it must exceed 1 + --ppo_clip={1 + upper:g}, where PPO clips anyway"
    coefs = "--ppo_kl_coef or --ppo_entropy_coef"
    has_coef = bool(ppo.kl_coef or ppo.entropy_coef)
    return [
        (ppo.gae == "token" and not has_critic, "--gae=token", "GAE needs a critic, as ppo's"),
        (ppo.critic == "ridge" and not has_critic, "--critic=ridge", "it has no critic"),
        (ppo.step_baseline and name == "archer", "--step_baseline", "its critic is the baseline"),
        (ppo.critic == "ridge" and ppo.gae == "token", "--critic=ridge", "it values steps"),
        (ppo.gae == "token" and ppo.step_baseline, "--gae=token", "--step_baseline compares steps"),
        (ppo.step_baseline and (grouped or name == RFT), "--step_baseline", own),
        (in_reward and not ppo.kl_coef, "--kl=reward", "--ppo_kl_coef is 0"),
        (bool(ppo.kl_target) and not in_reward, "--ppo_kl_target", "it adapts --kl=reward alone"),
        (in_reward and name in ("grpo", "gagpo"), "--kl=reward", spread),
        (name == "ragen" and bool(ppo.kl_coef), "--ppo_kl_coef", "StarPO-S has no KL term"),
        (name == "ragen" and ppo.clip > CLIP_HIGH, f"--ppo_clip={ppo.clip:g}", wide),
        (name == RFT and has_coef, coefs, "rft minimises the negative log-likelihood alone"),
        (0 < ppo.truncate_ratio <= 1 + upper, ratio, least),
        (name == RFT and ppo.truncate_ratio > 0, "--ppo_truncate_ratio", "rft has no ratio"),
    ]


AdaptedStage = Literal["sft", "progress", "ppo"]


@dataclasses.dataclass(frozen=True)
class MethodConfig(Checked):
    """The whole method in one run."""

    iterations: int = setting(
        1, "Rounds of exploration, estimator and policy update.", minimum=1, group=MUST
    )
    base: str = setting(
        "", "Start from the base policy in this folder instead of running SFT.", group=MUST
    )
    demonstrations: str = setting(
        "",
        "Clone the episodes of this ShareGPT-style log (see import_demos) instead of our expert's.",
        group=MUST,
        operational=True,
    )
    lora_stages: tuple[AdaptedStage, ...] = setting(
        ("sft", "ppo"),
        "With --lora_rank, the stages that train adapters, of "
        f"{','.join(typing.get_args(AdaptedStage))}; without progress the estimator's trunk is "
        "frozen.",
    )
    eval_temperature: float = setting(
        1.0, "Temperature at which run_spa evaluates; 0 is greedy.", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """Every setting of a run, by stage or part."""

    method: MethodConfig = MethodConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    sampling: SamplingConfig = SamplingConfig()
    rows: RowsConfig = RowsConfig()
    sft: SftConfig = SftConfig()
    explore: ExploreConfig = ExploreConfig()
    progress: ProgressConfig = ProgressConfig()
    credit: CreditConfig = CreditConfig()
    ppo: PpoConfig = PpoConfig()
    lora: LoraConfig = LoraConfig()
    compute: ComputeConfig = DEFAULT_COMPUTE
    chat: ChatConfig = ChatConfig()

    def adapters(self, stage: AdaptedStage) -> LoraConfig:
        """The adapters that a stage trains; none if --lora_stages leaves it out."""
        return self.lora if stage in self.method.lora_stages else LoraConfig()

    def check(self) -> None:
        """Refuses stages that do not fit each other, or the machine's parts that they use."""
        at_horizon(self.data, self.env, given=HORIZONS.get(self.data.horizon, ()))
        check_together(self.ppo, self.credit, self.explore)
        fit_attention(self.compute, self.rows)
        check_trained(self.adapters("sft"), self.sft.train_layers, "--sft_train_layers")
        check_trained(self.adapters("ppo"), self.ppo.train_layers, "--ppo_train_layers")


def check_together(ppo: PpoConfig, credit: CreditConfig, explore: ExploreConfig) -> None:
    """Refuses stages that do not fit each other.

    Raises:
      UserError: names the flags, and says why.
    """
    if ppo.objective in GROUP_OBJECTIVES and explore.rollouts < 2:
        raise UserError(
            f"--objective={ppo.objective} compares a task's rollouts with each other: it needs "
            f"--rollouts of at least 2, not {explore.rollouts}"
        )
    if ppo.objective == RFT and credit.credit != "spa":
        raise UserError(
            f"--credit={credit.credit} with --objective=rft: rft clones whole episodes, no step's "
            "credit enters; drop one of them"
        )


def check_trained(lora: LoraConfig, train_layers: int, flag: str) -> None:
    """Refuses adapters and top layers at once.

    Args:
      lora: the adapters' settings.
      train_layers: the stage's.
      flag: that of `train_layers`, for the message.

    Raises:
      UserError: names both flags.
    """
    if lora.rank and train_layers:
        raise UserError(
            f"--lora_rank={lora.rank} trains adapters in every layer and no weight of the model; "
            f"it contradicts {flag}={train_layers}: drop one of them"
        )
