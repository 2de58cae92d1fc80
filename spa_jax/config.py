"""Every setting of every stage, once: frozen dataclasses with their defaults and help.

`experiments/flags.py` derives the absl flags from them.  A field's flag has the field's
name unless `flag=` gives it another (two stages with a learning rate each, say).
"""

import dataclasses
from typing import Any

from spa_jax.errors import UserError

# The matrices of a layer that an adapter can change.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
DTYPES = ("float32", "bfloat16")
GROUP_OBJECTIVES = ("grpo", "rloo")  # compare the rollouts of a task with each other


def _setting(default: Any, help: str, flag: str | None = None, choices: tuple = ()) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": help, "flag": flag, "choices": choices}
    )


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Which environment, and where its server is."""

    env: str = _setting(
        "alfworld", "The environment; custom: a class of your own; openenv: any text environment "
        "behind OpenEnv's protocol, at --env_address.",
        choices=("alfworld", "webshop", "virtualhome", "custom", "openenv"),
    )  # fmt: skip
    env_address: str = _setting(
        "", "Address of a running environment server, such as http://127.0.0.1:8000. "
        "Empty: start one on this machine and stop it at the end."
    )  # fmt: skip
    env_token_file: str = _setting(
        "", "File of the token that the server at --env_address wants; empty: the environment "
        "variable SPA_JAX_ENV_TOKEN, if it is set.",
    )  # fmt: skip
    env_wait_s: float = _setting(
        120.0, "Seconds that a session waits for a server that is away or full."
    )
    alfworld_data: str = _setting("", "Folder of ALFWorld games: holds SPLIT/GAME/game.tw-pddl.")
    webshop_data: str = _setting("", "Folder of a WebShop catalogue, or of a prepared store.")
    virtualhome_data: str = _setting("", "Folder of VirtualHome tasks: holds SPLIT/TASK, or the "
                                     "authors' task files.")  # fmt: skip
    custom_data: str = _setting("", "MODULE:CLASS of an environment of your own "
                                "(docs/environments.md).")  # fmt: skip
    openenv_tasks: int = _setting(100, "Tasks of a split of an OpenEnv environment: each is a "
                                  "seed of its reset.")  # fmt: skip
    openenv_mapping: str = _setting(
        "",
        "JSON file that says what the fields of an OpenEnv environment mean: instruction, action, "
        "text, reward, reward_scale, success, grounded (docs/environments.md); empty: what its "
        "schema says.",
    )
    openenv_reward_scale: float = _setting(
        0.0,
        "Brings R of an OpenEnv episode into [0, 1]: it is multiplied by this; 0: by what the "
        "mapping says, else by 1.",
    )
    prompt: str = _setting(
        "short", "The instruction that opens an episode.", choices=("short", "paper")
    )
    max_steps: int = _setting(40, "Environment steps an episode may take.")
    give_up_after: int = _setting(
        0, "An episode fails after this many actions in a row that the environment could not "
        "execute; 0: never.",
    )  # fmt: skip
    max_retries: int = _setting(3, "Tries again after an environment error, an episode.")

    @property
    def data(self) -> str:
        """The data of the environment, the flag --<env>_data; empty where a server has it."""
        return getattr(self, f"{self.env}_data", "")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """An environment server.

    Attributes:
      data_dir: the environment's data, such as ALFWorld's json_2.1.1, its parent, or a folder
        that holds splits.
      env: the environment's name, one of `envs.benchmarks.BENCHMARKS`.
      prompt: the instruction of a session that does not choose one itself.
    """

    data_dir: str
    env: str = "alfworld"
    prompt: str = "paper"
    max_sessions: int = _setting(
        0, "Sessions at once, each with a process; 0: what the memory that is free at the start "
        "has room for."
    )  # fmt: skip
    games_per_worker: int = _setting(0, "Games after which a process is replaced; 0: as suits.")
    worker_memory_mb: int = _setting(
        0, "Memory (no mapped files) above which a process is ended, and its episode with it; 0: "
        "as suits."
    )  # fmt: skip
    reset_deadline_s: float = _setting(120.0, "Seconds that a reset may take.")
    step_deadline_s: float = _setting(60.0, "Seconds that a step may take.")
    idle_timeout_s: float = _setting(
        1800.0, "Seconds without a message after which a session ends; 0: never."
    )
    max_message_kb: int = _setting(1024, "The longest message, in KiB.")
    messages_per_s: float = _setting(
        1000.0, "Messages a second of a session; more are slowed down; 0: any."
    )
    drain_s: float = _setting(5.0, "Seconds that calls in progress have at SIGTERM.")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the policy writes."""

    temperature: float = _setting(1.0, "The policy is softmax(logits / temperature); 0 is greedy.")
    top_k: int = _setting(0, "Sample among the k likeliest tokens only; 0 keeps all.")
    top_p: float = _setting(1.0, "Sample from the smallest set of this probability; 1 keeps all.")
    max_new_tokens: int = _setting(32, "Tokens a turn may have.")
    stop: tuple[str, ...] = _setting(
        (), "Texts that end a turn, comma-separated (with quotes around one that has a comma; \\n "
        "is a line break); the action is read from before them.",
    )  # fmt: skip
    turn_deadline_s: float = _setting(
        0.0, "Seconds that the policy may take for a turn; longer ends the episode. 0: no limit."
    )
    slots: int = _setting(16, "Episodes played at once.")
    context_length: int = _setting(1024, "Tokens a whole episode may have.")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How a conversation becomes tokens."""

    chat_format: str = _setting(
        "template", "template: the tokenizer's own chat template; chatml, llama3: a built-in "
        "format, for templates that change earlier turns. A policy remembers what it was trained "
        "in.",
        choices=("template", "chatml", "llama3"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The static shape of a training batch, and the devices that share it."""

    row_length: int = _setting(1024, "Tokens a packed row holds; every trajectory must fit.")
    policy_slots: int = _setting(384, "Policy tokens a packed row holds.")
    step_slots: int = _setting(64, "Steps a packed row holds.")
    rows_per_device: int = _setting(2, "Rows that a device takes at once (a microbatch).")
    row_buckets: int = _setting(
        1, "Lengths that a microbatch can have in an update: it is cut to the next k-th of "
        "--row_length, its policy slots too. More leave less padding, and are compiled one by one.",
    )  # fmt: skip
    share_prefix: bool = _setting(
        True, "Compute what all of a batch's trajectories open with once a row."
    )
    partition: str = _setting(
        "pmap", "Of SFT and the policy's update. pmap: every device holds all parameters (a "
        "single one needs no pmap and gets none); mesh: they are cut over --mesh.",
        choices=("pmap", "mesh"),
    )  # fmt: skip
    mesh: str = _setting(
        "", "data:A,fsdp:B: A x B devices share a batch, B of them each parameter; empty: all "
        "devices, parameters whole."
    )  # fmt: skip

    @property
    def slots(self) -> int:
        """Policy-token slots of a device's microbatch."""
        return self.rows_per_device * self.policy_slots

    @property
    def packing(self) -> dict[str, Any]:
        """The arguments of `batching.pack`."""
        return {
            "row_length": self.row_length,
            "policy_slots": self.policy_slots,
            "step_slots": self.step_slots,
            "share_prefix": self.share_prefix,
        }


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes that share a run (`training/distributed.py`, docs/pod.md)."""

    distributed: bool = _setting(
        False, "This is one of several processes, which find each other on a Cloud TPU slice, "
        "under Slurm or Open MPI; elsewhere give the three flags below, which imply this one."
    )  # fmt: skip
    coordinator_address: str = _setting("", "HOST:PORT of process 0, the same in all processes.")
    num_processes: int = _setting(0, "How many processes share the run.")
    process_id: int = _setting(-1, "Which of them this is, from 0.")
    connect_timeout_s: int = _setting(
        300, "Seconds that the processes wait for each other at the start."
    )
    meet_timeout_s: int = _setting(
        7200, "Seconds that a process waits for the others at the end of a stage: longer than one "
        "may play behind another."
    )  # fmt: skip

    @property
    def by_hand(self) -> bool:
        """Whether the three flags say who the processes are."""
        return bool(self.coordinator_address)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed: in which numbers, what is kept, by which attention.

    Log-probabilities, losses, the heads and the optimiser's moments are float32 whatever is set.
    """

    param_dtype: str = _setting(
        "float32", "Of the weights that are trained. bfloat16 halves them; a change smaller than "
        "1/256 of a weight is then lost.", choices=DTYPES,
    )  # fmt: skip
    compute_dtype: str = _setting(
        "auto", "Of products and activations, and of weights that are frozen. auto: bfloat16 on "
        "an accelerator, float32 on a CPU.", choices=("auto", *DTYPES),
    )  # fmt: skip
    matmul_dtype: str = _setting(
        "compute", "Of the factors of products with a layer's weights; the sums stay as they are. "
        "compute: --compute_dtype. auto: bfloat16 on a CPU that multiplies it faster (AMX or "
        "AVX512-BF16), which is what a TPU makes of float32 factors.",
        choices=("compute", "bfloat16", "auto"),
    )  # fmt: skip
    accum_dtype: str = _setting(
        "float32", "Of the gradients, while those of an update's microbatches are added up.",
        choices=DTYPES,
    )  # fmt: skip
    remat: str = _setting(
        "dots", "What a layer keeps for the backward pass. none: all that it needs; dots: the "
        "products with weights, and attention (half of the memory, in no more time); attention: "
        "that alone; layer: only what it started from. What is not kept is computed again.",
        choices=("none", "dots", "attention", "layer"),
    )  # fmt: skip
    attention: str = _setting(
        "auto", "Attention. xla: in blocks, everywhere; native: compiled for this CPU, in float32, "
        "in training and sampling; cudnn: its fused kernel, on NVIDIA GPUs, in training; splash: "
        "a Pallas kernel, on TPUs, in training. auto: native where it can be, and xla elsewhere.",
        choices=("auto", "xla", "native", "cudnn", "splash"),
    )  # fmt: skip
    logits_chunk: int = _setting(
        1024, "Policy tokens whose logits over the vocabulary exist at once, a device; more are "
        "projected in chunks, and again in the backward pass. 0: all at once.",
    )  # fmt: skip

    def resolved(self, platform: str) -> "ComputeConfig":
        """With what `auto` means on a platform: cpu, gpu or tpu.

        Which attention it means on a CPU depends on the model too, and which factors of products on
        the processor: they stay.
        """
        dtype, attention, factors = self.compute_dtype, self.attention, self.matmul_dtype
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else "bfloat16"
        if attention == "auto" and platform != "cpu":
            attention = "xla"
        if factors == "auto" and platform != "cpu":
            factors = "compute"
        return dataclasses.replace(
            self, compute_dtype=dtype, attention=attention, matmul_dtype=factors
        )


