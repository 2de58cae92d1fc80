"""The planner's translations that are kept on the disk."""

import os
from pathlib import Path

from spa_jax.envs.alfworld import translation


class _Counted:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, domain: str, problem: str) -> tuple[str, str]:
        self.calls.append((domain, problem))
        return domain, problem


def test_a_text_is_translated_once(tmp_path: Path) -> None:
    first, second = _Counted(), _Counted()
    asked = [("a", "b"), ("ab", ""), ("a", "b")]
    assert [translation.cached(first, tmp_path / "new")(*text) for text in asked] == asked
    assert first.calls == [("a", "b"), ("ab", "")]
    assert [translation.cached(second, tmp_path / "new")(*text) for text in asked] == asked
    assert not second.calls
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_broken_file_is_made_anew(tmp_path: Path) -> None:
    counted = _Counted()
    translate = translation.cached(counted, tmp_path)
    translate("a", "b")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[:-3], b"x" * 40):
        file.write_bytes(broken)
        assert translate("a", "b") == ("a", "b")
        assert file.read_bytes() == whole
    assert len(counted.calls) == 4


def test_a_folder_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counted = _Counted()
    translate = translation.cached(counted, tmp_path / "file")
    assert translate("a", "b") == translate("a", "b") == ("a", "b")
    assert len(counted.calls) == 2
    assert os.listdir(tmp_path) == ["file"]
