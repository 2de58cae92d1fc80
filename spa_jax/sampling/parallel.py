"""Several engines, each on local devices of its own, behind the face of a single one.

    slots      0 1 2 3   4 5 6 7        two engines, four slots each
    engine     0 0 0 0   1 1 1 1
    its slot   0 1 2 3   0 1 2 3

The engines share nothing, and only the devices of one exchange anything: each process of a pod
plays on its own devices at its own pace.  An episode's tokens are the same on any of them.
"""

import concurrent.futures
from collections.abc import Callable, Sequence

from spa_jax.sampling.engine import Engine, Response, Usage
from spa_jax.sampling.placement import Devices


class ParallelEngine:
    """Several `Engine`s.

    Attributes:
      slots: conversations held at once, on all engines together.
    """

    def __init__(
        self, make: Callable[[int, Devices], Engine], slots: int, devices: Sequence[Devices]
    ) -> None:
        """Makes the engines.

        Args:
          make: (slots, devices) -> an engine; all of one kind.
          slots: the most that there shall be; each engine gets as many as the others.
          devices: those of each engine; no more engines than `slots`.
        """
        each = slots // len(devices)
        self._engines = [make(each, own) for own in devices]
        self._each = each
        self._pool = concurrent.futures.ThreadPoolExecutor(len(devices))
        self.slots = each * len(devices)
        self.context_length = self._engines[0].context_length
        self.sampling = self._engines[0].sampling

    @property
    def usage(self) -> Usage:
        """Of all engines: tokens are added up, and seconds are the mean: they pass together."""
        parts = [engine.usage for engine in self._engines]
        return Usage(
            prefill_s=sum(p.prefill_s for p in parts) / len(parts),
            decode_s=sum(p.decode_s for p in parts) / len(parts),
            prefilled=sum(p.prefilled for p in parts),
            reused=sum(p.reused for p in parts),
            generated=sum(p.generated for p in parts),
            places=sum(p.places for p in parts),
            read_s=sum(p.read_s for p in parts) / len(parts),
        )

    @property
    def compiled(self) -> int:
        """See `Engine.compiled`: of all engines."""
        return sum(engine.compiled for engine in self._engines)

    @property
    def busy(self) -> bool:
        """See `Engine.busy`."""
        return any(engine.busy for engine in self._engines)

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        list(self._pool.map(Engine.warm_up, self._engines))

    def open(self, slot: int, episode: int) -> None:
        """See `Engine.open`."""
        engine, own = self._at(slot)
        engine.open(own, episode)

    def fits(self, slot: int, ids: Sequence[int]) -> bool:
        """See `Engine.fits`."""
        engine, own = self._at(slot)
        return engine.fits(own, ids)

    def submit(self, slot: int, ids: Sequence[int]) -> None:
        """See `Engine.submit`."""
        engine, own = self._at(slot)
        engine.submit(own, ids)

    def advance(self) -> dict[int, Response]:
        """See `Engine.advance`; they work at the same time."""
        responses: dict[int, Response] = {}
        for number, ended in enumerate(self._pool.map(Engine.advance, self._engines)):
            responses |= {number * self._each + own: turn for own, turn in ended.items()}
        return responses

    def _at(self, slot: int) -> tuple[Engine, int]:
        return self._engines[slot // self._each], slot % self._each
