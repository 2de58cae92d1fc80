"""What the stage binaries share: an environment, a policy, a stage's folder."""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import mmap
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import tqdm
from absl import logging

from experiments import flags as flags_lib
from spa_jax import batching, pretrained, rollout, store, tokenizer
from spa_jax.chat import TEMPLATE, TEMPLATES, ChatFormat
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ComputeConfig,
    DistributedConfig,
    EnvConfig,
    LoraConfig,
    RowsConfig,
    SamplingConfig,
    ServerConfig,
)
from spa_jax.envs.client import EnvClient
from spa_jax.envs.guard import read_token
from spa_jax.envs.local import LocalServer
from spa_jax.envs.openenv import OPENENV, OpenEnvClient
from spa_jax.errors import UserError
from spa_jax.models import fused, native, transformer, weights
from spa_jax.models import lora as lora_lib
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.sampling.engine import Engine
from spa_jax.sampling.parallel import ParallelEngine
from spa_jax.training import distributed, preemption
from spa_jax.training import parts as parts_lib
from spa_jax.training.metrics import MetricsWriter
from spa_jax.training.parts import Parts
from spa_jax.trajectory import Sampling, Status, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXPERT = "expert"
ADAPTER = "adapter"  # a policy's own adapter, in its folder
ABOUT = "spa_jax.json"  # beside a policy's weights: what they do not say
POLICY_HELP = (
    "The pretrained policy: a Hugging Face folder, a GGUF file, or ORGANISATION/MODEL of the hub."
)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_HUGE_PAGE = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy read from its folder.

    Attributes:
      folder: which was given.
      model: the folder of its config.json and tokenizer: `folder`, or an adapter's base.
      config: the model's shape.
      params: the weights, an adapter's merged.
      heads: "value", "progress": those that lie beside the weights.
      tokenizer: the tokenizer.
      chat_format: the name of its conversations' format, as in `config.ChatConfig`.
      version: the updates that made it.
      trunk: the policy whose hidden states its progress head reads; "": this one.
    """

    folder: pathlib.Path
    model: pathlib.Path
    config: ModelConfig
    params: Params
    heads: dict[str, Params]
    tokenizer: "PreTrainedTokenizerFast"
    chat_format: str
    version: int
    trunk: str = ""

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """The format; a stage that neither writes nor reads conversations needs none."""
        return ChatFormat.from_tokenizer(self.tokenizer, self.chat_format)


def load_policy(
    policy: str | os.PathLike[str],
    chat_format: str = TEMPLATE,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> Policy:
    """Reads a Hugging Face folder, or a PEFT adapter's, with the heads beside it if there are any.

    Args:
      policy: the folder; or a GGUF file or a model of the hub, as `pretrained.resolve` takes it.
      chat_format: the format of a policy that was not trained here; ours remember theirs.
      compute: how its model is computed.

    Raises:
      UserError: the folder lacks something, its tokenizer has more ids than the embedding, it was
        trained in another chat format, or the attention asked for does not run here.
    """
    path = pretrained.resolve(policy)
    about = _about(path)
    noted = {"version": about.get("version", 0), "trunk": about.get("progress_trunk", "")}
    if weights.is_adapter(path):
        trained_in = about.get("chat_format", chat_format)
        base = load_policy(weights.adapter_base(path), trained_in, compute)
        lora, adapter = weights.load_adapter(path, base.config)
        params = jax.device_get(lora_lib.merge(lora, base.params, adapter))
        return dataclasses.replace(
            base, folder=path, params=params, heads=weights.load_heads(path), **noted
        )
    config, params = weights.load_pretrained(path)
    backend, trained_in = _conversations(path, chat_format)
    largest = max(backend.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path / 'tokenizer.json'}: ids up to {largest}, but {path / 'config.json'} and "
            f"tensor model.embed_tokens.weight have vocab_size {config.vocab_size}: they belong "
            "to different models"
        )
    heads = weights.load_heads(path)
    config = computed(config, compute)
    return Policy(path, path, config, params, heads, backend, trained_in, **noted)


def computed(config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE) -> ModelConfig:
    """The model as it is computed on this machine.

    Raises:
      UserError: the attention asked for does not run here.
    """
    platform = jax.default_backend()
    compute = compute.resolved(platform)
    kind = (compute.compute_dtype, config.head_dim, platform)
    if compute.attention == "auto":
        attention = "native" if native.runs(*kind) else "xla"
        compute = dataclasses.replace(compute, attention=attention)
    elif compute.attention == "native":
        native.check(*kind)
    else:
        fused.check(compute.attention, *kind)
    if compute.matmul_dtype == "auto":
        matmul_dtype = "bfloat16" if native.multiplies_bfloat16() else "compute"
        compute = dataclasses.replace(compute, matmul_dtype=matmul_dtype)
    return dataclasses.replace(config, compute=compute)


def check_chat_format(policy: str | os.PathLike[str], chat_format: str) -> None:
    """Refuses a policy that has no chat format, before anything is done with it.

    Raises:
      UserError: as `load_policy` and `Policy.chat` do; the weights are not read.
    """
    ChatFormat.from_tokenizer(*_conversations(pretrained.resolve(policy), chat_format))


def _conversations(path: pathlib.Path, chat_format: str) -> tuple["PreTrainedTokenizerFast", str]:
    """The tokenizer of a folder, and the name of its conversations' format."""
    trained_in = _about(path).get("chat_format", chat_format)
    if chat_format not in (TEMPLATE, trained_in):
        raise UserError(
            f"--chat_format={chat_format}: the policy was trained with {trained_in}, says "
            f"{path / ABOUT}; leave the flag out"
        )
    return tokenizer.load(path), trained_in


