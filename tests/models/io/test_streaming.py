"""Reading a model takes the memory of the model and of its largest tensor, no more."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does"
)
ROOT = pathlib.Path(__file__).parents[3]

# 55 million parameters: 110 MB of bfloat16 in three shards, 220 MB of float32 once read.
_WRITE = """
import json, pathlib, sys
import ml_dtypes, numpy as np, safetensors.numpy
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import hf_config, weights
from spa_jax.models.io import tensors as tensors_io
from spa_jax.models.names import hf_shapes

CONFIG = ModelConfig(
    vocab_size=8000, hidden_size=1024, num_layers=3, num_heads=16, num_kv_heads=16, head_dim=64,
    intermediate_size=2800, tie_embeddings=False,
)
folder = pathlib.Path(sys.argv[1])
shapes = hf_shapes(CONFIG)
shards = {f"model-{i + 1:05}-of-00003.safetensors": list(shapes)[i::3] for i in range(3)}
for file, names in shards.items():
    tensors = {name: np.full(shapes[name], 0.5, ml_dtypes.bfloat16) for name in names}
    safetensors.numpy.save_file(tensors, folder / file)
index = {name: file for file, names in shards.items() for name in names}
(folder / weights.INDEX).write_text(json.dumps({"weight_map": index}))
tensors_io.write_json(folder / "config.json", hf_config.write(CONFIG, "bfloat16", {}))
"""

_READ = """
import json, resource, sys, tracemalloc
import numpy as np
from spa_jax.models.io import huggingface
from spa_jax.models.names import hf_shapes

def data_bytes():  # what the limit below counts: private memory, not the mapped files
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmData:")[1].split()[0])

config, params = huggingface.load_pretrained(sys.argv[1])
sizes = [4 * int(np.prod(shape)) for shape in hf_shapes(config).values()]
del params

tracemalloc.start()
config, params = huggingface.load_pretrained(sys.argv[1])
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
right = float(params["layers"]["up"]["kernel"].mean())
del params

def fits(budget):
    limit = data_bytes() + budget
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        huggingface.load_pretrained(sys.argv[1])
    except MemoryError:
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    return True

model, largest = sum(sizes), max(sizes)
print(json.dumps({
    "model": model, "largest": largest, "peak": peak, "right": right,
    "fits": fits(model + largest + 8 * 2**20), "control": fits(model - 8 * 2**20),
}))
"""


def _python(source: str, *arguments: pathlib.Path) -> str:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    # Large arrays have pages of their own, which go back when they are freed: malloc would else
    # keep some from an earlier load, and they would be room that no limit knows of.
    environment = dict(os.environ) | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sharded_model_is_read_tensor_by_tensor(tmp_path):
    _python(_WRITE, tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) > 100e6
    found = json.loads(_python(_READ, tmp_path))
    assert found["model"] < found["peak"] <= found["model"] + found["largest"]
    assert found["fits"]
    assert not found["control"]  # the limit does limit
    assert found["right"] == 0.5


_IMPORT = """
import json, sys, tracemalloc
import gguf, numpy as np
from tests import tiny
from tests.models.io import test_gguf
from spa_jax.models.config import ModelConfig
from spa_jax.models.io import gguf as gguf_io

CONFIG = ModelConfig(
    vocab_size=384, hidden_size=1024, num_layers=3, num_heads=16, num_kv_heads=16, head_dim=64,
    intermediate_size=2816, max_position=256,
)
root = sys.argv[1]
words = tiny.tiny_tokenizer(__import__("pathlib").Path(root) / "tokenizer")
kinds = dict.fromkeys(
    ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    gguf.GGMLQuantizationType.Q8_0,
)
params = tiny.random_params(CONFIG)
test_gguf.write_gguf(root + "/m.gguf", CONFIG, params, words, types=kinds)
model = sum(4 * x.size for x in __import__("jax").tree.leaves(params))
largest = 4 * 1024 * 2816
del params
tracemalloc.start()
gguf_io.import_gguf(root + "/m.gguf", root + "/m")
print(json.dumps({"model": model, "largest": largest, "peak": tracemalloc.get_traced_memory()[1]}))
"""


def test_a_gguf_file_is_converted_tensor_by_tensor(tmp_path):
    found = json.loads(_python(_IMPORT, tmp_path))
    assert found["peak"] < found["model"] + found["largest"]
    assert found["peak"] < 8 * found["largest"] < found["model"]  # not the model at all
