"""PEFT's names of an adapter."""

import jax
import numpy as np
import pytest

from spa_jax.config import LORA_TARGETS, LoraConfig
from spa_jax.models import lora, transformer
from spa_jax.models.io import peft
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