def _about(path: pathlib.Path) -> dict[str, Any]:
    """What we noted of a policy of ours; {} for others."""
    file = path / ABOUT
    return json.loads(file.read_text()) if file.exists() else {}


def record_chat_format(folder: pathlib.Path, policy: Policy) -> None:
    """Writes the chat format of a folder's episodes beside them.

    Raises:
      UserError: the episodes that are there were played in another one.
    """
    if not distributed.is_first():
        return
    path = folder / "chat.json"
    ours = {"chat_format": policy.chat_format, "end_of_turn": policy.chat.end_of_turn}
    if path.exists() and any(folder.glob("trajectories*.jsonl")):
        theirs = json.loads(path.read_text())
        if theirs != ours:
            raise UserError(
                f"{path}: the episodes there are in the chat format {theirs['chat_format']}, the "
                f"policy's is {policy.chat_format}; give that --chat_format, or another folder"
            )
    write_json(path, ours)


def recorded_chat_format(folder: pathlib.Path) -> str:
    """The chat format of a folder's episodes; the template's own if none is recorded."""
    path = folder / "chat.json"
    return json.loads(path.read_text())["chat_format"] if path.exists() else TEMPLATE


def check_lengths(
    policy: Policy, trajectories: Sequence[Trajectory], source: object, rows: RowsConfig
) -> None:
    """Refuses episodes that the model cannot attend over or that fit no row, before any work.

    `source` is their file.
    """
    for t in trajectories:
        what = f"{source}: task {t.task!r} (seed {t.seed}, attempt {t.attempt})"
        transformer.check_length(policy.config, len(t.token_ids), what)
    batching.check_fit(
        trajectories, row_length=rows.row_length, policy_slots=rows.policy_slots,
        step_slots=rows.step_slots,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What a stage trains of a policy.

    Attributes:
      policy: that it starts from.
      parts: what is trained and what is not.
      base: the folder of the frozen weights, for adapters.
    """

    policy: Policy
    parts: Parts
    base: pathlib.Path

    def save(
        self, folder: pathlib.Path, trained: Params, heads: dict[str, Params], version: int
    ) -> None:
        """Writes a policy that `load_policy` reads; an adapter is merged, and lies beside it.

        Of several processes the first writes.

        Args:
          folder: where to.
          trained: the trained part, on the host.
          heads: to lie beside the weights.
          version: the updates that made it.
        """
        if not distributed.is_first():
            return
        config, model = self.policy.config, self.policy.model
        template = TEMPLATES.get(self.policy.chat_format)
        weights.save_pretrained(folder, config, self.parts.whole(trained), model, template)
        if heads:
            weights.save_heads(folder, heads)
        if self.parts.lora.rank:
            save_adapter(folder / ADAPTER, self.parts.lora, trained["adapter"], self.base)
        about = {"version": version, "chat_format": self.policy.chat_format}
        write_json(folder / ABOUT, about)


def trainable(
    policy: Policy,
    train_layers: int,
    lora: LoraConfig,
    seed: int,
    reference: pathlib.Path | None = None,
) -> Trainable:
    """What a stage trains of a policy: all of it, its top layers or adapters.

    A new adapter begins on the policy's weights.  The adapter of an earlier round goes on
    instead where it is one on the reference policy: the reference is then the policy with the
    adapter off in every round, and the rank stays.

    Args:
      policy: that the stage starts from.
      train_layers: as in `transformer.split`.
      lora: the adapters; rank 0: none.
      seed: of a new adapter.
      reference: the folder of the policy that must not be strayed from, if there is one.
    """
    if not lora.rank:
        parts = parts_lib.split(policy.config, policy.params, train_layers)
        return Trainable(policy, parts, policy.folder)
    adapter = _own_adapter(policy, lora, reference) if reference else None
    if reference and adapter is not None:
        base = load_policy(reference).params
        return Trainable(policy, parts_lib.adapt(lora, base, adapter), reference)
    adapter = jax.device_get(lora_lib.init(lora, policy.params, jax.random.key(seed)))
    return Trainable(policy, parts_lib.adapt(lora, policy.params, adapter), policy.folder)


def _own_adapter(policy: Policy, lora: LoraConfig, base: pathlib.Path) -> Params | None:
    """The policy's adapter, if it is one of this shape on `base`."""
    folder = policy.folder / ADAPTER
    if not weights.is_adapter(folder):
        return None
    try:
        if weights.adapter_base(folder) != base.resolve():
            return None
    except UserError:  # the base is not here any more; the policy's own weights are merged
        return None
    found, adapter = weights.load_adapter(folder, policy.config)
    same = (found.rank, found.alpha) == (lora.rank, lora.alpha)
    return adapter if same and set(found.targets) == set(lora.targets) else None


def save_adapter(
    folder: pathlib.Path, lora: LoraConfig, adapter: Params, base: pathlib.Path
) -> None:
    """Writes an adapter that names its base relative to itself: a run's folder can be moved."""
    relative = os.path.relpath(base.resolve(), folder.resolve())
    weights.save_adapter(folder, lora, adapter, relative)


def make_engine(
    policy: Policy, sampling: SamplingConfig, slots: int, seed: int
) -> Engine | ParallelEngine:
    """The generation engine of a policy: one on each local device, as far as there are slots."""
    transformer.check_length(policy.config, sampling.context_length, "--context_length")
    drawn = Sampling(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens,
        tuple(stop.replace("\\n", "\n") for stop in sampling.stop),
    )  # fmt: skip
    ends = (policy.chat.end_of_turn, *_other_ends(policy))

    def make(slots: int, device: jax.Device) -> Engine:
        return Engine(
            policy.config, policy.params, slots=slots, context_length=sampling.context_length,
            sampling=drawn, end_of_turn=ends, seed=seed, text=policy.chat.decode,
            turn_deadline_s=sampling.turn_deadline_s, device=device,
        )  # fmt: skip

    devices = jax.local_devices()[:slots]
    return make(slots, devices[0]) if len(devices) == 1 else ParallelEngine(make, slots, devices)


def _other_ends(policy: Policy) -> list[int]:
    """The ids that end a turn beside the chat format's, by the model's generation_config.json."""
    path = policy.model / "generation_config.json"
    given = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    ids = given if isinstance(given, list) else [given]
    return [i for i in ids if isinstance(i, int) and i != policy.chat.end_of_turn]


@contextlib.contextmanager
def open_env(env: EnvConfig, sessions: int, log: pathlib.Path) -> Iterator[EnvClient]:
    """A client of --env_address, or of a server of our own that ends with the block."""
    if env.env_address or env.env == OPENENV:
        client = _client_of(env)
        client.health()
        yield client
        return
    if not env.data:
        give = (
            "MODULE:CLASS of your environment"
            if env.env == "custom"
            else "the folder of the environment's data (make some with python -m "
            f"spa_jax.envs.{env.env}.generate)"
        )
        raise UserError(
            f"--{env.env}_data is not set: give {give}, or --env_address of a running server"
        )
    config = ServerConfig(data_dir=env.data, prompt=env.prompt, max_sessions=sessions, env=env.env)
    with LocalServer(config, _own(log)) as server:
        yield EnvClient(server.address, wait_s=env.env_wait_s)


def _client_of(env: EnvConfig) -> EnvClient:
    """A client of the server at --env_address."""
    if not env.env_address:
        raise UserError("--env=openenv needs --env_address: where does the environment run?")
    token = read_token(env.env_token_file, "--env_token_file")
    if env.env == OPENENV:
        return OpenEnvClient(env.env_address, env, wait_s=env.env_wait_s, token=token)
    return EnvClient(env.env_address, wait_s=env.env_wait_s, token=token)


def play_jobs(
    client: EnvClient,
    jobs: Sequence[rollout.Job],
    folder: pathlib.Path,
    env: EnvConfig,
    policy: Policy | None,
    make_engine: Callable[[], Engine | ParallelEngine],
    title: str,
) -> None:
    """Plays the jobs that `folder` does not hold yet; each episode is on disk when it ends.

    Args:
      client: the environments.
      jobs: this process's episodes of the stage.
      folder: gets trajectories.jsonl and failures.jsonl, of several processes one each, and
        metrics.jsonl of where the time of the first went, by the number of its episodes.
      env: the environment's settings.
      policy: the policy; None for the expert.
      make_engine: makes the policy's engine, if there is anything left to play.
      title: of the progress bar.
    """
    distributed.first_alone(f"{title}: earlier episodes", lambda: store.merge(_episodes(folder)))
    done = store.keys(_episodes(folder))
    path, failures = _own(_episodes(folder)), _own(folder / "failures.jsonl")
    todo = [job for job in jobs if job.key not in done]
    bar = tqdm.tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, unit="episode")
    wins, played = 0, 0
    engine = None if policy is None or not todo else make_engine()
    if engine is not None:
        engine.warm_up()
    started = time.time()

    def on_done(trajectory: Trajectory) -> None:
        nonlocal wins, played
        if trajectory.status is Status.ENV_ERROR:
            store.append(failures, trajectory)
            return
        store.append(path, trajectory)
        wins, played = wins + trajectory.success, played + 1
        shown = {"success": f"{wins / played:.2f}"}
        if engine is not None:
            rate = engine.usage.generated / (time.time() - started)
            shown |= {"tokens/s": f"{rate:.0f}", "occupancy": f"{engine.usage.occupancy:.0%}"}
        bar.set_postfix(shown, refresh=False)
        bar.update()

    name = EXPERT if policy is None else str(policy.folder)
    version = policy.version if policy else 0
    player = rollout.Player(
        env=env.env,
        policy=name,
        version=version,
        max_steps=env.max_steps,
        prompt=env.prompt,
        max_retries=env.max_retries,
        give_up_after=env.give_up_after,
    )
    with bar:
        if policy is None:
            rollout.play_expert(client, todo, player=player, on_done=on_done)
        elif engine is not None:
            playing = rollout.Rollout(engine, policy.chat, client, player=player, on_done=on_done)
            timing = playing.play(todo)
            with MetricsWriter(folder, enabled=distributed.is_first()) as writer:
                writer.write(len(done) + played, timing.metrics() | {"compiled": engine.compiled})
            if said := timing.bottleneck():
                bar.write(said)


