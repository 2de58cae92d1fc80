"""Small stand-ins that tests share: a tokenizer made in milliseconds."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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
