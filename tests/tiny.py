"""Small stand-ins that tests share: a tokenizer made in milliseconds, a policy, episodes."""

import json
import pathlib

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from spa_jax.models import transformer, weights
from spa_jax.models.transformer import ModelConfig
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
    "take mug 1 from countertop 1", "The drawer 2 is closed. open drawer 2",
    "user", "assistant", "system", "Nothing happened.",
)


def tiny_tokenizer(
    folder: pathlib.Path, chat_template: str = CHATML, vocab_size: int = 384
) -> pathlib.Path:
    """Writes a byte-level BPE tokenizer (as SmolLM2's, smaller) into `folder`; returns it.

    Ids 0, 1, 2 are SPECIAL; every byte is a token, so any text can be encoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    backend.save(str(folder / "tokenizer.json"))
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


def tiny_config(tied: bool = True) -> ModelConfig:
    """A decoder of two layers that compiles in seconds."""
    return ModelConfig(
        vocab_size=384, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=64, tie_embeddings=tied, max_position=2048,
    )  # fmt: skip


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
    weights.save_pretrained(folder, config, tiny_params(config, seed), tokenizer)
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
            Step("You see it.", "look", "look", bool(rng.integers(0, 2)), 0, c, r)
            for c, r in rng.normal(size=(steps, 2)).tolist()
        ),
        token_ids=tuple(ids), step_id=tuple(step_id), log_probs=tuple(log_probs),
        ref_log_probs=tuple(ref),
    )  # fmt: skip
