"""Texts of others: what no encoding can write is replaced."""

import re

_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can carry half of a pair, UTF-8 cannot


def replace_surrogates(text: str) -> tuple[str, int]:
    """A text with U+FFFD for each lone surrogate, and how many there were."""
    return _LONE_SURROGATE.subn("\ufffd", text)
