"""What the stage binaries share: an environment, a policy, a stage's folder."""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import tqdm
from absl import logging

from spa_jax import pretrained, rollout, store, tokenizer
from spa_jax.chat import TEMPLATE, TEMPLATES, ChatFormat
from spa_jax.config import EnvConfig, SamplingConfig
from spa_jax.envs.client import EnvClient
from spa_jax.envs.server import LocalServer, ServerConfig
from spa_jax.errors import UserError
from spa_jax.models import transformer, weights
from spa_jax.models.transformer import ModelConfig, Params
from spa_jax.sampling.engine import Engine
from spa_jax.trajectory import Sampling, Status, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXPERT = "expert"
POLICY_HELP = (
    "The pretrained policy: a Hugging Face folder, a GGUF file, or ORGANISATION/MODEL of the hub."
)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy read from its folder.

    Attributes:
      chat_format: the name of its conversations' format, as in `config.ChatConfig`.
    """

    folder: pathlib.Path
    config: ModelConfig
    params: Params
    heads: dict[str, Params]
    tokenizer: "PreTrainedTokenizerFast"
    chat_format: str
    version: int

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """The format; a stage that neither writes nor reads conversations needs none."""
        return ChatFormat.from_tokenizer(self.tokenizer, self.chat_format)


def load_policy(policy: str | os.PathLike[str], chat_format: str = TEMPLATE) -> Policy:
    """Reads a Hugging Face folder, with the heads beside it if there are any.

    Args:
      policy: the folder; or a GGUF file or a model of the hub, as `pretrained.resolve` takes it.
      chat_format: the format of a policy that was not trained here; ours remember theirs.

    Raises:
      UserError: the folder lacks something, its tokenizer has more ids than the embedding, or it
        was trained in another chat format.
    """
    path = pretrained.resolve(policy)
    config, params = weights.load_pretrained(path)
    backend, trained_in = _conversations(path, chat_format)
    largest = max(backend.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path / 'tokenizer.json'}: ids up to {largest}, but {path / 'config.json'} and "
            f"tensor model.embed_tokens.weight have vocab_size {config.vocab_size}: they belong "
            "to different models"
        )
    heads, version = weights.load_heads(path), _about(path).get("version", 0)
    return Policy(path, config, params, heads, backend, trained_in, version)


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
            f"{path / 'spa_jax.json'}; leave the flag out"
        )
    return tokenizer.load(path), trained_in


def _about(path: pathlib.Path) -> dict[str, Any]:
    """What we noted of a policy of ours; {} for others."""
    file = path / "spa_jax.json"
    return json.loads(file.read_text()) if file.exists() else {}


def record_chat_format(folder: pathlib.Path, policy: Policy) -> None:
    """Writes the chat format of a folder's episodes beside them.

    Raises:
      UserError: the episodes that are there were played in another one.
    """
    path = folder / "chat.json"
    ours = {"chat_format": policy.chat_format, "end_of_turn": policy.chat.end_of_turn}
    if path.exists() and (folder / "trajectories.jsonl").exists():
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


def check_lengths(policy: Policy, trajectories: Sequence[Trajectory], source: object) -> None:
    """Refuses episodes that are longer than the model can attend over; `source` is their file."""
    for t in trajectories:
        what = f"{source}: task {t.task!r} (seed {t.seed}, attempt {t.attempt})"
        transformer.check_length(policy.config, len(t.token_ids), what)


def save_policy(
    folder: pathlib.Path, policy: Policy, params: Params, heads: dict[str, Params], version: int
) -> None:
    """Writes a policy that `load_policy` reads; its tokenizer is that of `policy`."""
    template = TEMPLATES.get(policy.chat_format)
    weights.save_pretrained(folder, policy.config, params, policy.folder, template)
    if heads:
        weights.save_heads(folder, heads)
    write_json(folder / "spa_jax.json", {"version": version, "chat_format": policy.chat_format})


def make_engine(policy: Policy, sampling: SamplingConfig, slots: int, seed: int) -> Engine:
    """The generation engine of a policy."""
    transformer.check_length(policy.config, sampling.context_length, "--context_length")
    return Engine(
        policy.config,
        policy.params,
        slots=slots,
        context_length=sampling.context_length,
        sampling=Sampling(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens
        ),
        end_of_turn=policy.chat.end_of_turn,
        seed=seed,
    )


@contextlib.contextmanager
def open_env(env: EnvConfig, sessions: int, log: pathlib.Path) -> Iterator[EnvClient]:
    """A client of --env_address, or of a server of our own that ends with the block."""
    if env.env_address:
        client = EnvClient(env.env_address)
        client.health()
        yield client
        return
    if not env.data:
        raise UserError(
            f"--{env.env}_data is not set: give the folder of the environment's data (make some "
            f"with python -m spa_jax.envs.{env.env}.generate), or --env_address of a running server"
        )
    config = ServerConfig(data_dir=env.data, prompt=env.prompt, max_sessions=sessions, env=env.env)
    with LocalServer(config, log) as server:
        yield EnvClient(server.address)


def play_jobs(
    client: EnvClient,
    jobs: Sequence[rollout.Job],
    folder: pathlib.Path,
    env: EnvConfig,
    policy: Policy | None,
    make_engine: Callable[[], Engine],
    title: str,
) -> list[Trajectory]:
    """Plays the jobs that `folder` does not hold yet; each episode is on disk when it ends.

    Args:
      client: the environments.
      jobs: all episodes of the stage.
      folder: gets trajectories.jsonl and failures.jsonl.
      env: the environment's settings.
      policy: the policy; None for the expert.
      make_engine: makes the policy's engine, if there is anything left to play.
      title: of the progress bar.

    Returns:
      All episodes of the jobs, sorted by key.
    """
    path, failures = folder / "trajectories.jsonl", folder / "failures.jsonl"
    store.repair(path)
    done = store.keys(path)
    todo = [job for job in jobs if job.key not in done]
    bar = tqdm.tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title, unit="episode")
    wins, played = 0, 0

    def on_done(trajectory: Trajectory) -> None:
        nonlocal wins, played
        if trajectory.status is Status.ENV_ERROR:
            store.append(failures, trajectory)
            return
        store.append(path, trajectory)
        wins, played = wins + trajectory.success, played + 1
        bar.set_postfix(success=f"{wins / played:.2f}", refresh=False)
        bar.update()

    name = EXPERT if policy is None else str(policy.folder)
    version = policy.version if policy else 0
    player = rollout.Player(
        env.env, name, version, env.max_steps, env.prompt, env.max_retries, env.give_up_after
    )
    with bar:
        if policy is None:
            rollout.play_expert(client, todo, player, on_done)
        elif todo:
            rollout.play(make_engine(), policy.chat, client, todo, player, on_done)
    wanted = {job.key for job in jobs}
    return [t for t in (store.read(path) if path.exists() else []) if t.key in wanted]


def is_done(folder: pathlib.Path, title: str) -> bool:
    """Whether the stage of this folder has ended; says so."""
    marker = folder / "done.json"
    if marker.exists():
        print(f"{title}: already done ({marker})", flush=True)
    return marker.exists()


def mark_done(folder: pathlib.Path, started: float, **results: Any) -> None:
    """Marks the stage of this folder as ended."""
    seconds = round(time.time() - started, 1)
    write_json(folder / "done.json", {"seconds": seconds, **results})


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def keep_freed_memory() -> None:
    """Lets glibc keep what XLA frees on a CPU, instead of giving it back to the system.

    A training step allocates gigabytes of temporaries; fetched from the system each time,
    they cost a page fault every 4 KiB: a fifth of an SFT update on two cores, nothing with
    this.  One arena, because those of threads give back whatever they free; so it must be
    called before JAX starts its threads.  Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # becomes the largest size_t: never
        mallopt(_M_TOP_PAD, 64 * 2**20)


def prepare_jax() -> None:
    """Settings of every binary that computes: a compilation cache, and memory that is kept."""
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators are absent
    keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "spa_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
