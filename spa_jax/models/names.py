"""The tensors of a decoder: our names, Hugging Face's and GGUF's, and their shapes.

Kernels are transposed: Hugging Face and GGUF store a linear layer as [out, in], Flax as [in, out].
"""

from collections.abc import Iterator

from spa_jax.config import LORA_TARGETS
from spa_jax.models.config import ModelConfig

Shape = tuple[int, ...]

# Ours -> (Hugging Face's name in a layer, GGUF's name in a block), in the order of LORA_TARGETS.
MATRICES = dict(
    zip(
        LORA_TARGETS,
        (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ),
        strict=True,
    )
)
_LAYER = {
    ("attn_norm", "scale"): ("input_layernorm", "attn_norm"),
    **{(name, "kernel"): MATRICES[name] for name in ("q", "k", "v")},
    **{(name, "bias"): MATRICES[name] for name in ("q", "k", "v")},
    ("q_norm", "scale"): ("self_attn.q_norm", "attn_q_norm"),
    ("k_norm", "scale"): ("self_attn.k_norm", "attn_k_norm"),
    ("o", "kernel"): MATRICES["o"],
    ("mlp_norm", "scale"): ("post_attention_layernorm", "ffn_norm"),
    **{(name, "kernel"): MATRICES[name] for name in ("gate", "up", "down")},
}

_TOP = {
    ("embed", "embedding"): ("model.embed_tokens.weight", "token_embd.weight"),
    ("norm", "scale"): ("model.norm.weight", "output_norm.weight"),
    ("unembed", "kernel"): ("lm_head.weight", "output.weight"),
}


def tensor_names(config: ModelConfig) -> Iterator[tuple[tuple, str, str]]:
    """(our path, with the layer last; Hugging Face's name; GGUF's name) of every tensor."""
    for path, (hf, ggml) in _TOP.items():
        if path[0] != "unembed" or not config.tie_embeddings:
            yield (*path, None), hf, ggml
    present = {"bias": config.qkv_bias, "q_norm": config.qk_norm, "k_norm": config.qk_norm}
    for i in range(config.num_layers):
        for path, (hf, ggml) in _LAYER.items():
            if not all(present.get(part, True) for part in path):
                continue
            kind = "bias" if path[1] == "bias" else "weight"
            yield (*path, i), f"model.layers.{i}.{hf}.{kind}", f"blk.{i}.{ggml}.{kind}"


def our_shape(path: tuple, config: ModelConfig) -> Shape:
    """The shape of a parameter (of one layer)."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        **{"embed": (config.vocab_size, d), "unembed": (d, config.vocab_size)},
        **{"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d)},
        **{"gate": (d, f), "up": (d, f), "down": (f, d)},
        **{"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)},
    }
    shape = shapes.get(path[0], (d,))
    return shape[1:] if path[1] == "bias" else shape


def hf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Hugging Face's name -> shape of every tensor of the model."""
    shapes = {}
    for path, name, _ in tensor_names(config):
        shape = our_shape(path, config)
        shapes[name] = shape[::-1] if path[1] == "kernel" else shape
    return shapes
