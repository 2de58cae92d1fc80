"""The lab's base policy: small enough that an arm of a study takes minutes on one core.

A decoder of four layers and width 128 (a million parameters) on a byte-level BPE of 1,500 tokens,
in which the games' words are whole: it learns to copy their names sooner.  It is cloned from an
expert that does something else at a third of its steps.  A policy that is cloned from a perfect
expert hardly varies, and fails where it sees too little, which no reward mends; this one knows what
to do and wastes steps, so rewards have something to choose among (docs/results/credit.md).  Each
horizon has a base of its own: short games need a quarter of the context.

    OUT/                 the policy: a Hugging Face folder
        lab.json         its settings, hash and success
        making/          the run that made it: demos/, sft/, eval/, and games/ until it ends
            start/       the policy that SFT started from, of random weights
            lab.json     the settings alone, from the first moment on

Games, demonstrations, cloning and evaluation are the stages of any run.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from spa_jax import files, games, provenance, schema, store, tokenizer
from spa_jax.config import EnvConfig, RowsConfig, SamplingConfig
from spa_jax.data_config import DataConfig, at_horizon
from spa_jax.errors import UserError
from spa_jax.horizons import HORIZONS
from spa_jax.models import transformer
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import huggingface
from spa_jax.run import BASE, Run
from spa_jax.runtime import children
from spa_jax.settings import Checked, setting
from spa_jax.stage_config import Settings, SftConfig
from spa_jax.stages import demonstrate, evaluate, prepare, sft
from spa_jax.trajectory import Trajectory

RECORD = "lab.json"
_MAKING = "making"
_FIRST_SEED = 90_000  # of the games; each seed of a lab has a hundred
# Tokens that an episode may have, by horizon: the prompt, and what a step takes times their limit.
_CONTEXT = {"8": 640, "16": 1280, "32": 2304}
GIVE_UP_AFTER = 4  # of its arms too: who is stuck stays so
_USER, _ASSISTANT, _END = _SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
# A turn costs three tokens beside its text.
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<|end|>' }}{% else %}"
    "{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPLIT = "smollm"  # how text is cut before it is merged: as SmolLM2's tokenizer does


@dataclasses.dataclass(frozen=True)
class LabConfig(Checked):
    """The lab's base policy, and what it is cloned from."""

    horizon: Literal["8", "16", "32"] = setting(
        "8", "Games whose episodes take about so many steps, as --horizon of a run."
    )
    layers: int = setting(4, "Layers of the policy.", minimum=1)
    width: int = setting(128, "Units of a hidden state.", minimum=16)
    heads: int = setting(4, "Attention heads; two query heads share a key.", minimum=2)
    feed_forward: int = setting(384, "Units of a layer's feed-forward part.", minimum=1)
    vocabulary: int = setting(1500, "Tokens of its byte-level BPE, at the most.", minimum=260)
    games: int = setting(5000, "Games of the expert that it is cloned from.", minimum=1)
    slips: float = setting(
        0.35,
        "Share of the expert's steps at which it does something else that could be done: so the "
        "base wavers between actions that it knows, and rewards can choose among them.",
        minimum=0,
        below=1,
    )
    valid_games: int = setting(60, "Games of the held-out loss.", minimum=1)
    heldout_games: int = setting(400, "Held-out games that it is judged on.", minimum=1)
    updates: int = setting(1200, "Updates of SFT.", minimum=1)
    batch_size: int = setting(32, "Demonstrations in an update.", minimum=1)
    learning_rate: float = setting(2e-3, "The largest learning rate of SFT.", above=0)

    def check(self) -> None:
        """Refuses heads that the width cannot hold."""
        if self.heads % 2 or self.width % (16 * self.heads):
            raise UserError(
                f"--heads={self.heads} --width={self.width}: give an even number of heads, and a "
                "width that is a multiple of 16 for each"
            )

    @property
    def model(self) -> ModelConfig:
        """The policy's shape."""
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads // 2,
            head_dim=self.width // self.heads,
            intermediate_size=self.feed_forward,
            max_position=4096,
        )


