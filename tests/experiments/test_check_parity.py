"""The parity check as a command: what it prints, and its exit codes."""

import pathlib
import re
import shutil

import numpy as np

from tests import programs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "released"


def test_the_authors_numbers_are_reproduced():
    said = programs.succeed("check_parity", f"--golden={GOLDEN}").splitlines()
    cases = [re.fullmatch(r"(\w+): \d+ arrays, largest error .* at .*: ok", line) for line in said]
    names = ["gae", "rewards", "progress", "ppo_lora", "ppo_right"]
    assert [m.group(1) for m in cases if m] == names
    assert re.fullmatch(
        r"RESULT cases=5 misses=0 max_error=\S+ of_tolerance=0\.\d+ unchecked=0", said[-1]
    )


def test_a_number_that_was_changed_is_a_miss(tmp_path):
    for name in ("gae", "rewards"):
        for suffix in (".npz", ".json"):
            shutil.copyfile(GOLDEN / f"{name}{suffix}", tmp_path / f"{name}{suffix}")
    with np.load(tmp_path / "gae.npz") as file:
        arrays = dict(file)
    arrays["c07/returns"][0, 11] += 1e-3
    np.savez(tmp_path / "gae.npz", **arrays)
    done = programs.run("check_parity", f"--golden={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert re.search(r"^gae: .*: MISS$", done.stdout, re.M)
    assert re.search(r"^  MISS c07/returns\[0, 11\]: error 1\.0", done.stdout, re.M)
    assert re.search(r"^rewards: .*: ok$", done.stdout, re.M)
    assert re.search(r"^RESULT cases=2 misses=1 ", done.stdout, re.M)


def _refused(folder) -> str:
    done = programs.run("check_parity", f"--golden={folder}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "RESULT" not in done.stdout
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return said


def test_a_folder_without_a_case_is_refused(tmp_path):
    assert "holds no case" in _refused(tmp_path)
    assert "no such folder" in _refused(tmp_path / "absent")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "gae.npz").write_bytes(b"PK\3\4 half")
    (tmp_path / "gae.json").write_text('{"gae": []}')
    assert f"{tmp_path / 'gae.npz'}: not a readable .npz file" in _refused(tmp_path)
