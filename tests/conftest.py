"""For every test: eight virtual devices on the CPU, and compiled programs that are kept."""

import gc
import os
import pathlib
import subprocess
import sys

import pytest

# Read when jax is first imported, so before any test module is.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Compiles with XLA's older emitters, which JAX 0.12 no longer has: a third of the time less.
_OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def _accepted(flag: str) -> bool:
    """Whether this JAX knows the flag; one that does not aborts the process."""
    use = [sys.executable, "-c", "import jax; jax.devices()"]
    probe = subprocess.run(use, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True)
    return probe.returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Fast tests spend most of their time in the compiler, so it optimises little for them.

    The slow ones, which run a real model, get the programs that users get.
    """
    if config.option.markexpr != "not slow" or "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        return  # a worker has what its parent chose
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if _accepted(_OLD_EMITTERS):
        os.environ["XLA_FLAGS"] += f" {_OLD_EMITTERS}"


# Every compiled program takes some areas of memory for itself, and Linux lets a process have 65,530
# (vm.max_map_count): the compiler aborts the process that wants more.
_MOST_AREAS = 20_000


def _areas() -> int:
    """The areas of memory that this process has; 0 where the system does not say."""
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets compiled programs between modules when there are many; the disk still has them."""
    between = nextitem is None or nextitem.path != item.path
    if between and "jax" in sys.modules and _areas() > _MOST_AREAS:
        sys.modules["jax"].clear_caches()
        gc.collect()
