"""Connections that have not asked for anything yet: how many, and for how long.

Whoever reaches the port can open one, say half a request, and wait.  Such connections hold no
session's place.  Each has some seconds, and where there are too many the one that has waited
longest is closed, so that whoever comes and asks is answered.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class Waiting:
    """Those who wait, the one who has waited longest first.

    Args:
      most: how many there may be.
    """

    def __init__(self, most: int):
        self._most = most
        self._who: dict[Any, Any] = {}

    def __contains__(self, who: Any) -> bool:
        return who in self._who

    def __len__(self) -> int:
        return len(self._who)

    def add(self, who: Any, leave: Any) -> None:
        """Adds one who waits; calls the `leave` of the one who has waited longest if it is full."""
        self._who[who] = leave
        if len(self._who) > self._most:
            oldest = next(iter(self._who))
            self._who.pop(oldest)()

    def discard(self, who: Any) -> None:
        """Whoever has asked, or is gone, waits no longer."""
        self._who.pop(who, None)


def bounded(most: int, seconds: float) -> type[asyncio.Protocol]:
    """An HTTP protocol for uvicorn that closes connections which bring no whole request head.

    Args:
      most: how many connections may wait for one.
      seconds: how long each has.
    """
    waiting = Waiting(most)

    class Bounded(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        """uvicorn's own protocol, with a clock that runs while no request is being answered."""

        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.transport.get_protocol() is not self or self._answers():
                self._end()
            elif self._clock is None:  # the next request of a connection that is kept
                self._begin()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            super().connection_lost(exc)

        def _answers(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _begin(self) -> None:
            self._clock = self.loop.call_later(seconds, self._leave)
            waiting.add(self, self._leave)

        def _end(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None
            waiting.discard(self)

        def _leave(self) -> None:
            self._end()
            if self.transport.get_protocol() is self and not self._answers():
                self.transport.abort()

    return Bounded
