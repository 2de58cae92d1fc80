"""Python code of others, a chat template for one, stopped when it takes too much."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

_EVENTS_BETWEEN_LOOKS = 64


@contextlib.contextmanager
def limited(*, seconds: float, mebibytes: int) -> Iterator[None]:
    """Stops what the block calls, in this thread, once it has taken so much.

    It is stopped at a line of Python: one call into C can take longer.

    Args:
      seconds: of this thread's computing.
      mebibytes: that the process may grow by.

    Raises:
      TimeoutError: it took more.
    """
    process = psutil.Process()
    end = time.thread_time() + seconds
    most = process.memory_info().rss + mebibytes * 2**20
    events = 0

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal events
        events += 1
        if events % _EVENTS_BETWEEN_LOOKS == 0:
            if time.thread_time() > end:
                raise TimeoutError(f"it has not ended after {seconds:g} seconds")
            if process.memory_info().rss > most:
                raise TimeoutError(f"it takes more than {mebibytes} MiB")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
