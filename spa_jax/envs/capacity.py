"""How many sessions a machine's memory has room for."""

from pathlib import Path

import psutil

from spa_jax.envs.benchmarks import Benchmark

MOST_SESSIONS = 256
# Of the free memory: the rest is for the server, the fork server and what grows.
_SHARE = 0.8
_MB = 2**20
# A container's memory limit, what it uses, and the key of page cache in its statistics.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _free_in(folder: str, limit: str, used: str, cache: str) -> float:
    """Bytes that a control group may still take; infinite without a limit."""
    try:
        most = int((Path(folder) / limit).read_text())
        now = int((Path(folder) / used).read_text())
        statistics = (Path(folder) / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in statistics if line.split()[0] == cache)
    except (OSError, ValueError):  # no such version of control groups, or "max"
        return float("inf")
    return most - now + cached


def free_mb() -> float:
    """Memory that new processes can take, in MB, in the container that this is, if it is one."""
    free = [_free_in(*group) for group in _CGROUPS]
    return min(psutil.virtual_memory().available, *free) / _MB


def sessions(benchmark: Benchmark, free: float) -> int:
    """How many sessions of an environment `free` MB have room for: 1 to MOST_SESSIONS."""
    return max(1, min(MOST_SESSIONS, int(_SHARE * free / benchmark.worker_mb)))
