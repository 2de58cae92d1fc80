"""The recorded cases: all are reproduced, and no recorded number may be another.

`tests/golden/released` was recorded from the authors' code, `tests/golden/released_extra` made
with TRL for the settings that those leave out.
"""

import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.parity import cases, files, ppo

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RELEASED, EXTRA = GOLDEN / "released", GOLDEN / "released_extra"
QUICK = {"ppo_accumulate_clip", "ppo_edge_full_accumulate", "ppo_left"}


def _extra_cases():
    """Those that are not the authors', which tests/experiments/test_check_parity.py checks."""
    for case in cases.find(EXTRA):
        slow = case.name not in QUICK
        yield pytest.param(case, id=case.name, marks=[pytest.mark.slow] if slow else [])


def _copy(folder, to, *names):
    """The files of `folder` that begin with one of the names."""
    for path in folder.iterdir():
        if path.name.startswith(names):
            shutil.copyfile(path, to / path.name)
    return to


def _change(path, name, by, at=0):
    """Adds to one element of one array of a file."""
    arrays = files.read_arrays(path)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[at] += by
    np.savez(path, **arrays)


@pytest.mark.parametrize("case", _extra_cases())
def test_every_number_is_reproduced(case):
    found = case.check(case.path)
    assert not found.misses
    assert not found.unchecked
    assert not [note for note in found.notes if "without" in note]


@pytest.fixture(
    scope="module", params=["ppo_lora", pytest.param("ppo_right", marks=pytest.mark.slow)]
)
def recomputed(request):
    path = RELEASED / f"{request.param}.npz"
    arrays, text = files.read_arrays(path), files.read_json(path)
    return ppo.recompute(path, arrays, text), arrays, text


def _changes(name, array, rng):
    """(element, how much is added): a hundred times the tolerance that the numbers came with."""
    at = int(rng.choice(np.flatnonzero(array)) if np.any(array) else 0)
    sign = rng.choice([-1.0, 1.0])
    if not name.startswith(("grad_first", "after")):
        yield at, 1e-3 * sign
        return
    largest = int(np.argmax(np.abs(array)))
    yield at, 1e-2 * float(np.abs(array).max()) * sign
    yield largest, 1e-2 * float(array.flat[largest])


def test_no_recorded_array_of_a_step_may_be_another(recomputed):
    case, arrays, text = recomputed
    rng = np.random.default_rng(0)
    assert not ppo.compare(case, arrays, text).misses
    tried = 0
    for name, array in arrays.items():
        if array.dtype.kind != "f" or name == "scores":
            continue
        for at, by in _changes(name, array, rng):
            changed = array.copy()
            changed.flat[at] += by
            found = ppo.compare(case, {**arrays, name: changed}, text)
            assert found.misses, (name, at, by)
            tried += 1
    assert tried > 50
    for name in (
        "masks",
        "masks_aligned_derived",
        "mb_indices",
        "query_len",
        "frag_len",
        "n_segments",
    ):
        changed = arrays[name].copy()
        changed.flat[-1] += 1
        assert ppo.compare(case, {**arrays, name: changed}, text).misses, name
    used = np.flatnonzero(arrays["segments"] >= 0)
    for at, by in itertools.product(used, (-1, 1, 1e-3)):
        changed = arrays["segments"].astype(float)
        changed.flat[at] += by
        assert ppo.compare(case, {**arrays, "segments": changed}, text).misses, (at, by)
    padded = arrays["scores"].copy()
    padded[0, -1] += 1e-3  # behind the row's last score
    assert ppo.compare(case, {**arrays, "scores": padded}, text).misses


def test_no_recorded_statistic_of_a_step_may_be_another(recomputed):
    case, arrays, text = recomputed
    for name, value in text["stats"].items():
        changed = {**text, "stats": {**text["stats"], name: value + 1e-3}}
        assert ppo.compare(case, arrays, changed).misses, name
    for name in ("kl_coef_after", "per_epoch_minibatches"):
        assert ppo.compare(case, arrays, {**text, name: text[name] + 1e-3}).misses, name