DEFAULT_COMPUTE = ComputeConfig()


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of the policy's own weights (`models/lora.py`)."""

    rank: int = _setting(
        0, "Train low-rank adapters (LoRA) of this rank, and no weight of the model; 0: off.",
        "lora_rank",
    )  # fmt: skip
    alpha: float = _setting(16.0, "An adapter's product is scaled by alpha / rank.", "lora_alpha")
    targets: tuple[str, ...] = _setting(
        ("q", "v"), f"The matrices that get an adapter, of {','.join(LORA_TARGETS)}.",
        "lora_targets",
    )  # fmt: skip

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Behaviour cloning of expert trajectories."""

    learning_rate: float = _setting(2e-5, "Peak learning rate.", "sft_learning_rate")
    warmup_share: float = _setting(0.03, "Share of updates that warm up.", "sft_warmup_share")
    schedule: str = _setting(
        "cosine", "The learning rate after that: a cosine to zero, or constant (for --sft_ema).",
        "sft_schedule", choices=("cosine", "constant"),
    )  # fmt: skip
    ema: float = _setting(
        0.0, "Keep the exponential moving average of the weights, of this decay, early on of less: "
        "of n / (n + 9) after n updates; 0: the weights themselves.",
        "sft_ema",
    )  # fmt: skip
    epochs: float = _setting(3.0, "Passes over the demonstrations, at most.", "sft_epochs")
    batch_size: int = _setting(16, "Trajectories an update.", "sft_batch_size")
    clip_norm: float = _setting(1.0, "Largest norm of the gradient.", "sft_clip_norm")
    weight_decay: float = _setting(0.0, "AdamW's weight decay.", "sft_weight_decay")
    eval_every: int = _setting(0, "Updates between held-out losses; 0: an epoch.", "sft_eval_every")
    patience: int = _setting(
        0, "Stop after this many held-out losses without a new best, and keep the best; 0: never, "
        "and keep the last.",
        "sft_patience",
    )  # fmt: skip
    train_layers: int = _setting(
        0, "Train only this many of the top layers, and the last norm; 0: everything.",
        "sft_train_layers",
    )  # fmt: skip
    updates: int = _setting(0, "This many updates instead of epochs; 0: by epochs.", "sft_updates")
    row_buckets: int = _setting(
        0, "--row_buckets of this stage, whose updates may be a single short row; 0: the same.",
        "sft_row_buckets",
    )  # fmt: skip
    checkpoint_every: int = _setting(
        50, "Updates between checkpoints; 0: none, but when the stage is told to stop.",
        "sft_checkpoint_every",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """Which episodes exploration plays."""

    rollouts: int = _setting(10, "Episodes a task.")
    games: int = _setting(0, "Play this many of the split's games; 0: all of them.")
    first_game: int = _setting(0, "Index of the first of those games in the split's order.")
    split: str = _setting("train", "The data split that the games come from.")


@dataclasses.dataclass(frozen=True)
class ProgressConfig:
    """The progress estimator."""

    learning_rate: float = _setting(3e-4, "Peak learning rate.", "progress_learning_rate")
    epochs: int = _setting(60, "Passes over the exploration data.", "progress_epochs")
    batch_size: int = _setting(16, "Trajectories an update.", "progress_batch_size")
    weight_decay: float = _setting(0.01, "AdamW's weight decay.", "progress_weight_decay")
    clip_norm: float = _setting(1.0, "Largest norm of the gradient.", "progress_clip_norm")
    width: int = _setting(256, "Units of the head's hidden layer.", "progress_width")
    valid_share: float = _setting(0.2, "Share of tasks held out.", "progress_valid_share")


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    """From contributions to step rewards."""

    alpha: float = _setting(1.0, "Weight of the contribution.")
    beta: float = _setting(0.5, "Weight of grounding.")
    grounding: str = _setting(
        "penalty", "penalty: beta * (g - 1); bonus: beta * g, the paper's formula as printed.",
        choices=("penalty", "bonus"),
    )  # fmt: skip
    credit: str = _setting(
        "spa", "Whose credit the steps get: the estimator's, or a placebo of the same total.",
        choices=("spa", "terminal", "uniform", "shuffled", "random"),
    )  # fmt: skip
    credit_residual: bool = _setting(False, "Add R - sum of credits to the last step.")


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """The update of the policy: PPO, or another objective in its place."""

    objective: str = _setting(
        "ppo", "ppo: GAE with a critic; grpo, rloo: a task's rollouts against each other; "
        "reinforce++: returns, whitened; rft: SFT on the won episodes.",
        choices=("ppo", "grpo", "rloo", "reinforce++", "rft"),
    )  # fmt: skip
    gae: str = _setting(
        "step", "step: one value and one advantage a step; token: one a token that the policy "
        "wrote.", choices=("step", "token"),
    )  # fmt: skip
    learning_rate: float = _setting(1e-5, "Learning rate.", "ppo_learning_rate")
    epochs: int = _setting(1, "Passes over the trajectories.", "ppo_epochs")
    batch_size: int = _setting(8, "Trajectories an update.", "ppo_batch_size")
    gamma: float = _setting(0.99, "Discount a step.")
    gae_lambda: float = _setting(0.95, "Lambda of generalised advantage estimation.")
    critic: str = _setting(
        "head", "Values of ppo. head: a value head that is trained along; ridge: no head, but "
        "ridge regression of the returns on the reference policy's hidden states, on the other "
        "tasks' episodes.",
        choices=("head", "ridge"),
    )  # fmt: skip
    step_baseline: bool = _setting(
        False, "Subtract from each advantage the mean of the other episodes' at the same step."
    )
    train_layers: int = _setting(
        0, "Train only this many of the top layers, and the last norm; 0: everything.",
        "ppo_train_layers",
    )  # fmt: skip
    clip: float = _setting(0.2, "Clip range of the policy's ratio.", "ppo_clip")
    value_clip: float = _setting(0.2, "Clip range of the value.", "ppo_value_clip")
    value_coef: float = _setting(0.1, "Weight of the value loss.", "ppo_value_coef")
    kl_coef: float = _setting(0.0, "Weight of the KL to the reference policy.", "ppo_kl_coef")
    kl: str = _setting(
        "loss", "loss: the KL (k3) is a loss term; reward: each step's KL, with the policy at the "
        "update's start, is taken from its reward.", choices=("loss", "reward"),
    )  # fmt: skip
    truncate_ratio: float = _setting(
        0.0, "Ratios to the policy that sampled count as this much at most (for old episodes); "
        "0: as they are.", "ppo_truncate_ratio",
    )  # fmt: skip
    entropy_coef: float = _setting(0.0, "Weight of the entropy bonus.", "ppo_entropy_coef")
    clip_norm: float = _setting(1.0, "Largest norm of the gradient.", "ppo_clip_norm")
    weight_decay: float = _setting(0.0, "AdamW's weight decay.", "ppo_weight_decay")
    checkpoint_every: int = _setting(
        50, "Updates between checkpoints; 0: none, but when the stage is told to stop.",
        "ppo_checkpoint_every",
    )  # fmt: skip
    allow_truncated_behaviour: bool = _setting(
        False, "Train on data sampled greedily or with top-k/top-p: its log-probs are not those "
        "of the distribution it was drawn from."
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The whole method in one run, on generated games or on a data folder's own splits."""

    iterations: int = _setting(1, "Rounds of exploration, estimator and PPO.")
    base: str = _setting("", "Start from this base policy's folder instead of running SFT.")
    demonstrations: str = _setting(
        "", "Clone the episodes of this ShareGPT-style log (see import_demos) instead of our "
        "expert's.",
    )  # fmt: skip
    demo_split: str = _setting("train", "The split whose games the expert demonstrates.")
    demo_games: int = _setting(0, "How many of them, from the first in the split's order; 0: all.")
    demo_valid_split: str = _setting("valid", "The split of the held-out demonstrations.")
    demo_valid_games: int = _setting(0, "How many of its games; 0: all.")
    lora_stages: tuple[str, ...] = _setting(
        ("sft", "ppo"),
        "With --lora_rank, the stages that train adapters, of sft,progress,ppo; "
        "the estimator (progress) has a frozen trunk otherwise.",
    )
    heldout_split: str = _setting("heldout", "The split that is evaluated in the end.")
    heldout_games: int = _setting(0, "How many of its games; 0: all.")
    eval_temperature: float = _setting(1.0, "Temperature of the evaluation; 0 is greedy.")
    generate_train: int = _setting(0, "Games to generate for demonstrations.")
    generate_valid: int = _setting(0, "Games to generate for held-out demonstrations.")
    generate_explore: int = _setting(0, "Games to generate for exploration, over all rounds.")
    generate_heldout: int = _setting(0, "Games to generate for the evaluation.")
    generate_seed: int = _setting(1, "Seed of the generator; each split gets its own after it.")
    task_types: str = _setting(
        "", "Task types to generate, comma-separated; empty: all. WebShop has none."
    )
    min_receptacles: int = _setting(4, "Fewest receptacles of a generated room (ALFWorld).")
    max_receptacles: int = _setting(8, "Most receptacles of a generated room (ALFWorld).")
    generate_products: int = _setting(
        0, "Products of the generated catalogue (WebShop); 0: four a task."
    )


