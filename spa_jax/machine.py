"""What a program runs on: the commit of its source, versions, processor and accelerator."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def commit() -> dict[str, Any]:
    """The commit of the source, and whether its tracked files are as committed.

    None where the source is no checkout: the versions say what is installed.
    """
    root = pathlib.Path(__file__).parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "clean": None}
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": head or None, "clean": None if changes is None else not changes}


def _git(root: pathlib.Path, *command: str) -> str | None:
    """What a git command says; None if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Of Python, what computes, and this package; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*_PACKAGES, "spa_jax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe() -> dict[str, Any]:
    """The processor, the accelerator if there is one, and the memory in GiB."""
    import jax

    devices = jax.devices()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "platform": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
