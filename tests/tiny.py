"""Small stand-ins that tests share: a tokenizer made in milliseconds, a policy, episodes."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from spa_jax import tokenizer as tokenizer_lib
from spa_jax.models import transformer
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import huggingface
from spa_jax.trajectory import Sampling, Status, Step, Trajectory

# ChatML as SmolLM2 has it: a default system message unless the conversation brings its own.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEXTS = (
    "You are in the middle of a room. Looking around you, you see a drawer 1, a shelf 2.",
    "Your task is to: put a clean mug in the coffeemachine.",
    "Thought: I should look for a mug.\nAction: go to countertop 1",
    "take mug 1 from countertop 1",
    "The drawer 2 is closed. open drawer 2",
    "user",
    "assistant",
    "system",
    "Nothing happened.",
)


def tiny_tokenizer(
    folder: pathlib.Path, chat_template: str = CHATML, vocab_size: int = 384
) -> pathlib.Path:
    """Writes a byte-level BPE tokenizer (as SmolLM2's, smaller) into `folder`; returns it.

    Ids 0, 1, 2 are SPECIAL; every byte is a token, so any text can be encoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _train(SPECIAL, vocab_size).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's tokenizers have of their own."""

    split: str
    special: tuple[str, ...]
    roles: dict[str, str]
    added: tuple[str, ...] = ()
    add_bos: bool = False


LLAMA3 = Family(
    "llama-bpe",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
     "<|eot_id|>"),
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    add_bos=True,
)
QWEN = Family(
    "qwen2", SPECIAL, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    added=("<think>", "</think>"),
)


def family_tokenizer(
    folder: pathlib.Path, family: Family, chat_template: str | None
) -> pathlib.Path:
    """Writes a small tokenizer with a family's special tokens and way of cutting text."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(_train((*family.special, *family.added), 384).to_str())["model"]
    vocabulary = tokenizer_lib.Vocabulary(
        tokens=sorted(model["vocab"], key=model["vocab"].get),
        special=family.special,
        added=family.added,
        roles=family.roles,
        add_bos=family.add_bos,
        chat_template=chat_template,
        max_length=2048,
    )
    merges = [" ".join(pair) for pair in model["merges"]]
    tokenizer_lib.write_byte_level_bpe(folder, vocabulary, merges, family.split)
    return folder


def _train(special: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    return backend


# For weights on disk.
CONFIG = ModelConfig(
    vocab_size=384, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=96, rope_theta=100_000.0, rms_norm_eps=1e-5, tie_embeddings=True,
    max_position=256,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False, head_dim=8, num_kv_heads=1)


def random_params(config, seed=0):
    """Distinct values everywhere, so that no two tensors can be mistaken for one another."""
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tiny_config(tied: bool = True) -> ModelConfig:
    """A decoder of two layers that compiles in seconds."""
    return ModelConfig(
        vocab_size=384, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=64, tie_embeddings=tied, max_position=2048,
    )


def tiny_params(config: ModelConfig, seed: int = 0, end_of_turn: int = 2, ends: float = 2.0):
    """Random parameters whose policy ends a turn after a few tokens.

    All embeddings share their first coordinate, so the final hidden states nearly do, and the
    end-of-turn token's own is larger: its logit is high wherever a turn stands.

    Args:
      config: the model's shape.
      seed: of the parameters.
      end_of_turn: the id that ends a turn.
      ends: how much likelier it is than any other token.
    """
    params = jax.device_get(transformer.init(config, jax.random.key(seed)))
    table = np.array(params["embed"]["embedding"])
    table[:, 0] = 1.0
    params["embed"]["embedding"] = table
    if config.tie_embeddings:
        table[end_of_turn, 0] += ends
    else:
        kernel = np.array(params["unembed"]["kernel"])
        kernel[0, end_of_turn] += ends
        params["unembed"]["kernel"] = kernel
    return params


def tiny_policy(folder: pathlib.Path, *, seed: int = 0, tied: bool = True) -> pathlib.Path:
    """Writes a random tiny policy as a Hugging Face folder; returns it."""
    config = tiny_config(tied)
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "_tokenizer"))
    huggingface.save_pretrained(folder, config, tiny_params(config, seed), tokenizer)
    return folder


def random_trajectory(
    rng: np.random.Generator,
    task: str = "task",
    attempt: int = 0,
    *,
    steps: int = 3,
    context: int = 12,
    response: int = 5,
    vocab_size: int = 384,
    final_reward: float | None = None,
) -> Trajectory:
    """A sampled and annotated episode of random tokens: `steps` turns of random lengths."""
    ids, step_id, log_probs, ref = [], [], [], []
    for k in range(steps):
        read, wrote = int(rng.integers(2, context + 1)), int(rng.integers(1, response + 1))
        ids += rng.integers(3, vocab_size, read + wrote).tolist()
        step_id += [-1] * read + [k] * wrote
        log_probs += [0.0] * read + (-3 * rng.random(wrote) - 3).tolist()
        ref += [0.0] * read + (-3 * rng.random(wrote) - 3).tolist()
    reward = float(rng.integers(0, 2)) if final_reward is None else final_reward
    return Trajectory(
        env="alfworld", task=task, split="train", seed=0, attempt=attempt, policy="tiny",
        status=Status.SUCCESS if reward == 1 else Status.MAX_STEPS, final_reward=reward,
        instruction="", sampling=Sampling(max_new_tokens=response),
        steps=tuple(
            Step("You see it.", "look", "look", bool(rng.integers(0, 2)), contribution=c, reward=r)
            for c, r in rng.normal(size=(steps, 2)).tolist()
        ),
        token_ids=tuple(ids), step_id=tuple(step_id), log_probs=tuple(log_probs),
        ref_log_probs=tuple(ref),
    )
