import mmap
import sys

import pytest

from spa_jax.limited import limited


def _fill(mebibytes):
    """Memory that is the system's, whatever this process had and gave back before."""
    held = []
    for _ in range(mebibytes):
        held.append(mmap.mmap(-1, 1 << 20))
        held[-1].write(b"x" * (1 << 20))


def _count_for_ever():
    number = 0
    while True:
        number += 1


def test_what_takes_too_much_is_stopped():
    before = sys.gettrace()
    with pytest.raises(TimeoutError, match="takes more than 16 MiB"):
        with limited(seconds=20, mebibytes=16):
            _fill(400)
    with pytest.raises(TimeoutError, match="has not ended after 0.1 seconds"):
        with limited(seconds=0.1, mebibytes=512):
            _count_for_ever()
    assert sys.gettrace() is before


def test_what_does_not_is_let_be():
    with limited(seconds=20, mebibytes=400):
        _fill(8)