def test_no_array_of_a_step_may_be_missing(recomputed):
    case, arrays, text = recomputed
    told_otherwise = {"grad_first_names", "grad_first_norms", "grad_first_total_norm"}
    for name in set(arrays) - ppo._INPUTS - {"masks_aligned_derived"} - told_otherwise:
        rest = {key: array for key, array in arrays.items() if key != name}
        assert f"{name} is missing; fetch the file again" in ppo.compare(case, rest, text).misses
    for name in ("stats", "kl_coef_after"):
        rest = {key: value for key, value in text.items() if key != name}
        assert [m for m in ppo.compare(case, arrays, rest).misses if m.startswith(name)], name


@pytest.mark.parametrize(
    ("segments", "mask", "covered"),
    [
        ([[2, 4], [5, 6]], [0, 0, 1, 1, 0, 1, 0], True),
        ([[2, 4], [4, 6], [-1, -1]], [0, 0, 1, 1, 1, 1], True),  # steps that touch
        ([[2, 4], [8, 9]], [1, 0, 0, 0, 0, 1], True),  # cut on the left
        ([[-1, -1]], [0, 0, 0], True),
        ([[2, 4], [5, 6]], [0, 0, 1, 1, 1, 1, 0], False),
        ([[2, 5], [4, 6]], [0, 0, 1, 1, 1, 1], False),  # they overlap
        ([[2, 4.5], [5, 6]], [0, 0, 1, 1, 0, 1, 0], False),
        ([[2, 9]], [0, 0, 1, 1], False),
        ([[-1, -1]], [0, 1, 0], False),
    ],
)
def test_segments_are_the_trained_tokens(segments, mask, covered):
    assert ppo._covers(np.array(segments), np.array(mask)) == covered


def test_what_is_not_known_is_told(recomputed):
    case, arrays, text = recomputed
    found = ppo.compare(
        case,
        {**arrays, "mb_stats/surprise": np.ones(4), "more": np.ones(2)},
        {**text, "also": 1, "stats": {**text["stats"], "ppo/surprise": 1.0, "time/ppo": 3.0}},
    )
    assert found.unchecked == ["stats/ppo/surprise", "also", "mb_stats/surprise", "more"]


def test_a_setting_that_is_not_known_fails_the_case(recomputed):
    _, arrays, text = recomputed
    path = RELEASED / f"ppo_{text['case']}.npz"
    settings = {**text["ppo_config"], "kl_penalty_power": 2}
    found = ppo.recompute(path, arrays, {**text, "ppo_config": settings}).result
    assert found.misses == ["ppo_config: kl_penalty_power is not a setting that is known here"]


@pytest.mark.parametrize(
    ("file", "name", "at"),
    [
        ("gae", "c04/advantages", 5),
        ("gae", "c09/returns", 0),
        ("gae", "c11/values_masked", 30),
        ("gae", "c00/advantages_raw", 77),
        ("gae", "w01/var_biased", 0),
        ("gae", "w02/whiten", 3),
        ("rewards", "batch_ragged/rewards_ref", 20),
        ("rewards", "one_step/kls", 3),
        ("rewards", "fewer_scores/scores", 1),
        ("progress", "right/fp32/loss", 0),
        ("progress", "head_weight", 17),
    ],
)
def test_no_other_recorded_number_may_be_another(tmp_path, file, name, at):
    folder = _copy(RELEASED, tmp_path, file, "weights_tiny")
    _change(folder / f"{file}.npz", name, 1e-3, at)
    (case,) = cases.find(folder)
    assert case.check(case.path).misses


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("gae", "c04/advantages"),
        ("gae", "w01/mean"),
        ("rewards", "normal3/kls"),
        ("progress", "right/fp32/loss"),
        ("progress", "right/fp32/grad/LN.bias"),
    ],
)
def test_no_other_array_may_be_missing(tmp_path, file, name):
    folder = _copy(RELEASED, tmp_path, file, "weights_tiny")
    _without(folder / f"{file}.npz", name)
    (case,) = cases.find(folder)
    assert case.check(case.path).misses == [f"{name} is missing; fetch the file again"]


