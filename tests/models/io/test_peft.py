"""Adapters of PEFT: its names, what of its settings is understood, which matrices it adapts."""

import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from spa_jax.config import LORA_TARGETS, LoraConfig
from spa_jax.errors import UserError
from spa_jax.models import lora, transformer
from spa_jax.models.io import adapter_config, peft
from spa_jax.models.names import MATRICES
from tests import tiny

PARAMS = transformer.init(tiny.tiny_config(), jax.random.key(0))
ALL = LoraConfig(rank=4, alpha=8.0, targets=LORA_TARGETS)


def test_pefts_names_there_and_back():
    adapter = jax.tree.map(np.asarray, lora.init(ALL, PARAMS, jax.random.key(1)))
    named = peft.to_named(adapter)
    assert named["model.layers.1.self_attn.k_proj.lora_A.default.weight"].shape == (4, 32)
    assert named["model.layers.1.mlp.up_proj.lora_B.default.weight"].shape == (64, 4)
    wrapped = {f"base_model.model.{name}": array for name, array in named.items()}
    wrapped["base_model.model.model.norm.weight"] = np.ones(32)
    jax.tree.map(np.testing.assert_array_equal, peft.from_named(wrapped), adapter)
    saved = {name.replace(".default.", "."): array for name, array in named.items()}
    jax.tree.map(np.testing.assert_array_equal, peft.from_named(saved), adapter)


def test_what_is_not_supported_is_named():
    assert peft.targets_of(["q_proj", "down_proj"]) == ("q", "down")
    assert peft.modules_of(("q", "down")) == ["q_proj", "down_proj"]
    with pytest.raises(ValueError, match="embed_tokens"):
        peft.targets_of(["q_proj", "embed_tokens"])
    name = "model.layers.0.self_attn.{}.lora_A.default.weight"
    with pytest.raises(ValueError, match="rotary"):
        peft.from_named({name.format("rotary"): np.ones((2, 2))})
    with pytest.raises(ValueError, match="q lacks b"):
        peft.from_named({name.format("q_proj"): np.ones((2, 2))})


# --- A folder of another's ------------------------------------------------------------------------

MODEL = tiny.tiny_config()
PLAIN = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
    "target_modules": ["q_proj", "down_proj"], "init_lora_weights": True, "inference_mode": True,
    "lora_dropout": 0.05, "use_dora": False, "use_rslora": False, "rank_pattern": {},
    "modules_to_save": None, "loftq_config": {}, "megatron_core": "megatron.core",
    "alora_invocation_tokens": None, "peft_version": "0.21.2", "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False}, "target_parameters": None,
}


@pytest.fixture
def write(tmp_path):
    """(matrices as (name, layer), changes of the settings, of the tensors' names) -> a folder."""

    def make(matrices=None, rename=lambda name: name, **changes):
        rng = np.random.default_rng(0)
        if matrices is None:
            matrices = [(name, layer) for name in ("q", "down") for layer in range(2)]
        stored = {}
        for name, layer in matrices:
            inputs, outputs = peft.our_shape((name, "kernel"), MODEL)
            prefix = f"base_model.model.model.layers.{layer}.{MATRICES[name][0]}"
            for letter, shape in (("A", (4, inputs)), ("B", (outputs, 4))):
                array = rng.standard_normal(shape).astype(np.float32)
                stored[rename(f"{prefix}.lora_{letter}.weight")] = array
        safetensors.numpy.save_file(stored, tmp_path / peft.ADAPTER)
        (tmp_path / peft.ADAPTER_CONFIG).write_text(json.dumps(PLAIN | changes))
        return tmp_path

    return make


def test_a_plain_adapter_is_read(write):
    folder = write()
    config, tree = peft.load_adapter(folder, MODEL)
    assert config == LoraConfig(rank=4, alpha=8.0, targets=("q", "down"))
    stored = safetensors.numpy.load_file(folder / peft.ADAPTER)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tree["layers"]["down"]["a"][1], stored[name].T)
    wrapped = peft.load_adapter(write(rename=lambda n: f"module._orig_mod.{n}"), MODEL)
    tiny.assert_same(wrapped[1], tree)


