"""SIGTERM: what a scheduler sends before it takes the machine away.

A training stage finishes its update, saves a checkpoint and ends; with several processes all of
them do, after the same update, whichever of them was told.  Any other stage ends at once: what it
has done is on the disk already.  Run again, either goes on as if nothing had happened.

The exit code is 143, which shells and schedulers read as "ended by SIGTERM", not 0: to a script
of stages or a Kubernetes job that would mean that the stage was complete.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import numpy as np

from spa_jax.runtime import distributed

EXIT_CODE = 128 + signal.SIGTERM
# How long a stage that only has to clean up may take: less than the usual 30 s to the SIGKILL.
_CLEAN_UP_WITHIN_S = 15.0


class Stopped(SystemExit):
    """This process ends because of SIGTERM.

    Attributes:
      message: what is said.
      agreed: every process ends here, none must be told.
    """

    def __init__(self, message: str, agreed: bool):
        super().__init__(EXIT_CODE)
        self.message = message
        self.agreed = agreed


class _Signal:
    """What has come, and who wants to know."""

    came = False
    deferred = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within it, SIGTERM does as this module says; the others are told of an end."""
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    except Stopped as stopped:
        distributed.say(stopped.message)
        if distributed.count() > 1 and not stopped.agreed:
            distributed.fail("was stopped by SIGTERM; run again to continue", EXIT_CODE)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    del number, frame
    if _Signal.came:
        return  # what the first one started must not be interrupted
    _Signal.came = True
    if not _Signal.deferred:
        _end("stopped by SIGTERM", agreed=False)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it SIGTERM interrupts nothing: `asked` tells of it, after every update."""
    _Signal.deferred = True
    try:
        yield
    finally:
        _Signal.deferred = False
    if _Signal.came:  # after the last time that it was asked for
        _end("stopped by SIGTERM", agreed=False)


def asked() -> bool:
    """Whether any process got SIGTERM.  A collective: all call it after the same update."""
    return bool(distributed.gather(np.array([_Signal.came])).any())


def stop(update: int, total: int) -> NoReturn:
    """Ends this process after an update that is saved; every process calls it.

    Raises:
      Stopped: always.
    """
    _end(f"stopped by SIGTERM after update {update} of {total}, which is saved", agreed=True)


def _end(what: str, agreed: bool) -> NoReturn:
    timer = threading.Timer(_CLEAN_UP_WITHIN_S, os._exit, (EXIT_CODE,))
    timer.daemon = True
    timer.start()
    raise Stopped(f"{what}; run the same command again to continue", agreed)
