"""What a conformance check of an environment answers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conformance check found: `lines` to print, `agreement` in [0, 1], `ok` whether every
    threshold held."""

    lines: tuple[str, ...]
    agreement: float
    ok: bool