def read_played(folder: pathlib.Path, jobs: Sequence[rollout.Job], title: str) -> list[Trajectory]:
    """The episodes of all processes' jobs, sorted by key, once every process has played its own.

    Args:
      folder: of `play_jobs`.
      jobs: all episodes of the stage.
      title: of the stage.
    """
    path = _episodes(folder)
    distributed.meet(f"{title}: the episodes")
    distributed.first_alone(f"{title}: all episodes", lambda: store.merge(path))
    wanted = {job.key for job in jobs}
    return [t for t in (store.read(path) if path.exists() else []) if t.key in wanted]


def _episodes(folder: pathlib.Path) -> pathlib.Path:
    return folder / "trajectories.jsonl"


def _own(path: pathlib.Path) -> pathlib.Path:
    """The file that this process writes in place of one that a single process would."""
    return store.shard(path, distributed.index()) if distributed.count() > 1 else path


def agree_on(trajectories: Sequence[Trajectory], source: object) -> None:
    """Makes sure that all processes read the same episodes, and so make the same updates.

    Raises:
      UserError: if they do not.
    """
    if distributed.count() == 1:
        return
    digest = hashlib.sha256()
    for t in trajectories:
        digest.update(repr((t.key, t.token_ids, [step.reward for step in t.steps])).encode())
    distributed.agree(f"episodes in {source}", digest.hexdigest())