def make(out: pathlib.Path, config: LabConfig, seed: int) -> dict[str, Any]:
    """Makes the policy, or goes on where an earlier call stopped; returns its record.

    The record: `settings`, `seed`, `digest` (as `provenance.policy_digest`), `parameters`,
    and `heldout`, the summary of the held-out games.

    Args:
      out: gets the policy.
      config: its settings.
      seed: of games, weights and order.

    Raises:
      UserError: `out` has a policy, or part of one, of other settings, or something else.
    """
    asked = {"settings": dataclasses.asdict(config), "seed": seed}
    if (out / RECORD).exists():
        return _made(out, asked)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds another policy; give another --out")
    making = out / _MAKING
    _check_same(making / RECORD, asked)
    files.write_json(making / RECORD, asked)
    run = prepare.run(_run(making, config, seed, _generate(making, config, seed)))
    demonstrate.run(run)
    write_start(run, config)
    sft.run(run)
    judged = evaluate.run(run, BASE, policy=str(run.base))
    shutil.copytree(run.base, out, dirs_exist_ok=True)
    record = asked | {
        "digest": provenance.policy_digest(out),
        "parameters": sum(x.size for x in jax.tree.leaves(_shapes(config.model))),
        "heldout": judged.to_dict(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    files.write_json(out / RECORD, record)
    shutil.rmtree(making / "games")
    return record


def _made(out: pathlib.Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The record of a policy that is there."""
    _check_same(out / RECORD, asked)
    record = schema.read(dict[str, Any], out / RECORD, remedy=f"remove {out} to make it anew")
    if record["digest"] != provenance.policy_digest(out):
        raise UserError(
            f"{out}: its weights are not those that {out / RECORD} tells of; remove the folder to "
            "make it anew, or give another --out"
        )
    return record


def _check_same(path: pathlib.Path, asked: dict[str, Any]) -> None:
    """Refuses to go on with other settings than a record has."""
    if not path.exists():
        return
    was = schema.read(dict[str, Any], path, remedy=f"remove {path.parent} to make it anew")
    pairs = {name: (was["settings"].get(name), now) for name, now in asked["settings"].items()}
    pairs["seed"] = was["seed"], asked["seed"]
    found = [f"--{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]
    if found:
        raise UserError(
            f"{path.parent} was made with other settings: {'; '.join(found)}. Give another --out, "
            "or remove the folder"
        )


# --- games ------------------------------------------------------------------------------------


def _generate(making: pathlib.Path, config: LabConfig, seed: int) -> pathlib.Path:
    """Makes the games: to learn from, held out for the loss, and to be judged on."""
    root = making / "games"
    for command in commands(root, config, seed):
        if children.run(command):
            raise UserError(f"the generator of {root} failed, see its message above")
    return root


def commands(root: pathlib.Path, config: LabConfig, seed: int) -> list[list[str]]:
    """What generates all games below `root`: no two commands share a seed."""
    data, _ = _games(config)
    counts = {
        "train": config.games,
        "valid": config.valid_games,
        data.heldout_split: config.heldout_games,
    }
    first = _FIRST_SEED + 100 * seed + list(HORIZONS).index(config.horizon)
    return [
        games.alfworld(data, root / split, count, str(first + 10 * part))
        for part, (split, count) in enumerate(counts.items())
    ]


def _games(config: LabConfig, data: pathlib.Path | None = None) -> tuple[DataConfig, EnvConfig]:
    """The settings of the games, which lie in the folder `data`."""
    env = EnvConfig(alfworld_data=str(data or ""), give_up_after=GIVE_UP_AFTER)
    return at_horizon(DataConfig(horizon=config.horizon, demo_slips=config.slips), env)


# --- the run ----------------------------------------------------------------------------------


def _run(making: pathlib.Path, config: LabConfig, seed: int, data: pathlib.Path) -> Run:
    """The run that makes the policy."""
    games_of_it, env = _games(config, data)
    context = _CONTEXT[config.horizon]
    return Run(
        making,
        str(making / "start"),
        seed,
        Settings(
            env=env,
            data=games_of_it,
            sampling=SamplingConfig(slots=32, context_length=context, max_new_tokens=20),
            # A row holds an episode or some: attention over a longer one would cost most of all.
            rows=RowsConfig(
                row_length=context,
                policy_slots=context // 2,
                step_slots=3 * env.max_steps,
                rows_per_device=max(1, 5120 // context),
            ),
            sft=SftConfig(
                learning_rate=config.learning_rate,
                warmup_share=0.05,
                batch_size=config.batch_size,
                updates=config.updates,
                eval_every=100,
                checkpoint_every=100,
            ),
        ),
    )


# --- the policy that SFT starts from ----------------------------------------------------------


def write_start(run: Run, config: LabConfig) -> None:
    """Writes the random policy, unless it is there: its tokenizer learns from what is cloned."""
    folder = pathlib.Path(run.policy)
    if (folder / "config.json").exists():
        return
    names = folder.with_name("tokenizer")
    write_tokenizer(names, _texts(store.read(run.demonstrations("train"))), config.vocabulary)
    params = jax.device_get(transformer.init(config.model, jax.random.key(run.seed)))
    huggingface.save_pretrained(folder, config.model, params, names)


def _shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))


def _texts(episodes: Sequence[Trajectory]) -> Iterator[str]:
    """All that a policy reads and writes in episodes."""
    for episode in episodes:
        yield episode.instruction
        yield episode.final_observation
        for step in episode.steps:
            yield step.observation
            yield step.response


def write_tokenizer(folder: pathlib.Path, texts: Iterable[str], vocabulary: int) -> None:
    """Writes a byte-level BPE that is learned from texts, with a chat template.

    Args:
      folder: where to; it is made.
      texts: to learn from.
      vocabulary: tokens at the most: three special ones, 256 bytes, and what is merged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer.write_byte_level_bpe(
        folder,
        tokenizer.Vocabulary(
            tokens=sorted(model["vocab"], key=model["vocab"].__getitem__),
            special=_SPECIAL,
            roles={"eos_token": _END, "pad_token": _END},
            chat_template=_TEMPLATE,
            max_length=4096,
        ),
        [" ".join(pair) for pair in model["merges"]],
        _SPLIT,
    )
