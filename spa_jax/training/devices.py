"""The devices of all processes, and arrays on them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from spa_jax.runtime import distributed


def of_all_processes(count: int | None) -> list[jax.Device]:
    """The devices of all processes, one process after the other; or the first `count`."""
    processes = range(jax.process_count())
    return [d for p in processes for d in jax.local_devices(process_index=p)][:count]


def of_this_process(devices: list[jax.Device]) -> list[jax.Device]:
    return [d for d in devices if d.process_index == jax.process_index()]


def part(batch: Any, devices: int) -> Any:
    """This process's part of a microbatch of all: `devices` of its leading axis."""
    start = devices * distributed.index()
    return jax.tree.map(lambda x: x[start : start + devices], batch)


def place(host: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, where the shardings say."""
    if distributed.count() == 1:
        return jax.device_put(host, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, host)
    # device_put would compare the values among all processes at every call.
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda at: np.asarray(x)[at]),
        host,
        shardings,
    )
