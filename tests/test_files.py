"""JSON files are written whole, and hold nothing that JSON has not."""

import json
import math

import numpy as np

from spa_jax import files


def test_numbers_that_are_not_finite_are_null(tmp_path):
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (np.float64("-inf"), 2)}], "d": "NaN"}
    files.write_json(tmp_path / "new" / "x.json", value)
    text = (tmp_path / "new" / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
