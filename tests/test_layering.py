"""Imports go down: Lightning stops at files named `callback.py` and at `training/`, techniques are strangers."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_compress"
LIGHTNING = {"lightning", "lightning.pytorch", "pytorch_lightning"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_one_file_imports_lightning(path):
    if path.name != "_lightning.py":
        assert not LIGHTNING & imports(path)
