"""The PyTorch side of the comparisons: transformers' own model with our weights.

It computes where we do, on the CPU or on the first GPU.  PyTorch is no requirement of the project.
A subject that compares with it asks for it here, and a missing one is the user's to mend: `make
setup-peers` installs it.  Nothing is skipped.
"""

import contextlib
import importlib
import os
from typing import Any

import jax
import numpy as np

from spa_jax.batching import SHARED, PackedRows
from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import hf_config, huggingface


def require(name: str) -> Any:
    """The module of a peer, such as "torch".

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise  # it is there, and something that it needs is not
        raise UserError(
            f"this comparison needs {name}, which is not installed: make setup-peers"
        ) from error


def torch() -> Any:
    """PyTorch, with as many threads as XLA takes: one a processor that the process may use.

    Raises:
      UserError: PyTorch is not installed, or JAX computes on a GPU and it cannot.
    """
    module = require("torch")
    module.set_num_threads(len(os.sched_getaffinity(0)))
    if device() == "cuda":
        if not module.cuda.is_available():
            raise UserError(
                "JAX computes on a GPU and this PyTorch cannot: install one with CUDA, or compare "
                "on the CPU with JAX_PLATFORMS=cpu"
            )
        module.set_float32_matmul_precision("high")  # TF32, as XLA multiplies float32 there
    return module


def device() -> str:
    """Where PyTorch computes: where JAX does."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def tensor(values: Any, **settings: Any) -> Any:
    """PyTorch's tensor of the values, where it computes.

    (`torch.set_default_device` would do, but it makes each call of PyTorch half as long again.)
    """
    return require("torch").tensor(values, device=device(), **settings)


def autocast(config: ModelConfig) -> contextlib.AbstractContextManager[Any]:
    """Products and activations in the config's dtype, float32 weights kept, as our training is."""
    if config.dtype == "float32":
        return contextlib.nullcontext()
    pytorch = torch()
    return pytorch.autocast(device(), dtype=getattr(pytorch, config.dtype))


def model(config: ModelConfig, params: Params, dtype: str = "float32") -> Any:
    """transformers' PyTorch model of our shape, with our weights, ready to train.

    Args:
      config: the model's shape; any family.
      params: the tree of `models.transformer`; copied.
      dtype: of its weights.

    Raises:
      UserError: PyTorch is not installed.
    """
    pytorch, transformers = torch(), require("transformers")
    settings = hf_config.write(config, "float32", {})
    kind, _ = settings.pop("model_type"), settings.pop("torch_dtype")
    shape = transformers.AutoConfig.for_model(kind, **settings, use_cache=False)
    # sdpa: the fastest attention that transformers has.
    made = transformers.AutoModelForCausalLM.from_config(
        shape, dtype=getattr(pytorch, dtype), attn_implementation="sdpa"
    ).to(device())
    tensors = {
        name: tensor(np.array(array, np.float32, order="C"))
        for name, array in huggingface.to_named(config, params).items()
    }
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if set(missing) - tied or unexpected:
        raise AssertionError(f"transformers names weights otherwise: {missing}, {unexpected}")
    made.tie_weights()
    return made.train()


def finished(result: Any) -> Any:
    """A tensor, once the GPU has made it."""
    if result.is_cuda:
        torch().cuda.synchronize()
    return result


def attention_mask(rows: PackedRows) -> np.ndarray:
    """[R, 1, L, L] bool, True where a query sees a key, as transformers takes a mask of its own.

    The rows' packing as our model computes it (`transformer.packed_mask`); padding sees itself.
    """
    segment = np.asarray(rows.segment_ids)
    keys = segment[:, None, :]
    causal = np.tril(np.ones((segment.shape[1],) * 2, bool))
    return (causal & ((segment[:, :, None] == keys) | (keys == SHARED)))[:, None]


def log_probs(model: Any, rows: PackedRows, temperature: float = 1.0) -> Any:
    """[R, P] tensor, log pi of the rows' policy tokens; the vocabulary is projected only there.

    Args:
      model: of `model`.
      rows: [R, ...] packed rows, without a device axis.
      temperature: the policy is softmax(logits / temperature).
    """
    pytorch = torch()
    hidden = model.model(
        input_ids=tensor(np.asarray(rows.tokens, np.int64)),
        position_ids=tensor(np.asarray(rows.positions, np.int64)),
        attention_mask=tensor(attention_mask(rows)),
    ).last_hidden_state
    index = tensor(np.asarray(rows.token_index, np.int64))
    at = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = model.lm_head(at) / temperature
    targets = tensor(np.asarray(rows.targets, np.int64))
    return pytorch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
