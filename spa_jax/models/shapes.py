"""Shapes of well-known models by name: to plan for, or to time, a model that is not at hand."""

import dataclasses

from spa_jax.models.config import ModelConfig, RopeScaling

SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    rope_theta=100_000.0,
)
LLAMA_3_2_3B = ModelConfig(
    vocab_size=128_256,
    hidden_size=3072,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=8192,
    rope_theta=500_000.0,
    max_position=131_072,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
)
LLAMA_3_1_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rope_theta=500_000.0,
    max_position=131_072,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    tie_embeddings=False,
)
LLAMA_3_1_70B = dataclasses.replace(
    LLAMA_3_1_8B, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28_672
)
NAMED = {
    "smollm2-135m": SMOLLM2_135M,
    "llama-3.2-3b": LLAMA_3_2_3B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
}
