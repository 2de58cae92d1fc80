"""The devices of a TPU that is not there, to compile for: libtpu's own compiler, on any machine."""

import os
import pathlib
import re
import sys
from importlib import util

import jax
from jax.experimental import topologies

from spa_jax import chips
from spa_jax.errors import UserError

# What libtpu asks of a machine with chips; it believes this of one without.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # There is no chip that two processes could quarrel about.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, such as the eight of v5e:2x4.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    chips.of(topology)
    apart = pathlib.Path(sys.prefix) / "tpu/libtpu/libtpu.so"
    if apart.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(apart))
    elif util.find_spec("libtpu") is None:
        raise UserError("--compile needs the TPU's compiler: run `make setup-tpu` once")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of XLA, JAX and the library's loader
        first = re.sub(r"\s+", " ", str(error).strip())[:300]
        raise UserError(f"--compile={topology}: the compiler cannot make it: {first}") from error
    return list(found.devices)
