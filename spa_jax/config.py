"""Where and how a run computes: environment, sampling, rows, numbers, adapters, processes.

The settings of the stages are in `stage_config.py`; `settings.py` says how one is written, and
`experiments/flags.py` derives the flags from both.
"""

import dataclasses
import datetime
import typing
from typing import Any, Literal

from spa_jax.errors import UserError
from spa_jax.settings import MAY, MUST, Checked, setting

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
LORA_TARGETS: tuple[Target, ...] = typing.get_args(Target)  # of a layer's matrices
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "attention", "layer"]


@dataclasses.dataclass(frozen=True)
class EnvConfig(Checked):
    """Which environment, and where its server is."""

    env: Literal["alfworld", "webshop", "virtualhome", "custom", "openenv"] = setting(
        "alfworld",
        "The environment. custom: a class of your own; openenv: any text environment that "
        "speaks OpenEnv, at --env_address.",
        group=MUST,
    )
    env_address: str = setting(
        "",
        "Address of an environment server that runs already, such as http://127.0.0.1:8000; "
        "empty: one is started on this machine and stopped at the end.",
        group=MUST,
        operational=True,
    )
    env_token_file: str = setting(
        "",
        "File of the token that the server at --env_address wants; empty: the environment "
        "variable SPA_JAX_ENV_TOKEN, if it is set.",
        operational=True,
    )
    env_wait_s: float = setting(
        120.0,
        "Seconds that a session waits for a server that is away or full.",
        minimum=0,
        operational=True,
    )
    alfworld_data: str = setting(
        "",
        "Folder of ALFWorld games: it holds SPLIT/GAME/game.tw-pddl.",
        group=MUST,
        operational=True,
    )
    webshop_data: str = setting(
        "",
        "Folder of a WebShop catalogue, or of a prepared store.",
        group=MUST,
        operational=True,
    )
    virtualhome_data: str = setting(
        "",
        "Folder of VirtualHome tasks: it holds SPLIT/TASK, or the authors' task files.",
        group=MUST,
        operational=True,
    )
    custom_data: str = setting(
        "",
        "MODULE:CLASS of an environment of your own (docs/environments.md).",
        group=MUST,
        operational=True,
    )
    openenv_tasks: int = setting(
        100,
        "Tasks of a split of an OpenEnv environment: each is a seed of its reset.",
        minimum=1,
    )
    openenv_mapping: str = setting(
        "",
        "JSON file that says what the fields of an OpenEnv environment mean: instruction, action, "
        "text, reward, reward_scale, reward_range, success, grounded (docs/environments.md); "
        "empty: what its schema says.",
    )
    openenv_reward_range: str = setting(
        "",
        "LOW,HIGH: what an OpenEnv environment pays at the least and at the most, such as -1,1 "
        "where a loss pays -1, a draw 0 and a win 1; R is mapped onto [0, 1]. Empty: it is not.",
    )
    openenv_reward_scale: float = setting(
        0.0,
        "Brings R of an OpenEnv episode into [0, 1]: it is multiplied by this, and what is below 0 "
        "counts as 0; 0: as the mapping says, else not multiplied.",
        minimum=0,
    )
    openenv_success: str = setting(
        "",
        "The flag of an OpenEnv observation that says that the task is solved (!NAME: its "
        "opposite); empty: what the mapping or the schema says, else that R is 1.",
    )
    long_openings: Literal["leave_out", "error"] = setting(
        "leave_out",
        "A task whose opening does not fit into --context_length. leave_out: it is not played, "
        "named, and counted beside the failed games; error: the stage ends.",
        operational=True,
    )
    prompt: Literal["short", "paper"] = setting(
        "short", "The instruction that opens an episode: ours, or the paper's.", group=MAY
    )
    max_steps: int = setting(
        40, "Environment steps that an episode may take.", minimum=1, group=MAY
    )
    give_up_after: int = setting(
        0,
        "An episode fails after this many actions in a row that the environment could not "
        "execute; 0: never.",
        minimum=0,
    )
    max_retries: int = setting(
        3,
        "How often an episode is tried again after an error of the environment.",
        minimum=0,
        operational=True,
    )
    max_failed_share: float = setting(
        0.2,
        "A stage ends with an error if the environment failed more than this share of episodes.",
        minimum=0,
        maximum=1,
        operational=True,
    )

    @property
    def data(self) -> str:
        """The data of the environment, the flag --<env>_data; empty where a server has it."""
        return getattr(self, f"{self.env}_data", "")


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Checked):
    """How the policy writes."""

    temperature: float = setting(
        1.0, "The policy is softmax(logits / temperature); 0 is greedy.", minimum=0, group=MAY
    )
    top_k: int = setting(
        0, "Sample among this many of the likeliest tokens; 0: among all.", minimum=0
    )
    top_p: float = setting(
        1.0,
        "Sample from the smallest set of tokens of this probability; 1: from all.",
        above=0,
        maximum=1,
    )
    max_new_tokens: int = setting(
        32, "Tokens that the policy may write in a turn.", minimum=1, group=MAY
    )
    stop: tuple[str, ...] = setting(
        (),
        "Texts that end a turn, comma-separated (with quotes around one that has a comma; \\n "
        "is a line break); the action is read from what stands before them.",
    )
    turn_deadline_s: float = setting(
        0.0,
        "Seconds that the policy may take for a turn; a longer one ends the episode. 0: any time.",
        minimum=0,
    )
    slots: int = setting(
        16,
        "Episodes that are played at once on each device: 16 on a machine of 8 are 128. With "
        "--sampling_tensor on each group of devices.",
        minimum=1,
        group=MAY,
        operational=True,
    )
    context_length: int = setting(
        1024, "Tokens that a whole episode may have.", minimum=2, group=MAY
    )
    cache_dtype: Literal["", "bfloat16", "float32"] = setting(
        "",
        "Numbers of the keys and values that are kept of every token. bfloat16 takes half of "
        "float32's memory and rounds them; native attention does not read it, and xla's is "
        "computed then. Empty: those of the weights (--compute_dtype).",
    )

    sampling_tensor: int = setting(
        1,
        "Devices of a host that share each weight and the cache where the policy writes, for a "
        "model that one cannot hold; it divides the key/value heads. They compute attention as "
        "--attention=xla.",
        minimum=1,
        operational=True,
    )

    def check(self) -> None:
        """Refuses greedy sampling of a cut distribution, and turns that leave no room."""
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError(
                "--temperature=0 is greedy; it contradicts --top_k and --top_p: drop them, or "
                "give a temperature above 0"
            )
        if "" in self.stop:
            raise UserError("--stop: one of the texts is empty; name texts that end a turn")
        if self.max_new_tokens >= self.context_length:
            raise UserError(
                f"--max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"--context_length={self.context_length}; give fewer, or a longer context"
            )