def is_done(folder: pathlib.Path, title: str) -> bool:
    """Whether the stage of this folder has ended; says so."""
    marker = folder / "done.json"
    done = distributed.told(f"{title}: done", marker.exists)
    if done:
        print(f"{title}: already done ({marker})", flush=True)
    return done


def mark_done(folder: pathlib.Path, started: float, **results: Any) -> None:
    """Marks the stage of this folder as ended; every process ends it here."""
    seconds = round(time.time() - started, 1)
    write_json(folder / "done.json", {"seconds": seconds, **results})
    distributed.meet(f"{folder}: done")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file under a temporary name, then renames it.

    Of several processes the first does.
    """
    if not distributed.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def keep_freed_memory() -> None:
    """Lets glibc keep what XLA frees on a CPU, instead of giving it back to the system.

    A training step allocates gigabytes of temporaries; fetched from the system each time,
    they cost a page fault every 4 KiB: a fifth of an SFT update on two cores, nothing with
    this.  One arena, because those of threads give back whatever they free; so it must be
    called before JAX starts its threads.  Pages of 2 MiB, where the system gives them to those
    who ask, took another tenth to seventh off.  Does nothing where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # becomes the largest size_t: never
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
    # The heap grows once, here, by addresses alone, and its pages will be huge ones.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    libc.malloc.restype = ctypes.c_void_p
    heap = libc.malloc(ctypes.c_size_t(size))
    if heap:
        start = -(-heap // _HUGE_PAGE) * _HUGE_PAGE
        length = ctypes.c_size_t(heap + size - start)
        libc.madvise(ctypes.c_void_p(start), length, mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))


def prepare_jax() -> None:
    """Settings of every binary that computes: a compilation cache, and memory that is kept."""
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators are absent
    keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "spa_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def stage(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    """A stage's `main`, with JAX prepared, the other processes joined, and SIGTERM heeded."""

    def run(argv: Sequence[str]) -> None:
        prepare_jax()
        distributed.initialize(flags_lib.read(DistributedConfig))
        with distributed.ending_together(), preemption.handled():
            distributed.check_devices()
            main(argv)

    return run
