"""Files of others, mutated: each is read, or refused in one line, within seconds.

A small fixed budget runs always, the same examples each time; a larger one, of other examples each
time, is slow.
"""

import copy
import json
import pathlib
import re
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from spa_jax import chat, chat_template, importers, policy, store, tokenizer
from spa_jax.errors import UserError
from spa_jax.models.io import gguf, huggingface, peft
from spa_jax.models.names import MATRICES
from spa_jax.policy import Policy
from tests import tiny
from tests.models.io.test_gguf import write_gguf

SECONDS = 10.0
LONGER = 40  # times the fixed budget

# --- what a mutation is ---------------------------------------------------------------------------

_NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**30, -(10**18), 0.5, 1e308, -0.0)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "0", "1e5", "llama", "\ud800", "\0", "x" * 300, "..", "{{", ".*", "(a"]),
    st.text(max_size=8),
    st.sampled_from([[], {}, [None], [[[]]], {"a": {}}, [1, 2], ["q_proj"], {"": 0}]),
)


def _places(value, at=()):
    """The path of every part of a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value[:6]):
            yield from _places(part, (*at, key))


@st.composite
def mutated(draw, whole):
    """A JSON value with some of its parts replaced, left out, doubled, or with more in it."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        places = [at for at in _places(value) if at]
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        node = value
        for step in above:
            node = node[step]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "nest"]))
        if how == "remove":
            del node[key]
        elif how == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=5))] = copy.deepcopy(draw(ODD))
        else:
            node[key] = [node[key]] if how == "nest" else copy.deepcopy(draw(ODD))
    return value