def check(config: Any) -> None:
    """Refuses settings that contradict each other.

    Raises:
      UserError: names the flags.
    """
    if isinstance(config, SamplingConfig):
        if config.temperature == 0 and (config.top_k or config.top_p < 1):
            raise UserError(
                "--temperature=0 is greedy; it contradicts --top_k and --top_p: drop them, or "
                "give a temperature above 0"
            )
        if config.temperature < 0 or not 0 < config.top_p <= 1 or config.top_k < 0:
            raise UserError("--temperature and --top_k must be >= 0, --top_p in (0, 1]")
        if config.turn_deadline_s < 0 or "" in config.stop:
            raise UserError("--turn_deadline_s must be >= 0, and no text of --stop empty")
        if config.max_new_tokens >= config.context_length:
            raise UserError(
                f"--max_new_tokens={config.max_new_tokens} leaves no room for a prompt in "
                f"--context_length={config.context_length}"
            )
    if isinstance(config, RowsConfig) and config.policy_slots > config.row_length:
        raise UserError(
            f"--policy_slots={config.policy_slots} exceeds --row_length={config.row_length}"
        )
    if isinstance(config, RowsConfig) and not 0 < config.row_buckets <= config.row_length:
        raise UserError(f"--row_buckets={config.row_buckets} must be in 1 to --row_length")
    if isinstance(config, RowsConfig) and config.mesh and config.partition != "mesh":
        raise UserError(f"--mesh={config.mesh} needs --partition=mesh")
    if isinstance(config, ComputeConfig) and config.logits_chunk < 0:
        raise UserError(f"--logits_chunk={config.logits_chunk} must be >= 0")
    if isinstance(config, SftConfig | PpoConfig) and config.checkpoint_every < 0:
        name = "sft" if isinstance(config, SftConfig) else "ppo"
        raise UserError(f"--{name}_checkpoint_every={config.checkpoint_every} must be >= 0")
    if isinstance(config, SftConfig) and config.row_buckets < 0:
        raise UserError(f"--sft_row_buckets={config.row_buckets} must be >= 0")
    if isinstance(config, SftConfig) and not 0 <= config.ema < 1:
        raise UserError(f"--sft_ema={config.ema:g} must be at least 0 and below 1")
    if isinstance(config, PpoConfig):
        _check_objective(config)
    if isinstance(config, LoraConfig):
        if config.rank < 0 or config.alpha <= 0:
            raise UserError(
                f"--lora_rank={config.rank} must be >= 0, --lora_alpha={config.alpha:g} above 0"
            )
        _check_list("--lora_targets", config.targets, LORA_TARGETS)
    if isinstance(config, DistributedConfig):
        _check_processes(config)
    if isinstance(config, RunConfig):
        _check_list("--lora_stages", config.lora_stages, ("sft", "progress", "ppo"))


