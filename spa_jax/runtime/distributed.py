"""Several processes of one run: how they find each other, share work and end together.

Every process runs the same program, on its own devices and with its own environment server:

    process 0   its tasks .......... barrier  update = update = ... = update  policy  barrier
    process 1   its tasks .. (waits) barrier  update = update = ... = update  (waits) barrier

Rollouts need nobody.  Updates (=) are collectives: every process must make the same number of
them, of the same shapes.  Each computes them from the same files, and `assert_equal` makes sure
that they read the same.  Files that all read are written by process 0, before a barrier.

`broadcast`, `assert_equal` and `barrier` use the key-value store of jax.distributed's coordinator,
which process 0 runs, and not collectives on the devices, which wait for ever.  A process that
fails says so in the store before it exits; a thread of every other one looks there and ends it,
even out of a collective.  One that is killed is missed by jax.distributed itself, which ends the
others after 100 s.

With one process everything here does nothing, at no cost.
"""

import atexit
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import tqdm
from jax.experimental import multihost_utils

from spa_jax.config import DistributedConfig
from spa_jax.errors import UserError, complaint

T = TypeVar("T")

_FAILED, _LEFT, _BROADCAST = "spa_jax/failed/", "spa_jax/left/", "spa_jax/broadcast/"
_LOOK_EVERY_S = 1.0  # how often a process looks whether another one failed
_LEAVE_WITHIN_S = 30.0  # how long process 0 keeps the store open for the others to look

_calls = itertools.count()  # the same in every process: they call in the same order
_ending = threading.Event()
_meet_timeout_s = DistributedConfig.meet_timeout_s


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes, before anything is computed; does nothing for a single one.

    Raises:
      UserError: the processes do not find each other, or differ in their number of devices.
    """
    global _meet_timeout_s
    if not (config.distributed or config.by_hand):
        return
    _meet_timeout_s = config.meet_timeout_s
    if config.by_hand and config.process_id > 0:
        _wait_for_coordinator(config)
    try:
        jax.distributed.initialize(
            config.coordinator_address or None,
            config.num_processes or None,
            config.process_id if config.by_hand else None,
            # Otherwise Slurm's variables would still choose one device for each process.
            cluster_detection_method="deactivate" if config.by_hand else None,
            initialization_timeout=config.connect_timeout_s,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(_why_not(config, error)) from error
    threading.Thread(target=_watch, daemon=True, name="watch the other processes").start()
    atexit.register(_ending.set)  # runs before jax.distributed's own, which closes the store


def _wait_for_coordinator(config: DistributedConfig) -> None:
    """Returns when something listens there; jax.distributed would end the program otherwise."""
    host, _, port = config.coordinator_address.rpartition(":")
    deadline = time.monotonic() + config.connect_timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"--coordinator_address={config.coordinator_address}: nothing answers there "
                    f"after {config.connect_timeout_s} s ({error}); does process 0 run on that "
                    "host, with the same address, and is the port open?"
                ) from error
        time.sleep(0.5)


def _why_not(config: DistributedConfig, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not config.by_hand:
        return (
            "--distributed: found no Cloud TPU slice, Slurm or Open MPI to learn the processes "
            f"from ({reason}); give --coordinator_address, --num_processes and --process_id"
        )
    return (
        f"process {config.process_id} of {config.num_processes} could not join the others at "
        f"--coordinator_address={config.coordinator_address} ({reason}); start all of them within "
        "--connect_timeout_s, each with its own --process_id and the same other flags"
    )


def check_devices() -> None:
    """Refuses processes with different numbers of devices.

    Raises:
      UserError: says how many each has.
    """
    counts = [len(jax.local_devices(process_index=p)) for p in range(count())]
    if len(set(counts)) > 1:
        raise UserError(f"every process needs the same number of devices, they have {counts}")


def count() -> int:
    """How many processes share the run."""
    # Asked first, because jax.process_count() starts JAX's devices: an expert needs none.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is, from 0."""
    return jax.process_index() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the files that all share."""
    return index() == 0


def share(items: Sequence[T]) -> list[T]:
    """This process's part of a list that is the same everywhere."""
    return list(items[index() :: count()])


