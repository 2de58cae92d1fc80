"""Our environment against episodes of the published one's rules, recorded in another process."""

import copy
import json
import lzma
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spa_jax.envs.virtualhome.conformance import check, normal
from spa_jax.errors import UserError


def _record(data: Path, out: Path, hash_seed: int) -> list[Any]:
    subprocess.run(
        [sys.executable, "-m", "tests.envs.virtualhome.record", str(data), str(out)],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
    )
    return json.loads((out / "cases_episodes.json").read_text())


@pytest.fixture(scope="module")
def recorded(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Eight episodes; those with a full cupboard meet the order of hashes."""
    return _record(corpus_folder, tmp_path_factory.mktemp("cases"), hash_seed=1)


def _write(folder: Path, cases: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cases_episodes.json").write_text(json.dumps(cases))
    return folder


@pytest.mark.parametrize("hash_seed", [1, 2, 3])
def test_what_is_recorded_under_any_hash_seed_agrees(
    corpus_folder: Path, tmp_path: Path, hash_seed: int
) -> None:
    cases = _record(corpus_folder, tmp_path, hash_seed)
    assert len(cases) == 8 and {case["success"] for case in cases} >= {True}
    report = check(corpus_folder, tmp_path)
    assert report.ok and report.agreement == 1.0, report.lines


def _first_observation(case: Any) -> None:
    case["log"][-1][1] = case["log"][-1][1].replace("CLEAN", "DIRTY", 1)


_CHANGES: dict[str, Callable[[Any], None]] = {
    "a state": _first_observation,
    "a thing left out": lambda c: c["log"][-1].__setitem__(
        1, "Observation: " + c["log"][-1][1].partition(", ")[2]
    ),
    "a thing twice": lambda c: c["log"][-1].__setitem__(
        1, c["log"][-1][1].replace(": ", ": television is CLEAN, television is CLEAN, ", 1)
    ),
    "nothing happens": lambda c: c["log"][2].__setitem__(1, "Observation: Nothing happens."),
    "a blank": lambda c: c["log"][1].__setitem__(1, c["log"][1][1] + " "),
    "the introduction": lambda c: c["log"][0].__setitem__(1, c["log"][0][1].upper()),
    "success": lambda c: c.__setitem__("success", not c["success"]),
    "steps": lambda c: c.__setitem__("steps", c["steps"] + 1),
    "the reason": lambda c: c.__setitem__("reason", "max_steps"),
    "the reward": lambda c: c.__setitem__("reward", 0),
    "the goal": lambda c: c["task"]["revised_graph"]["revised_nodes"].pop(),
    "an object": lambda c: c["task"]["object_id_dict"].__setitem__("character", 1),
    "a step too many": lambda c: c["log"].append(["stand up", "Observation: Nothing happens."]),
    "a step too few": lambda c: c["log"].pop(),
    "the description": lambda c: c["task"].__setitem__("description", "Another."),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_a_changed_value_is_found(
    corpus_folder: Path, recorded: list[Any], tmp_path: Path, change: str
) -> None:
    cases = copy.deepcopy(recorded[:1])
    _CHANGES[change](cases[0])
    assert cases != recorded[:1]
    report = check(corpus_folder, _write(tmp_path, cases))
    assert not report.ok and report.agreement < 1.0
    assert any("file1_1" in line for line in report.lines)


def test_packed_cases_and_data_will_do(
    corpus_folder: Path, recorded: list[Any], tmp_path: Path
) -> None:
    packed = tmp_path / "virtualhome"
    packed.mkdir()
    with lzma.open(packed / "cases_episodes.json.xz", "wt") as file:
        json.dump(recorded[:1], file)
    with tarfile.open(packed / "virtualhome_data.tar.xz", "w:xz") as archive:
        archive.add(corpus_folder, "corpus")
    assert check(str(tmp_path), str(tmp_path)).ok


def test_missing_cases_and_data_are_named(
    corpus_folder: Path, recorded: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no cases_episodes\.json"):
        check(corpus_folder, tmp_path)
    recorded = copy.deepcopy(recorded)
    cases = _write(tmp_path / "cases", recorded)
    with pytest.raises(UserError, match="lacks the programs"):
        check(tmp_path, cases)
    del recorded[0]["reward"]
    for broken in ("[1]", "[]", "{", json.dumps(recorded)):
        (cases / "cases_episodes.json").write_text(broken)
        with pytest.raises(UserError, match="holds no cases"):
            check(corpus_folder, cases)


def test_normal_form_forgets_order_and_nothing_else() -> None:
    text = "bed is CLEAN, lamp is ON and CLEAN, lamp ON bed. You have mug, key. "
    assert normal(text) == normal(
        "lamp ON bed, lamp is CLEAN and ON, bed is CLEAN. You have mug, key. "
    )
    different = [
        text.replace("mug, key", "key, mug"),
        text.replace("ON bed", "ON lamp"),
        text.strip(),
        text.replace("ON and CLEAN", "OFF and CLEAN"),
        text.replace("bed is CLEAN, ", ""),
        "",
        text.replace("lamp ON bed", "lamp ON bed, lamp ON bed"),
        "Nothing happens.",
    ]
    assert all(normal(text) != normal(other) for other in different)
