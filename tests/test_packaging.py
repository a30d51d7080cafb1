"""What the project promises as a whole: one version, a complete wheel, a light import, commands that exist."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

import pytest

import lightning_compress
from lightning_compress._version import __version__

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lightning_compress", "recipes")
ONLY_WHERE_USED = ("wandb", "torchao", "onnx", "onnxruntime", "onnxscript", "matplotlib", "mlxtend", "torch_pruning")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names of the files in a wheel that is built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder / "dist", folder], check=True)
    (built,) = (folder / "dist").glob("*.whl")
    assert built.name.startswith(f"lightning_compress-{__version__}-")
    return set(zipfile.ZipFile(built).namelist())


def test_the_version_is_written_in_one_place():
    sources = [
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        *ROOT.glob("lightning_compress/**/*.py"),
        *ROOT.glob("recipes/*"),
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in sources if path.is_file()}
    assert [path.name for path, text in texts.items() if __version__ in text] == ["_version.py"]
    assert lightning_compress.__version__ == __version__


def test_the_wheel_has_all_that_the_sources_have(wheel):
    here = {
        *(
            f"lightning_compress/{path.relative_to(ROOT / 'lightning_compress')}"
            for path in files("lightning_compress")
        ),
        *(f"lightning_compress/recipes/{path.relative_to(ROOT / 'recipes')}" for path in files("recipes")),
    }
    assert {name for name in wheel if ".dist-info/" not in name} == here
    assert {"lightning_compress/py.typed", "lightning_compress/recipes/mnist.py"} < here
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_every_entry_point_leads_somewhere():
    try:
        ours = distribution("lightning-compress").entry_points
    except PackageNotFoundError:
        pytest.skip("the package is not installed, only on the path")
    assert {(entry.group, entry.name) for entry in ours} == {
        ("console_scripts", "lightning-compress"),
        ("lightning.pytorch.callbacks_factory", "lightning_compress"),
        ("pytorch_lightning.callbacks_factory", "lightning_compress"),
    }
    assert all(callable(entry.load()) for entry in ours)
    assert "lightning_compress" in entry_points(group="pytorch_lightning.callbacks_factory").names


def test_our_import_adds_no_heavy_package_to_lightnings_own():
    script = f"""
import importlib, sys
for name in ("pytorch_lightning", "lightning.pytorch"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
before = set(sys.modules)
import lightning_compress
for name in lightning_compress.__all__:
    getattr(lightning_compress, name)
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new.intersection({ONLY_WHERE_USED})))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_every_make_target_that_the_texts_name_exists():
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", ".ci/run"))
    named = set(re.findall(r"(?:^|`|^\s+)make ([a-z]+)\b", texts, re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "check"} <= named <= targets


def files(folder):
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
