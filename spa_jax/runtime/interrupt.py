"""Ctrl-C: the first press asks the program to end, the second ends it at once.

    first press    the main thread answers it: it ends the program, now or after an update
    second press   ends the process, whatever the main thread does

Python tells the main thread of a signal between two of its own instructions, and one of them may
be a compilation of minutes or a collective that hangs.  So a second thread hears of every press.
A program ends with exit code 130, which shells read as "ended by Ctrl-C", and with one line.

Imports only the standard library: `experiments/__init__.py` needs this before JAX is imported,
which takes seconds, and so does the environment server, which never imports it.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

EXIT_CODE = 128 + signal.SIGINT
STOPPED = "stopped by Ctrl-C"
# The main thread must answer the first press within this time, or wait for an update.
_ANSWER_WITHIN_S = 3.0
_AGAIN_AFTER_S = 0.01  # see `insist`
_WAKE_AFTER_S = 0.2  # see `_wake`


def leave() -> NoReturn:
    """Ends the process at the first press, where nothing has to be cleaned up."""
    say(STOPPED)
    os._exit(EXIT_CODE)


def raise_interrupt() -> NoReturn:
    """Ends what the main thread does, as Python does without this module."""
    raise KeyboardInterrupt


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a part of a program does at the first press.

    Attributes:
      act: called in the main thread.
      leave: ends the process from another thread, if the main thread does not come to `act`.
      waits_for: what `act` lets the program finish first, in words; "" if it ends at once.
    """

    act: Callable[[], None]
    leave: Callable[[], NoReturn] = leave
    waits_for: Callable[[], str] = lambda: ""


class _State:
    answer = Answer(leave)
    presses = 0  # that the main thread knows of
    answered = threading.Lock()  # taken by the thread that answers the first press
    ending = threading.Lock()  # taken by the thread that ends the process at the second
    watched = False
    insists = False
    dropped: BaseException | None = None  # by Python; to be raised again


def install() -> None:
    """Handles Ctrl-C from now on.

    Does nothing where SIGINT is ignored, as in a background job of a script, or where somebody
    else handles it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_press)
        insist()


def insist() -> None:
    """What a signal's handler raises ends the main thread, also if Python drops it at first.

    Python drops what is raised in a callback of its garbage collector or in a `__del__`, and JAX
    has such a callback: of twelve presses during exploration two came just then.  The exception
    is raised again a moment later, by SIGALRM, which nothing else here uses.
    """
    if _State.insists:
        return
    _State.insists = True
    report = sys.unraisablehook

    def drop(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            _State.dropped = unraisable.exc_value
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER_S)
        else:
            report(unraisable)

    sys.unraisablehook = drop
    signal.signal(signal.SIGALRM, _raise_again)


def _raise_again(number: int, frame: FrameType | None) -> None:
    del number, frame
    dropped, _State.dropped = _State.dropped, None
    if dropped is not None:
        raise dropped


def watch() -> None:
    """Starts the thread that hears of every press; does nothing without `install`."""
    if _State.watched or signal.getsignal(signal.SIGINT) is not _on_press:
        return
    _State.watched = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True, name="watch for Ctrl-C").start()


@contextlib.contextmanager
def answered_by(answer: Answer) -> Iterator[None]:
    """Within it, the first press is answered like this."""
    before, _State.answer = _State.answer, answer
    try:
        yield
    finally:
        _State.answer = before


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """A process that is started within it never sees Ctrl-C: who started it ends it."""
    # Python's helper, which starts before the first process, unblocks the signal for us.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once() -> NoReturn:
    """Ends the process at the second press."""
    if not _State.ending.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    say("ended at once: Ctrl-C was pressed again")
    os._exit(EXIT_CODE)


def say(message: str) -> None:
    """Writes a line to the standard error, in place of a progress bar or the terminal's ^C.

    Without buffers and locks, which an interrupted thread may hold.
    """
    with contextlib.suppress(OSError):
        clear = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{clear}{message}\n".encode())


def _on_press(number: int, frame: FrameType | None) -> None:
    del number, frame
    _State.presses += 1
    if _State.presses > 1:
        end_at_once()
    if _State.answered.acquire(blocking=False):
        _State.answer.act()


def _watch(pipe: int) -> None:
    """Reads the numbers of the signals as they come."""
    presses = 0
    while numbers := os.read(pipe, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            presses += 1
            if presses > 1:
                end_at_once()
            if what := _State.answer.waits_for():
                say(f"Ctrl-C: ends after {what}; press again to end at once")
            for delay, act in ((_WAKE_AFTER_S, _wake), (_ANSWER_WITHIN_S, _leave_if_unanswered)):
                timer = threading.Timer(delay, act)
                timer.daemon = True
                timer.start()


def _wake() -> None:
    """Wakes the main thread if it has not heard of the first press.

    A press that comes between Python's last look for signals and the start of a sleep, or of
    another wait, does not interrupt it: the main thread would sleep on.
    """
    main = threading.main_thread().ident
    if not _State.presses and main is not None:
        signal.pthread_kill(main, signal.SIGALRM)


def _leave_if_unanswered() -> None:
    answer = _State.answer
    if not answer.waits_for() and _State.answered.acquire(blocking=False):
        answer.leave()
