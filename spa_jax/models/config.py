"""The shape of a decoder, and how it is computed."""

import dataclasses
from typing import Any

from spa_jax.config import ComputeConfig

Params = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch the long wavelengths of their rotary embedding.

    Attributes:
      factor: wavelengths that are long become this many times longer.
      low_freq_factor: long is a wavelength above original_max_position / low_freq_factor.
      high_freq_factor: one below original_max_position / high_freq_factor stays as it is, and
        between the two the frequency is interpolated.
      original_max_position: the context length before the stretch, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; names are ours, `io` maps Hugging Face's.

    Attributes:
      model_type: the family, by Hugging Face's name: llama, mistral, qwen2 or qwen3.
      qkv_bias: q, k and v have a bias (Qwen2).
      qk_norm: each head's query and key pass an RMSNorm before the rotation (Qwen3).
      rope_scaling: None: wavelengths as they are.
      max_position: tokens that the model was made for.
      sliding_window: tokens that a layer attends over (Mistral), 0 = all. It is not computed:
        within the window it makes no difference, and `check_length` refuses more.
      compute: how it is computed, `auto` resolved; no part of the shape.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_position: int = 8192
    model_type: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    compute: ComputeConfig = ComputeConfig(compute_dtype="float32")

    @property
    def dtype(self) -> str:
        """That of activations."""
        return self.compute.compute_dtype

    @property
    def matmul_dtype(self) -> str:
        """That of the factors of products with weights."""
        matmul_dtype = self.compute.matmul_dtype
        return self.dtype if matmul_dtype == "compute" else matmul_dtype
