"""How a program that computes begins: memory, compilation cache, the other processes, signals."""

import ctypes
import mmap
import os
import pathlib
from collections.abc import Callable

import jax
from absl import logging

from spa_jax.config import DistributedConfig
from spa_jax.runtime import distributed, interrupt, preemption

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_HUGE_PAGE = 2 * 2**20


def program(main: Callable[[], object], config: DistributedConfig) -> None:
    """Runs a stage: with JAX prepared, the other processes joined, SIGTERM and Ctrl-C heeded.

    Raises:
      UserError: the processes do not find each other, or differ in their number of devices.
    """
    prepare_jax()
    distributed.initialize(config)
    with distributed.ending_together(), preemption.handled():
        distributed.check_devices()
        main()


def keep_freed_memory() -> None:
    """Lets glibc keep what XLA frees on a CPU, instead of giving it back to the system.

    A training step allocates gigabytes of temporaries; fetched from the system each time,
    they cost a page fault every 4 KiB: a fifth of an SFT update on two cores, nothing with
    this.  One arena, because those of threads give back whatever they free; so it must be
    called before JAX starts its threads.  Pages of 2 MiB, where the system gives them to those
    who ask, took another tenth to seventh off.  Does nothing where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # becomes the largest size_t: never
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
    # The heap grows once, here, by addresses alone, and its pages will be huge ones.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    libc.malloc.restype = ctypes.c_void_p
    heap = libc.malloc(ctypes.c_size_t(size))
    if heap:
        start = -(-heap // _HUGE_PAGE) * _HUGE_PAGE
        length = ctypes.c_size_t(heap + size - start)
        libc.madvise(ctypes.c_void_p(start), length, mmap.MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))


def prepare_jax() -> None:
    """Settings of every binary that computes: a compilation cache, and memory that is kept."""
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators are absent
    keep_freed_memory()
    interrupt.watch()  # a thread, so it comes after the memory's settings
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "spa_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
