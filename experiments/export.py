"""Writes a trained policy for other programs: a Hugging Face folder, or a PEFT adapter's.

    python -m experiments.export --checkpoint=W/iteration_0/ppo --out=DIR
    python -m experiments.export --checkpoint=W/iteration_0/ppo --out=DIR --adapter

DIR holds README.md (a model card), config.json, model.safetensors, the tokenizer and its chat
template, adapters merged; with --adapter it holds adapter_config.json and
adapter_model.safetensors, for the base that they name.  The value and progress heads lie in
heads/heads.safetensors (names such as "value/hidden/kernel"): a server that takes every
safetensors file of DIR for weights reads none.  The other stages read either with --policy=DIR.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax import export
from spa_jax.config import Dtype
from spa_jax.runtime import setup


def main(argv: Sequence[str]) -> None:
    del argv
    setup.prepare_jax()
    out = pathlib.Path(_OUT.value)
    dtype: Dtype = "bfloat16" if _DTYPE.value == "bfloat16" else "float32"
    heads = export.export(
        pathlib.Path(_CHECKPOINT.value),
        out,
        adapter=_ADAPTER.value,
        progress=_PROGRESS.value,
        dtype=dtype,
    )
    print(f"RESULT out={out} heads={','.join(heads) or 'none'}")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a stage (W/sft, W/iteration_0/ppo) or of a policy.",
        required=True,
    )
    _OUT = flags.DEFINE_string("out", None, "The folder to write.", required=True)
    _ADAPTER = flags.DEFINE_bool("adapter", False, "Write the LoRA adapter alone, for PEFT.")
    _PROGRESS = flags.DEFINE_string(
        "progress", "", "Folder of the progress head; by default that of the policy's round."
    )
    _DTYPE = flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of the weights that are written."
    )
    flags_lib.run(main)
