"""Makes the golden files beside it: what transformers' PyTorch models compute.

    pip install torch==2.13.0
    python -m tests.golden.models.make [NAME ...]

One .npz a family: config.json, the weights, two rows of tokens with positions and a loss mask, the
logits, and the gradient of the masked mean of -log p(next token) by every weight, all float32.
"""

import json
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent
LENGTH = 13  # odd

_SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name -> (model_type, what differs from the shape above). A name's place is its seed.
FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": (
        "llama",
        {"rope_theta": 500_000.0, "tie_word_embeddings": False, "num_key_value_heads": 1},
    ),
    "llama3.2": (
        "llama",
        {"rope_theta": 200.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "mistral": ("mistral", {"sliding_window": 32, "tie_word_embeddings": False, "head_dim": 8}),
    "qwen2.5": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 8}),
    "qwen3_untied": ("qwen3", {"rope_theta": 1e6, "tie_word_embeddings": False, "head_dim": 6}),
    "smollm2": ("llama", {"rope_theta": 100_000.0, "tie_word_embeddings": True}),
    "llama3.1": (
        "llama",
        {
            "rope_theta": 200.0,
            "rope_scaling": _LLAMA3,
            "tie_word_embeddings": False,
            "num_key_value_heads": 1,
        },
    ),
    "qwen2": (
        "qwen2",
        {
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "hidden_size": 18,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        },
    ),
}


def inputs() -> dict[str, np.ndarray]:
    """Tokens [2, 13], explicit positions that do not begin at 0, and the loss mask."""
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, _SHAPE["vocab_size"], (2, LENGTH)),
        "positions": np.stack([np.arange(LENGTH), 5 + np.arange(LENGTH)]),
        "mask": (rng.random((2, LENGTH - 1)) < 0.4).astype(np.float32),
    }


def build(name: str):
    """The family's random PyTorch model; every weight differs from every other."""
    import torch
    import transformers

    model_type, changes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **_SHAPE | changes)
    torch.manual_seed(list(FAMILIES).index(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):  # they begin as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def compute(model, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights, logits and gradients under "weight/", "logits" and "gradient/"."""
    import torch

    tokens, positions, mask = (torch.tensor(given[k]) for k in ("tokens", "positions", "mask"))
    logits = model(tokens, position_ids=positions).logits
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    (-(chosen * mask).sum() / mask.sum()).backward()
    named = dict(model.named_parameters())
    return {
        "logits": logits.detach().numpy(),
        **{f"weight/{k}": p.detach().numpy() for k, p in named.items()},
        **{f"gradient/{k}": p.grad.numpy() for k, p in named.items()},
    }


def main() -> None:
    given = inputs()
    for name in sys.argv[1:] or FAMILIES:
        model = build(name)
        config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        arrays = given | compute(model, given)
        np.savez_compressed(FOLDER / f"{name}.npz", config=np.array(config), **arrays)
        print(name, (FOLDER / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