def _check_processes(config: DistributedConfig) -> None:
    """Refuses processes that could not find each other.

    Raises:
      UserError: names the flags.
    """
    host, _, port = config.coordinator_address.rpartition(":")
    count, index = config.num_processes, config.process_id
    given = (bool(config.coordinator_address), count != 0, index != -1)
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or --distributed alone where the processes find each other"
        )
    if config.by_hand and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator_address={config.coordinator_address}: write HOST:PORT")
    if config.by_hand and not (count > 0 and 0 <= index < count):
        raise UserError(
            f"--process_id={index} --num_processes={count}: processes are numbered from 0 to "
            "--num_processes - 1"
        )
    if config.connect_timeout_s < 1 or config.meet_timeout_s < 1:
        raise UserError("--connect_timeout_s and --meet_timeout_s must be at least 1")


def _check_objective(ppo: PpoConfig) -> None:
    """Refuses what an objective would not heed.

    Raises:
      UserError: names both flags, and says why.
    """
    name = ppo.objective
    refused = [
        (ppo.gae == "token" and name != "ppo", "--gae=token", "GAE needs a critic, ppo's alone"),
        (ppo.critic == "ridge" and name != "ppo", "--critic=ridge", "it has no critic"),
        (ppo.critic == "ridge" and ppo.gae == "token", "--critic=ridge", "it values steps"),
        (ppo.gae == "token" and ppo.step_baseline, "--gae=token", "--step_baseline compares steps"),
        (ppo.step_baseline and name in GROUP_OBJECTIVES + ("rft",), "--step_baseline",
         "rft has no advantage" if name == "rft" else "a task's rollouts are the baseline already"),
        (ppo.kl == "reward" and not ppo.kl_coef, "--kl=reward", "--ppo_kl_coef is 0"),
        (ppo.kl == "reward" and name == "grpo", "--kl=reward",
         "rewards are divided by their spread in a group, so a KL among them would weigh more the "
         "less they differ; --kl=loss is the paper's"),
        (bool(name == "rft" and (ppo.kl_coef or ppo.entropy_coef)), "--ppo_kl_coef or "
         "--ppo_entropy_coef", "rft minimises the negative log-likelihood alone"),
        (0 < ppo.truncate_ratio <= 1 + ppo.clip, f"--ppo_truncate_ratio={ppo.truncate_ratio:g}",
         f"it must exceed 1 + --ppo_clip={1 + ppo.clip:g}, where PPO clips anyway"),
        (bool(ppo.truncate_ratio and name == "rft"), "--ppo_truncate_ratio", "rft has no ratio"),
    ]  # fmt: skip
    for wrong, flag, why in refused:
        if wrong:
            raise UserError(f"{flag} with --objective={name}: {why}; drop one of them")


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
    if ppo.objective == "rft" and credit.credit != "spa":
        raise UserError(
            f"--credit={credit.credit} with --objective=rft: rft clones whole episodes, no step's "
            "credit enters; drop one of them"
        )