@pytest.mark.parametrize(
    "changes",
    [
        *({"init_lora_weights": kind} for kind in (
            "pissa", "pissa_niter_16", "olora", "corda", "loftq", "eva", "lora_ga", "new", None)),
        {"alora_invocation_tokens": [1, 2]}, {"use_qalora": True}, {"use_dora": True},
        {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}},
        {"loftq_config": {"bits": 4}}, {"corda_config": {"x": 1}}, {"eva_config": {"rho": 2.0}},
        {"layer_replication": [[0, 2]]}, {"trainable_token_indices": [3]}, {"bias": "all"},
        {"target_parameters": ["w"]}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
        {"fan_in_fan_out": True}, {"megatron_config": {"a": 1}}, {"peft_type": "LOHA"},
        {"task_type": "SEQ_CLS"}, {"r": 0}, {"r": "4"}, {"lora_alpha": "8"}, {"lora_alpha": 1e400},
        {"target_modules": None}, {"target_modules": [1]}, {"a_setting_of_tomorrow": 3},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)  # fmt: skip
def test_settings_that_are_not_understood_are_refused_by_name(write, changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"adapter_config.json: {name}.*merge_and_unload"):
        peft.load_adapter(write(**changes), MODEL)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["proj"]},  # the end of a name, and not of a word
        {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.self_attn\.[qk]_proj"},
        {"target_modules": r"layers\.0.*"},  # from the beginning
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"target_modules": r".*q_proj", "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
    ],
    ids=str,
)
def test_matrices_are_chosen_as_peft_chooses_them(tmp_path, changes):
    theirs = pytest.importorskip("peft.tuners.tuners_utils")
    path = tmp_path / peft.ADAPTER_CONFIG
    path.write_text(json.dumps(PLAIN | changes))
    off = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    given = types.SimpleNamespace(**(off | changes))
    names = {f"model.layers.{i}.{MATRICES[n][0]}": (n, i) for n in LORA_TARGETS for i in range(2)}
    wanted = {at for key, at in names.items() if theirs.check_target_module_exists(given, key)}
    config = adapter_config.read(path)
    if wanted:
        assert adapter_config.targets(path, config, MODEL) == wanted
    else:
        with pytest.raises(UserError, match="target_modules=.* names no matrix"):
            adapter_config.targets(path, config, MODEL)


def test_layers_that_an_adapter_leaves_out_stay_as_they_are(write):
    folder = write([("q", 1)], target_modules=["q_proj"], layers_to_transform=[1])
    config, tree = peft.load_adapter(folder, MODEL)
    assert config.targets == ("q",)
    assert not tree["layers"]["q"]["a"][0].any() and tree["layers"]["q"]["a"][1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrices": [("q", 0), ("q", 1)]}, "no adapter of model.layers.0.mlp.down_proj"),
        ({"target_modules": ["q_proj"]}, "lora_A.weight is of a matrix that adapter_config"),
        ({"rename": lambda n: n.replace("model.layers", "vision_model.layers")}, "no LoRA matrix"),
        ({"rename": lambda n: n.replace("model.layers", "vision.model.layers")}, "no LoRA matrix"),
        ({"rename": lambda n: n.replace("lora_B", "lora_E")}, "lora_E.weight is no LoRA matrix"),
        ({"r": 8}, r"lora_A.weight has shape \[4, 64\].*\[8, 64\]"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules adapts lm_head, which is not"),
        ({"target_modules": "(a+)+$"}, "names no matrix"),
        ({"target_modules": "(.*q_proj"}, "regular expression .* cannot be read"),
    ],
)
def test_an_adapter_whose_parts_disagree_is_refused(write, changes, message):
    with pytest.raises(UserError, match=message):
        peft.load_adapter(write(**changes), MODEL)


def test_a_regular_expression_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_config, "_PATTERN_SECONDS", 0.2)
    path = tmp_path / peft.ADAPTER_CONFIG
    path.write_text(json.dumps(PLAIN | {"target_modules": r"(.|..|...)+[^\w.]"}))
    with pytest.raises(UserError, match="takes too long; list the modules' names"):
        adapter_config.targets(path, adapter_config.read(path), MODEL)


def test_an_adapter_based_on_itself_is_refused(tmp_path):
    for name, base in (("a", "../b"), ("b", "../a"), ("self", "."), ("none", "a\0b")):
        (tmp_path / name).mkdir()
        about = json.dumps(PLAIN | {"base_model_name_or_path": base})
        (tmp_path / name / peft.ADAPTER_CONFIG).write_text(about)
    for name in ("a", "self"):
        with pytest.raises(UserError, match="base_model_name_or_path leads back to this adapter"):
            peft.adapter_base(tmp_path / name)
    with pytest.raises(UserError, match="base_model_name_or_path is 'a.x00b', and no such folder"):
        peft.adapter_base(tmp_path / "none")