@dataclasses.dataclass(frozen=True)
class ChatConfig(Checked):
    """How a conversation becomes tokens."""

    chat_format: Literal["template", "chatml", "llama3"] = setting(
        "template",
        "How a conversation becomes tokens. template: by the tokenizer's own chat template; "
        "chatml, llama3: in a built-in format, for templates that change earlier turns. A policy "
        "remembers what it was trained in.",
    )
    chat_date: str = setting(
        "",
        "The day that a chat template which writes today's is always told it is, such as "
        "2024-07-26; empty: such a template is refused.",
    )

    def check(self) -> None:
        """Refuses what is no day."""
        try:
            datetime.date.fromisoformat(self.chat_date or "2024-07-26")
        except ValueError as error:
            raise UserError(
                f"--chat_date={self.chat_date}: write a day such as 2024-07-26"
            ) from error

    @property
    def name(self) -> str:
        """The format and the day, as `chat.ChatFormat.from_tokenizer` takes them."""
        return f"{self.chat_format}@{self.chat_date}" if self.chat_date else self.chat_format


@dataclasses.dataclass(frozen=True)
class RowsConfig(Checked):
    """The static shape of a training batch, and the devices that share it."""

    row_length: int = setting(
        1024,
        "Tokens that a packed row of training data holds; every episode must fit into one.",
        minimum=1,
        group=MAY,
        operational=True,
    )
    policy_slots: int = setting(
        384,
        "Tokens written by the policy that a packed row holds.",
        minimum=1,
        group=MAY,
        operational=True,
    )
    step_slots: int = setting(
        64,
        "Environment steps that a packed row holds.",
        minimum=1,
        group=MAY,
        operational=True,
    )
    rows_per_device: int = setting(
        2,
        "Rows that a device computes at once (a microbatch): fewer need less memory.",
        minimum=1,
        group=MAY,
        operational=True,
    )
    row_buckets: int = setting(
        1,
        "An update's microbatches are cut to one of this many lengths, evenly spaced up to "
        "--row_length, their policy slots too. More lengths leave less padding; each is compiled.",
        minimum=1,
        operational=True,
    )
    share_prefix: bool = setting(
        True,
        "What all episodes of a batch begin with is computed once a row.",
        operational=True,
    )
    partition: Literal["pmap", "mesh"] = setting(
        "pmap",
        "How the devices share an update of SFT or of the policy. pmap: each holds all "
        "parameters; mesh: parameters are cut over --mesh. A single device needs neither.",
        operational=True,
    )
    mesh: str = setting(
        "",
        "data:A,fsdp:B,tensor:C with --partition=mesh: A x B devices share a batch, B x C of them "
        "each parameter, and C the work on a row; an axis that is not named is 1, and one of them "
        "may be *, all that are left. Empty: all devices share the batch, and each holds whole "
        "parameters.",
        operational=True,
    )

    max_skipped_share: float = setting(
        0.1,
        "An update is skipped if its gradients are not finite; more than this share ends a stage.",
        minimum=0,
        maximum=1,
        operational=True,
    )

    def check(self) -> None:
        """Refuses rows that cannot hold what they should, and a mesh that nothing would use."""
        if self.policy_slots > self.row_length:
            slots, length = self.policy_slots, self.row_length
            raise UserError(f"--policy_slots={slots} exceeds --row_length={length}; give fewer")
        if self.row_buckets > self.row_length:
            raise UserError(f"--row_buckets={self.row_buckets} must be in 1 to --row_length")
        if self.mesh and self.partition != "mesh":
            raise UserError(f"--mesh={self.mesh} needs --partition=mesh")

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
class DistributedConfig(Checked):
    """The processes that share a run (docs/pod.md)."""

    distributed: bool = setting(
        False,
        "This is one of several processes that share a run, and they find each other on a Cloud "
        "TPU slice, under Slurm or Open MPI; elsewhere give the three flags below instead.",
    )
    coordinator_address: str = setting("", "HOST:PORT of process 0, the same in all processes.")
    num_processes: int = setting(0, "How many processes share the run.")
    process_id: int = setting(-1, "Which of the processes this is, from 0.")
    connect_timeout_s: int = setting(
        300, "Seconds that the processes wait for each other at the start.", minimum=1
    )
    meet_timeout_s: int = setting(
        7200,
        "Seconds that a process waits for the others at the end of a stage: longer than one may "
        "play behind another.",
        minimum=1,
    )

    @property
    def by_hand(self) -> bool:
        """Whether the three flags say who the processes are."""
        return bool(self.coordinator_address)

    def check(self) -> None:
        """Refuses processes that could not find each other."""
        host, _, port = self.coordinator_address.rpartition(":")
        count, index = self.num_processes, self.process_id
        given = (bool(self.coordinator_address), count != 0, index != -1)
        if any(given) and not all(given):
            raise UserError(
                "--coordinator_address, --num_processes and --process_id belong together: give "
                "all three, or --distributed alone where the processes find each other"
            )
        if self.by_hand and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--coordinator_address={self.coordinator_address}: write HOST:PORT")
        if self.by_hand and not (count > 0 and 0 <= index < count):
            raise UserError(
                f"--process_id={index} --num_processes={count}: processes are numbered from 0 to "
                "--num_processes - 1"
            )


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Checked):
    """How a model is computed: in which numbers, what is kept, by which attention.

    Log-probabilities, losses, the heads and the optimiser's moments are float32 whatever is set.
    """

    param_dtype: Dtype = setting(
        "float32",
        "Numbers of the weights that are trained. bfloat16 halves them; a change smaller than "
        "1/256 of a weight is then lost.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Numbers of products, activations and frozen weights. auto: bfloat16 on an accelerator, "
        "float32 on a CPU.",
        group=MAY,
    )
    matmul_dtype: Literal["compute", "bfloat16", "auto"] = setting(
        "compute",
        "Numbers that are multiplied with a layer's weights; sums stay in --compute_dtype. "
        "compute: that too. auto: bfloat16 on a CPU that multiplies it faster (AMX or "
        "AVX512-BF16), as a TPU does with float32 anyway.",
    )
    remat: Remat = setting(
        "dots",
        "What a layer keeps for the backward pass; the rest is computed again. none: all is kept; "
        "dots: products with weights, and attention (half of the memory, in no more time); "
        "attention: that alone; layer: only what the layer started from.",
        operational=True,
    )
    attention: Literal["auto", "xla", "native", "cudnn", "splash"] = setting(
        "auto",
        "Which attention is computed. xla: in blocks, everywhere; native: compiled for this CPU, "
        "in float32, in training and sampling; cudnn: its fused kernel, on NVIDIA GPUs, in "
        "training; splash: a Pallas kernel, on TPUs, in training. auto: native where it can be, "
        "and xla elsewhere.",
        operational=True,
    )
    logits_chunk: int = setting(
        1024,
        "Tokens whose logits over the vocabulary a device holds at once; the rest are computed "
        "in turn, and again in the backward pass. 0: all at once.",
        minimum=0,
        operational=True,
    )

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
class LoraConfig(Checked):
    """Low-rank adapters in place of the policy's own weights (`models/lora.py`)."""

    rank: int = setting(
        0,
        "Train low-rank adapters (LoRA) of this rank, and no weight of the model; 0: train the "
        "weights themselves.",
        flag="lora_rank",
        minimum=0,
        group=MAY,
    )
    alpha: float = setting(
        16.0, "An adapter's product is scaled by this / --lora_rank.", flag="lora_alpha", above=0
    )
    targets: tuple[Target, ...] = setting(
        ("q", "v"),
        f"The matrices of a layer that get an adapter, of {','.join(LORA_TARGETS)}.",
        flag="lora_targets",
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def fit_attention(compute: ComputeConfig, rows: RowsConfig) -> ComputeConfig:
    """Refuses rows that an attention kernel cannot take; `auto` takes xla for them.

    Raises:
      UserError: names the flags, and says why.
    """
    kernel, cut = compute.attention, rows.partition == "mesh" and "tensor" in rows.mesh
    if kernel == "auto" and cut:
        return dataclasses.replace(compute, attention="xla")
    if kernel in ("native", "splash") and cut:
        wrong = f"--mesh={rows.mesh}", "XLA cannot cut it over tensor; leave that axis out"
    elif kernel == "splash" and rows.share_prefix:
        wrong = "--share_prefix", "it has no segment that all others see; give --noshare_prefix"
    elif kernel == "splash" and rows.row_length % 128:
        wrong = f"--row_length={rows.row_length}", "it takes tokens by 128; give a multiple"
    elif kernel == "splash" and rows.row_length % (128 * rows.row_buckets):
        wrong = "--row_buckets", "it takes tokens by 128; give fewer"
    else:
        return compute
    raise UserError(f"{wrong[0]} with --attention={kernel}: {wrong[1]}, or --attention=xla")
