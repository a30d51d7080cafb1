"""Every package that our code imports is asked for in setup.py, or by a benchmark with an environment of its own."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
OURS = {"lightning_compress", "tests", "benchmarks", "experiments", "common", "recipes"}
FOLDERS = ("lightning_compress", "recipes", "tests", "benchmarks", "experiments", "docs")


def canonical(name):
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!\[;~ ]", name, maxsplit=1)[0]).lower()


@pytest.fixture(scope="module")
def declared():
    """What setup.py asks for: by each extra, and by "" always; with those of benchmarks' own environments."""
    found, original = {}, setuptools.setup
    setuptools.setup = found.update
    try:
        exec((ROOT / "setup.py").read_text(encoding="utf-8"), {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
    finally:
        setuptools.setup = original
    extras = {"": found["install_requires"], **found["extras_require"]}
    files = [
        line for path in (ROOT / "benchmarks").glob("*requirements*.txt") for line in path.read_text().splitlines()
    ]
    extras["benchmarks"] = [line for line in files if line and not line.startswith(("#", "-"))]
    return {extra: {canonical(one) for one in wanted} for extra, wanted in extras.items()}


def imported(folder):
    """The top-level names that the modules of a folder import, each with a file that does."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            siblings = {one.stem for one in path.parent.glob("*.py")}
            found |= {name.split(".")[0]: path for name in names if name.split(".")[0] not in siblings}
    scripts = {one.stem for place in ("benchmarks", "experiments") for one in (ROOT / place).glob("*.py")}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | OURS | scripts}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_imported_is_asked_for(folder, declared):
    known, wanted = packages_distributions(), set().union(*declared.values())
    for name, path in imported(folder).items():
        candidates = {canonical(one) for one in known.get(name, [name])}
        assert candidates & wanted, f"{path.relative_to(ROOT)} imports {name}: ask for it in setup.py."


def test_the_package_asks_always_for_what_it_imports_at_its_top(declared):
    known = packages_distributions()
    for path in (ROOT / "lightning_compress").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - OURS:
                if {canonical(one) for one in known.get(top, [top])} & declared[""]:
                    continue
                # Files of an optional format are read only when it is asked for.
                assert path.is_relative_to(ROOT / "lightning_compress" / "export" / "onnx"), f"{path} imports {top}"