def fit_attention(compute: ComputeConfig, rows: RowsConfig) -> ComputeConfig:
    """Refuses rows that an attention kernel cannot take; `auto` takes xla for them.

    Raises:
      UserError: names the flags, and says why.
    """
    kernel, mesh = compute.attention, rows.partition == "mesh"
    if kernel == "auto" and mesh:
        return dataclasses.replace(compute, attention="xla")
    if kernel in ("native", "splash") and mesh:
        wrong = "--partition=mesh", "XLA cannot cut it over a mesh; give --partition=pmap"
    elif kernel == "splash" and rows.share_prefix:
        wrong = "--share_prefix", "it has no segment that all others see; give --noshare_prefix"
    elif kernel == "splash" and rows.row_length % 128:
        wrong = f"--row_length={rows.row_length}", "it takes tokens by 128; give a multiple"
    elif kernel == "splash" and rows.row_length % (128 * rows.row_buckets):
        wrong = "--row_buckets", "it takes tokens by 128; give fewer"
    else:
        return compute
    raise UserError(f"{wrong[0]} with --attention={kernel}: {wrong[1]}, or --attention=xla")


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


def _check_list(flag: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given or len(set(given)) < len(given):
        wrong = f"{unknown[0]!r} is none" if unknown else "name each at most once, at least one"
        raise UserError(f"{flag}={','.join(given)}: {wrong} of {','.join(known)}")
