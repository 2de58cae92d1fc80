"""The rooms of `models` keep their rules: the architecture is pure; `io` alone touches a disk."""

import ast
import pathlib

import pytest

from spa_jax import models

ROOT = pathlib.Path(models.__file__).parent
PURE = sorted(ROOT.glob("*.py"))
KERNELS = [path for path in sorted((ROOT / "kernels").glob("*.py")) if path.name != "native.py"]
_DISK = {"contextlib", "ctypes", "glob", "io", "json", "os", "pathlib", "shutil", "subprocess"}
_DISK |= {"gguf", "huggingface_hub", "safetensors", "tempfile"}


def _imported(path: pathlib.Path) -> set[str]:
    """Modules that a file imports anywhere, and their parts: a.b of `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", PURE + KERNELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_only_io_and_native_touch_a_disk(path):
    imported = _imported(path)
    assert not {name.split(".")[0] for name in imported} & _DISK
    assert not [name for name in imported if name.startswith("spa_jax.models.io")]
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {"open", "print"} & {f.id for f in calls if isinstance(f, ast.Name)}


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.stem)
def test_the_architecture_checks_no_user(path):
    refuses = "spa_jax.errors" in _imported(path)
    assert refuses == (path.stem == "limits")


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.stem)
def test_the_architecture_knows_no_single_kernel(path):
    """It calls attention by the name in its config, and products; `choice` is for what loads it."""
    kernels = {n.split(".")[3] for n in _imported(path) if n.startswith("spa_jax.models.kernels.")}
    assert kernels <= {"attention", "products"}


def test_the_product_knows_no_copy_of_the_released_code():
    """`parity` stands on the product, never the other way round."""
    product = ROOT.parent
    others = (p for p in product.rglob("*.py") if p.parent.name != "parity")
    using = [p for p in others if any(n.startswith("spa_jax.parity") for n in _imported(p))]
    assert not using