def test_whitening_equal_numbers_leaves_their_rounding(tmp_path):
    """Divided by sqrt(1e-8): an honest number may be off by that, a changed one may not."""
    folder = _copy(RELEASED, tmp_path, "gae")
    x, mask = np.full((2, 5), 0.3, np.float32), np.ones((2, 5), np.int64)
    arrays = files.read_arrays(folder / "gae.npz")
    equal = cases._whitening({"x": x, "mask": mask})
    arrays |= {f"w99/{n}": np.asarray(a) for n, a in equal.items()} | {"w99/x": x, "w99/mask": mask}
    arrays["w99/whiten"] = arrays["w99/whiten"] + np.spacing(np.float32(0.3)) * 1e4
    np.savez(folder / "gae.npz", **arrays)
    assert not cases.check_gae(folder / "gae.npz").misses
    _change(folder / "gae.npz", "w99/whiten", 1e-3)
    assert cases.check_gae(folder / "gae.npz").misses


def test_a_case_without_its_arrays_is_refused(tmp_path):
    _copy(RELEASED, tmp_path, "gae", "rewards")
    (tmp_path / "gae.npz").unlink()
    with pytest.raises(UserError, match=r"gae.npz: no such file, but its .json is there"):
        cases.find(tmp_path)


def test_files_may_have_longer_names(tmp_path):
    _copy(RELEASED, tmp_path, "gae", "rewards")
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_stem(path.stem + "_more"))
    assert [case.name for case in cases.find(tmp_path)] == ["gae_more", "rewards_more"]


def test_a_case_without_settings_fails(tmp_path):
    _copy(RELEASED, tmp_path, "gae")
    text = json.loads((tmp_path / "gae.json").read_text())
    text["gae"] = text["gae"][1:]
    (tmp_path / "gae.json").write_text(json.dumps(text))
    found = cases.check_gae(tmp_path / "gae.npz")
    assert found.misses == ["c00: the .json file does not give its settings"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "weights_lora.npz").unlink(), "weights_lora.npz: no such file"),
        (lambda d: (d / "weights_tiny_config.json").unlink(), "config.json: no such file"),
        (lambda d: (d / "ppo_lora.json").unlink(), "ppo_lora.json: no such file"),
        (lambda d: (d / "ppo_lora.json").write_text("{"), "ppo_lora.json: not readable JSON"),
        (lambda d: (d / "ppo_lora.json").write_text("{}"), "ppo_config is missing"),
        (lambda d: (d / "ppo_lora.npz").write_bytes(b"PK\3\4"), "not a readable .npz"),
        (lambda d: _cut(d / "ppo_lora.npz"), "not a readable .npz"),
        (lambda d: _flip(d / "ppo_lora.npz"), "not a readable .npz"),
        (lambda d: np.save((d / "ppo_lora.npz").open("wb"), np.ones(3)), "not a readable .npz"),
        (lambda d: _without(d / "ppo_lora.npz", "frag_mask"), "array frag_mask is missing"),
        (lambda d: _set(d / "ppo_lora.json", mini_batch_size=2.5), "mini_batch_size is 2.5"),
        (lambda d: _set(d / "ppo_lora.json", gamma="0.9"), "gamma is '0.9'"),
        (lambda d: _set(d / "ppo_lora.json", max_grad_norm=[1]), "max_grad_norm is "),
        (lambda d: _without(d / "weights_lora.npz", "v_head.summary.bias"), "summary.bias"),
        (lambda d: _change(d / "ppo_lora.npz", "perm", 1), "not orders of 4 rows"),
        (lambda d: _reshape(d / "ppo_lora.npz", "n_scores"), "n_scores has shape"),
        (lambda d: _set(d / "ppo_lora.json", kl_penalty="k3"), "kl_penalty 'k3' is none of"),
        (lambda d: _set(d / "ppo_lora.json", batch_size=3), "no multiple of"),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, break_it, message):
    folder = _copy(RELEASED, tmp_path, "ppo_lora", "weights_lora", "weights_tiny_config")
    break_it(folder)
    with pytest.raises(UserError, match=message):
        ppo.check(folder / "ppo_lora.npz")


def _flip(path):
    """Changes bytes in the middle of the first array."""
    data = bytearray(path.read_bytes())
    data[300:340] = bytes(40)
    path.write_bytes(bytes(data))


def _cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def _without(path, name):
    np.savez(path, **{n: a for n, a in files.read_arrays(path).items() if n != name})


def _reshape(path, name):
    arrays = files.read_arrays(path)
    np.savez(path, **{**arrays, name: arrays[name][None]})


def _set(path, **settings):
    text = json.loads(path.read_text())
    text["ppo_config"] |= settings
    path.write_text(json.dumps(text))