@st.composite
def mutated_bytes(draw, whole, header):
    """Bytes with some changed, left out or added, most of them in the header."""
    raw = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, (header if draw(st.integers(0, 9)) else len(raw)) - 1))
        how = draw(st.sampled_from(["flip", "number", "remove", "insert", "end"]))
        if how == "flip":
            raw[min(at, len(raw) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            number = draw(st.sampled_from([0, 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
            raw[at : at + 8] = number.to_bytes(8, "little")
        elif how == "remove":
            del raw[at : at + draw(st.integers(1, 9))]
        elif how == "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            del raw[at + 1 :]
    return bytes(raw)


# --- files ----------------------------------------------------------------------------------------


def _dump(value) -> str:
    return json.dumps(value)  # NaN and Infinity, as Python and others write them


def _config(folder):
    whole = json.loads((folder / "config.json").read_text())
    whole |= {"rope_scaling": None, "rope_parameters": {"type": "default"}, "layer_types": None}
    path = folder / "config.json"

    def read(value):
        path.write_text(_dump(value))
        huggingface.load_pretrained(folder)

    return mutated(whole), read


def _safetensors(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()

    def read(raw):
        path.write_bytes(raw)
        huggingface.load_pretrained(folder)

    return mutated_bytes(whole, 8 + int.from_bytes(whole[:8], "little")), read


def _gguf(folder):
    path = folder / "m.gguf"
    write_gguf(path, tiny.CONFIG, tiny.random_params(tiny.CONFIG), folder)
    whole = path.read_bytes()
    header = whole.index(b"blk.1.ffn_down.weight") + 60  # among the last of the tensors

    def read(raw):
        path.write_bytes(raw)
        gguf.import_gguf(path, folder / "imported")

    return mutated_bytes(whole, header), read


def _adapter(folder):
    rng = np.random.default_rng(0)
    model, stored = tiny.tiny_config(), {}
    for i in range(model.num_layers):
        name = f"base_model.model.model.layers.{i}.{MATRICES['q'][0]}"
        for letter, shape in (("A", (4, 32)), ("B", (32, 4))):
            stored[f"{name}.lora_{letter}.weight"] = rng.standard_normal(shape).astype(np.float32)
    huggingface.write_safetensors(
        folder / peft.ADAPTER,
        {n: (a.shape, a.dtype, lambda a=a: a) for n, a in stored.items()},
    )
    whole = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj"], "init_lora_weights": True, "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "use_dora": False, "rank_pattern": {},
        "base_model_name_or_path": "nowhere", "loftq_config": {}, "modules_to_save": None,
    }  # fmt: skip

    def read(value):
        (folder / peft.ADAPTER_CONFIG).write_text(_dump(value))
        if isinstance(value, dict) and "base_model_name_or_path" not in value:
            with pytest.raises(UserError):
                peft.adapter_base(folder)
        peft.load_adapter(folder, model)

    return mutated(whole), read


def _trajectories(folder):
    path = folder / "t.jsonl"
    one = tiny.random_trajectory(np.random.default_rng(0), steps=2, context=3, response=2)
    store.write(path, [one])
    whole = json.loads(path.read_text())

    def read(value):
        path.write_text(_dump(value) + "\n")
        (found,) = store.read(path)
        store.write(path, [found])  # what is accepted is one of ours
        assert store.read(path) == [found]

    return mutated(whole), read


def _logs(folder):
    path = folder / "log.json"
    sharegpt = [
        {"id": "game_1", "reward": 1.0, "conversations": [
            {"from": "human", "value": "Do it."}, {"from": "gpt", "loss": False, "value": "OK"},
            {"from": "human", "value": "A room."}, {"from": "gpt", "value": "Action: look"},
        ]},
    ]  # fmt: skip
    openai = [
        {"task": "game_2", "messages": [
            {"role": "system", "content": "Be good."}, {"role": "user", "content": "A room."},
            {"role": "assistant", "content": "Action: look"}, {"role": "user", "content": "Dust."},
        ]},
    ]  # fmt: skip

    def read(value):
        path.write_text(_dump(value))
        for t in importers.read_log(path, env="alfworld"):
            store.write(folder / "out.jsonl", [t])
            assert store.read(folder / "out.jsonl") == [t]

    return st.one_of(mutated(sharegpt), mutated(openai)), read


def _tokenizer(folder):
    names = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: json.loads((folder / name).read_text()) for name in names}
    choice = st.one_of(
        mutated(whole["tokenizer_config.json"]).map(lambda value: (names[1], value)),
        mutated(whole["tokenizer.json"]).map(lambda value: (names[0], value)),
    )

    def read(chosen):
        for name in names:
            (folder / name).write_text(json.dumps(whole[name]))
        (folder / chosen[0]).write_text(_dump(chosen[1]))
        chat.ChatFormat.from_tokenizer(tokenizer.load(folder))

    return choice, read


_PIECES = st.sampled_from(
    [
        "<|im_start|>", "<|im_end|>", "\n", " ", "user", "{{ message['role'] }}", "{{ no.x }}",
        "{{ message['content'] }}", "{{ message['content'] | trim }}", "{{ bos_token }}", "{{1/0}}",
        "{{ strftime_now('%d %b %Y') }}", "{{ raise_exception('no') }}", "{{ messages }}", "\ud83c",
        "{{ messages[0]['content'].upper() }}", "{{ 'x' * 99999 }}", "{% set a = a + a %}", "{{",
        "{{ range(99999) | list | length }}", "{{ ''.__class__.__mro__ }}", "{{ self.x() }}",
    ]
)  # fmt: skip
_BLOCKS = (
    "{%% for m in range(99999) %%}%s{%% endfor %%}", "{%% if loop.first %%}%s{%% endif %%}",
    "{%% for x in messages %%}%s{%% endfor %%}", "{%% if add_generation_prompt %%}%s{%% endif %%}",
    "{%% macro x() %%}%s{{ x() }}{%% endmacro %%}{{ x() }}", "{%% set a = 'aaaa' %%}%s",
)  # fmt: skip
TEMPLATES = st.recursive(
    st.lists(_PIECES, min_size=1, max_size=4).map("".join),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(st.sampled_from(_BLOCKS), inner).map(lambda pair: pair[0] % pair[1]),
    ),
    max_leaves=4,
).map(lambda body: "{% for message in messages %}" + body + "{% endfor %}")


def _templates(folder):
    settings = folder / "tokenizer_config.json"
    whole = json.loads(settings.read_text())

    def read(template):
        settings.write_text(_dump(whole | {"chat_template": template}))
        chat.ChatFormat.from_tokenizer(tokenizer.load(folder))

    return TEMPLATES, read


def _observations(folder):
    fmt = chat.ChatFormat.from_tokenizer(tokenizer.load(folder))
    border = [i for i in fmt.next_turn("") if i in fmt.special]
    pieces = st.sampled_from([*tiny.SPECIAL, "\n", "user", "\ud800", "\U0001f375", "\0", "<|im"])

    def read(texts):
        ids = fmt.next_turn("".join(texts))
        assert [i for i in ids if i in fmt.special] == border  # nobody forges a turn

    return st.lists(st.one_of(pieces, st.text(max_size=9)), max_size=9), read


def _beside(folder):
    """The small files beside weights and episodes."""
    wholes = {
        policy.ABOUT: {"version": 3, "chat_format": "template", "progress_trunk": ""},
        "chat.json": {"chat_format": "template", "end_of_turn": 2},
        "generation_config.json": {"eos_token_id": [1, 2]},
    }
    (folder / "trajectories.jsonl").touch()
    loaded = policy.load(folder)

    def read(chosen):
        name, value = chosen
        (folder / name).write_text(_dump(value))
        try:
            policy.check_chat_format(folder, "template")
            policy.recorded_chat_format(folder)
            assert isinstance(loaded, Policy)
            policy.other_ends(loaded)
        finally:
            (folder / name).unlink()

    files = [mutated(value).map(lambda v, n=name: (n, v)) for name, value in wholes.items()]
    return st.one_of(*files), read


# Name -> (how a folder of a tiny policy becomes a strategy and a reader, examples of the budget).
TARGETS = {
    "config.json": (_config, 60),
    "safetensors": (_safetensors, 40),
    "gguf": (_gguf, 15),
    "adapter": (_adapter, 60),
    "trajectories": (_trajectories, 200),
    "logs": (_logs, 100),
    "tokenizer": (_tokenizer, 12),
    "templates": (_templates, 10),
    "observations": (_observations, 100),
    "beside": (_beside, 25),
}


def _survives(read, value):
    """Reads, or refuses in one line, in time."""
    began = time.thread_time()
    try:
        read(value)
    except UserError as error:
        assert "\n" not in str(error), str(error)
        assert not re.match(r"^\W*$", str(error))
    assert time.thread_time() - began < SECONDS


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return tiny.tiny_policy(tmp_path / "m")


def _fuzz(name, folder, *, times, **settings):
    make, examples = TARGETS[name]
    strategy, read = make(folder)
    settings = {"deadline": None, "database": None} | settings
    settings["suppress_health_check"] = list(hypothesis.HealthCheck)

    @hypothesis.settings(max_examples=examples * times, **settings)
    @hypothesis.given(strategy)
    def each(value):
        _survives(read, value)

    each()


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name, folder, monkeypatch):
    # Else most of the time goes into endless templates.
    monkeypatch.setattr(chat_template, "_SECONDS", 0.2)
    _fuzz(name, folder, times=1, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_files_are_read_or_refused_in_one_line(name, folder, monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 0.5)
    _fuzz(name, folder, times=LONGER)
