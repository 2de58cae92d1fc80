import importlib.util
import json
import subprocess
import sys

import pytest

from spa_jax.envs.virtualhome.simulator import Edge, library, untangle
from spa_jax.errors import UserError


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps virtualhome==2\.3\.0"):
        library.__wrapped__()


def test_loading_it_disturbs_nothing() -> None:
    code = """
import random, sys
random.seed(5)
expected = random.random()
random.seed(5)
from spa_jax.envs.virtualhome.simulator import library
assert library().execution
assert random.random() == expected, "it seeds the global generator"
assert not {name for name in sys.modules if name.split(".")[0] == "virtualhome"}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_remembers_no_measurements() -> None:
    measurement = library().common.TimeMeasurement
    measurement.stop(measurement.start("AddEdges"))
    assert not measurement._measurement_time and not measurement._total_time


@pytest.mark.parametrize(
    ("edges", "left"),
    [
        # The box is close to what is in it: both go.  The other way round nothing happens.
        ([(1, "CLOSE", 2), (2, "INSIDE", 1)], []),
        ([(2, "CLOSE", 1), (2, "INSIDE", 1)], [(2, "CLOSE", 1), (2, "INSIDE", 1)]),
        # Curtains that hang in each other, and one that hangs in itself.
        ([(1, "INSIDE", 2), (2, "INSIDE", 1)], []),
        ([(1, "INSIDE", 1), (1, "ON", 3)], [(1, "ON", 3)]),
        # The inverse comes later: the edge that follows the first is overlooked.
        (
            [
                (1, "CLOSE", 2),
                (1, "CLOSE", 3),
                (1, "CLOSE", 4),
                (2, "INSIDE", 1),
                (3, "INSIDE", 1),
                (4, "INSIDE", 1),
            ],
            [(1, "CLOSE", 3), (3, "INSIDE", 1)],
        ),
        # The inverse came before: two are overlooked.
        (
            [
                (2, "INSIDE", 1),
                (3, "INSIDE", 1),
                (4, "INSIDE", 1),
                (5, "INSIDE", 1),
                (1, "CLOSE", 2),
                (1, "CLOSE", 3),
                (1, "CLOSE", 4),
                (1, "CLOSE", 5),
            ],
            [(3, "INSIDE", 1), (4, "INSIDE", 1), (1, "CLOSE", 3), (1, "CLOSE", 4)],
        ),
    ],
)
def test_untangle_as_the_published_loop_does(edges: list[Edge], left: list[Edge]) -> None:
    assert untangle(edges) == left
    published = list(edges)
    for edge in published:
        inverse = (edge[2], "INSIDE", edge[0])
        if inverse in published:
            published.remove(inverse)
            if edge != inverse:
                published.remove(edge)
    assert published == left


_TRAINER = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch"}


def _loaded(*modules: str) -> set[str]:
    code = (
        f"import sys, json\nfor name in {modules!r}: __import__(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    return set(json.loads(output))


def test_neither_the_trainer_nor_the_package_is_loaded_early() -> None:
    package = "spa_jax.envs.virtualhome"
    loaded = _loaded(
        *(f"{package}.{name}" for name in ("tasks", "prompt", "engine", "generate", "conformance"))
    )
    assert not {name.partition(".")[0] for name in loaded} & (_TRAINER | {"virtualhome"})
    assert "numpy" not in loaded and "_virtualhome_evolving_graph" not in loaded