def barrier(what: str) -> None:
    """Waits until every process is here.

    Args:
      what: the end of what; for the message, and the same everywhere.

    Raises:
      UserError: if some do not come within --meet_timeout_s.
    """
    if count() > 1:
        key = f"spa_jax/{next(_calls)}/{what}"
        with _waiting(what):
            _client().wait_at_barrier(key, _meet_timeout_s * 1000)


def broadcast(what: str, value: Callable[[], T]) -> T:
    """The value that process 0 computes, in every process.

    A process that reads a file by itself may see an older state of it than another one does (on a
    network disk, or while it is written), and would go another way.  So process 0 alone reads.

    Args:
      what: names the value, the same everywhere.
      value: computes it; JSON can hold the result.  Called in process 0 alone.

    Returns:
      The value, in every process.

    Raises:
      UserError: if process 0 does not say within --meet_timeout_s.
    """
    if count() == 1:
        return value()
    key = f"{_BROADCAST}{next(_calls)}/{what}"
    if is_first():
        found = value()
        _client().key_value_set(key, json.dumps(found))
        return found
    with _waiting(what):
        return json.loads(_client().blocking_key_value_get(key, _meet_timeout_s * 1000))


def assert_equal(what: str, value: Any) -> None:
    """Checks that every process holds the same value, and waits until all have checked.

    Args:
      what: names it, the same everywhere.
      value: compared with process 0's; JSON can hold it.

    Raises:
      UserError: if it differs, or some do not come.
    """
    theirs = broadcast(what, lambda: value)
    if theirs != value:
        raise UserError(
            f"process {index()} has other {what} than process 0 ({value}, not {theirs}): give all "
            "processes the same flags, the same data and the same --workdir"
        )
    barrier(what)


def first_alone(what: str, do: Callable[[], object]) -> None:
    """Process 0 does something; the others wait until it is done."""
    if is_first():
        do()
    barrier(what)


def gather(tree: Any) -> Any:
    """Every process's arrays, joined along their first axis in the order of the processes.

    A collective.

    Args:
      tree: a pytree of host arrays, of the same shapes everywhere.
    """
    return multihost_utils.process_allgather(tree, tiled=True) if count() > 1 else tree


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What fails within it ends this process, and the others with its message and exit code."""
    if count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        said = complaint(error)
        if said is not None:
            say(f"error: {said}")
            fail(said, 2)
        # If this came from another one's end, the watcher ends us meanwhile, with the reason.
        time.sleep(3 * _LOOK_EVERY_S)
        say("".join(traceback.format_exception(error)).rstrip())
        fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        fail("was interrupted", 130)


def fail(message: str, code: int) -> NoReturn:
    """Tells the other processes that this one ends now, and ends it.

    Not by an exception: at exit jax.distributed would wait for the others, who wait for us.
    """
    _ending.set()
    with contextlib.suppress(RuntimeError):  # the store may be what has failed
        failure = json.dumps({"message": message, "code": code})
        _client().key_value_set(f"{_FAILED}{index()}", failure)
        deadline = time.monotonic() + _LEAVE_WITHIN_S
        while is_first() and time.monotonic() < deadline:
            if len(_client().key_value_dir_get(_LEFT)) == count() - 1:
                break
            time.sleep(0.1)
    _exit(code)


def say(message: str) -> None:
    """Prints a line to the standard error, beside a progress bar."""
    with contextlib.suppress(OSError):  # whoever read it may be gone; we must end all the same
        tqdm.tqdm.write(message, file=sys.stderr)


def _watch() -> None:
    """Ends this process when another one has failed."""
    while not _ending.wait(_LOOK_EVERY_S):
        try:
            failed = _client().key_value_dir_get(_FAILED)
        except RuntimeError:
            continue  # that the coordinator is gone is jax.distributed's to say
        for key, value in failed:
            theirs = json.loads(value)
            say(f"error: process {key.rpartition('/')[2]} ended: {theirs['message']}")
            with contextlib.suppress(RuntimeError):
                _client().key_value_set(f"{_LEFT}{index()}", "")
            _exit(theirs["code"])


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"process {index()} waited at '{what}' for the others, and some did not come "
            f"({reason}); see what they said, or raise --meet_timeout_s={_meet_timeout_s}"
        ) from error


def _client() -> Any:
    """The key-value store; JAX has no public name for it, and Orbax uses this one too."""
    from jax._src import distributed

    return distributed.global_state.client
