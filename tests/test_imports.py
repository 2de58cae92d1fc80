"""The rules of the house: who may import whom, and who spells the files of a run."""

import ast
import graphlib
import pathlib
import re
from collections.abc import Iterator

import pytest

import spa_jax

ROOT = pathlib.Path(spa_jax.__path__[0])
TESTS = pathlib.Path(__file__).parent
# From the ground up: a room imports rooms of lower floors only.
FLOORS = (
    {"errors"},
    {"chips", "parquet", "schema"},
    {
        "horizons",
        "limited",
        "machine",
        "rl",
        "settings",
        "texts",
        "tokenizer",
        "trajectory",
    },
    {"chat_template"},
    {"attempts", "attribution", "batching", "chat", "config", "evaluation", "importers", "store"},
    {"data_config", "judging", "models", "runtime", "server_config", "truth"},
    {"stage_config"},
    {"envs", "games", "parity", "run", "sampling"},
    {"episodes", "exclusive", "failures", "files", "replay", "timing"},
    {"env_check", "policy", "provenance", "rollout"},
    {"interchange", "model_card", "redo", "training"},
    {"annotation", "compiler", "export", "play", "report"},
    {"continuations"},
    {"stages"},
    {"method"},
    {"api", "branching", "lab", "study"},
)
_TRAINER = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch"}
_WORLD = {"absl", "glob", "io", "json", "os", "pathlib", "shutil", "subprocess", "sys", "tempfile"}
_OF_A_RUN = re.compile(
    r"iteration_[\d{]|^iteration_|^(eval|explore)/|^(annotated\.jsonl|"
    r"below\.npz|branches\.jsonl|checkpoints|credits\.json|done\.json|"
    r"estimator\.json|features\.npz|fingerprint\.json|report\.html|run\.json|"
    r"trajectories\.jsonl|truth\.json)$"
)


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def _imports(path: pathlib.Path, *, lazy: bool) -> Iterator[str]:
    """Every a.b of `from a import b`, and every module; `lazy`: those in functions too."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif lazy or not isinstance(child, ast.FunctionDef):
                yield from visit(child)

    return visit(ast.parse(path.read_text(encoding="utf-8")))


def _ours(path: pathlib.Path, *, lazy: bool) -> set[str]:
    """The modules of `spa_jax` that a file imports."""
    found = set()
    for name in _imports(path, lazy=lazy):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", "spa_jax"}


def _room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor():
    rooms = {_room(name) for name in MODULES if name != "spa_jax"}
    assert rooms == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(rooms)


def test_nothing_imports_upwards():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    up = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in sorted(_ours(path, lazy=True))
        if _room(other) != _room(module) and floor[_room(other)] >= floor[_room(module)]
    ]
    assert not up


def test_there_is_no_circle():
    graph = {name: _ours(path, lazy=False) - {name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_stage_imports_another():
    stages = {name: path for name, path in MODULES.items() if name.startswith("spa_jax.stages.")}
    assert len(stages) > 7
    for name, path in stages.items():
        assert not [other for other in _ours(path, lazy=True) if _room(other) == "stages"], name


@pytest.mark.parametrize("room", ["attribution", "rl"])
def test_the_maths_is_pure(room):
    for name, path in MODULES.items():
        if name.startswith(f"spa_jax.{room}."):
            imported = {other.split(".")[0] for other in _imports(path, lazy=True)}
            assert not imported & _WORLD, name


def test_environments_are_without_the_trainer():
    for name, path in MODULES.items():
        if name.startswith("spa_jax.envs."):
            assert not {other.split(".")[0] for other in _imports(path, lazy=True)} & _TRAINER
            assert {_room(other) for other in _ours(path, lazy=True)} <= {
                "config",
                "envs",
                "errors",
                "runtime",
                "server_config",
                "texts",
            }, name


def test_only_its_own_tests_import_experiments():
    others = [path for path in TESTS.rglob("*.py") if TESTS / "experiments" not in path.parents]
    for path in [*others, *MODULES.values()]:
        imported = {name.split(".")[0] for name in _imports(path, lazy=True)}
        assert "experiments" not in imported, path
        assert not [n for n in _imports(path, lazy=True) if n.startswith("tests.experiments")], path


def _spelt(path: pathlib.Path) -> Iterator[str]:
    """The strings that name a file of a run; sentences and docstrings do not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _OF_A_RUN.search(node.value) and " " not in node.value:
                yield f"{path.name}:{node.lineno}: {node.value!r}"


def test_run_alone_spells_the_files_of_a_run():
    assert len(list(_spelt(ROOT / "run.py"))) > 8
    others = [path for path in MODULES.values() if path != ROOT / "run.py"]
    assert not [said for path in others for said in _spelt(path)]


def test_programs_spell_no_file_of_a_run_either():
    programs = (ROOT.parent / "experiments").glob("*.py")
    assert not [said for path in programs for said in _spelt(path)]
