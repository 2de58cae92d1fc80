"""SIGTERM, which a scheduler sends before it takes the machine away, and Ctrl-C, which we press.

A training stage finishes its update, saves a checkpoint and ends; with several processes all of
them do, after the same update, whichever of them got the signal.  Any other stage ends at once:
what it has done is on the disk already.  Run again, either goes on as if nothing had happened.

The exit code is 143 or 130, which shells and schedulers read as "ended by SIGTERM" and "ended by
Ctrl-C", not 0: to a script of stages or a Kubernetes job that would mean that the stage was
complete.  A second SIGTERM changes nothing; a second Ctrl-C ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import numpy as np

from spa_jax.runtime import distributed, interrupt

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# How long a stage that only has to clean up may take: less than the usual 30 s to the SIGKILL.
_CLEAN_UP_WITHIN_S = 15.0


class Stopped(SystemExit):
    """This process ends because of a signal; its code is 128 + the signal's number.

    Attributes:
      message: what is said.
      reason: "stopped by SIGTERM" or "stopped by Ctrl-C".
      agreed: every process ends here, none has to hear of it.
    """

    def __init__(self, number: int, after: str, agreed: bool):
        super().__init__(128 + number)
        self.reason = f"stopped by {_NAMES[signal.Signals(number)]}"
        self.message = f"{self.reason}{after}; run the same command again to continue"
        self.agreed = agreed


class _Signal:
    """Which signal has come, and who wants to know."""

    came = 0  # its number
    of_any = 0  # the number of one that any process got, once all know of it
    deferred = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within it, both signals do as this module says; the others hear of an end.

    Ctrl-C does so in a program that has called `interrupt.install`.
    """
    interrupt.insist()
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        with interrupt.answered_by(_CTRL_C):
            yield
    except Stopped as stopped:
        distributed.say(stopped.message)
        if not stopped.agreed:
            _tell_others(stopped)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    del number, frame
    _on_signal(signal.SIGTERM)


def _on_ctrl_c() -> None:
    _on_signal(signal.SIGINT)


def _on_signal(number: int) -> None:
    if _Signal.came:
        return  # what the first one started must not be interrupted
    _Signal.came = number
    if not _Signal.deferred:
        _end(number)


def _leave() -> NoReturn:
    """Ends the process at Ctrl-C from another thread: the main one is in a compilation, say."""
    stopped = Stopped(signal.SIGINT, "", agreed=False)
    interrupt.say(stopped.message)
    _tell_others(stopped)
    os._exit(interrupt.EXIT_CODE)


def _tell_others(stopped: Stopped) -> None:
    """Ends this process and all others, if there are any."""
    if distributed.count() > 1:
        assert isinstance(stopped.code, int)
        distributed.fail(f"was {stopped.reason}; run again to continue", stopped.code)


def _waits_for() -> str:
    return "this update, which is saved" if _Signal.deferred else ""


_CTRL_C = interrupt.Answer(_on_ctrl_c, _leave, _waits_for)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it the signals interrupt nothing: `asked` tells of them, after every update."""
    _Signal.deferred = True
    try:
        yield
    finally:
        _Signal.deferred = False
    if _Signal.came:  # after the last time that it was asked for
        _end(_Signal.came)


def asked() -> bool:
    """Whether any process got a signal.  A collective: all call it after the same update."""
    # Of two signals SIGTERM, the larger number, is what all processes end with.
    _Signal.of_any = int(distributed.gather(np.array([_Signal.came])).max())
    return bool(_Signal.of_any)


def stop(update: int, total: int) -> NoReturn:
    """Ends this process after an update that is saved; every process calls it.

    Raises:
      Stopped: always.
    """
    _end(_Signal.of_any, f" after update {update} of {total}, which is saved", agreed=True)


def _end(number: int, after: str = "", agreed: bool = False) -> NoReturn:
    timer = threading.Timer(_CLEAN_UP_WITHIN_S, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
    raise Stopped(number, after, agreed)
