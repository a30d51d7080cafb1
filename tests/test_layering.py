"""Imports go down, techniques do not know each other, and what is pure lies where pure things lie."""

from itertools import chain

import pytest

from tests.tools import layers
from tests.tools.import_graph import collapse, cycles, levels, shortest_way

# How the lines begin of what is still to be mended. Each must be found: one that is mended must go from here.
KNOWN: dict[str, tuple[str, ...]] = {}


@pytest.fixture(scope="module")
def found():
    return layers.problems(layers.PACKAGE)


@pytest.mark.parametrize("title", layers.RULES)
def test_the_package_keeps_every_rule(title, found):
    known = KNOWN.get(title, ())
    assert [line for line in found[title] if not line.startswith(known)] == []
    assert [start for start in known if not any(line.startswith(start) for line in found[title])] == []


@pytest.fixture
def package(tmp_path):
    """A function that writes a small package of the files it is given, and returns its folder."""

    def make(**files):
        folder = tmp_path / "lightning_compress"
        for name, text in files.items():
            path = folder / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for path in {folder, *(path.parent for path in folder.rglob("*.py"))}:
            (path / "__init__.py").touch()
        return folder

    return make


def test_a_tree_that_keeps_the_rules_has_no_problem(package):
    folder = package(
        _lightning="import pytorch_lightning",
        core__phases="import torch.nn.functional as F",
        nn__surgery="from torch import nn\nfrom lightning_compress.core.phases import begin",
        training__callback="from lightning_compress._lightning import Callback\nimport lightning_compress.nn.surgery",
        pruning__functional__criteria="import torch\nimport lightning_compress.core.phases\ntorch.nn.functional.pad",
        pruning__masks="from .functional import criteria\nfrom ..nn.surgery import cut",
        pruning__callback="from lightning_compress.pruning import masks\nimport lightning_compress.training.callback",
        export__api="import lightning_compress.pruning.masks",
        cli="from lightning_compress.pruning.callback import Pruning\nfrom lightning_compress import nn",
    )
    assert layers.problems(folder) == {title: [] for title in layers.RULES}
    assert layers.main(folder) == 0


@pytest.mark.parametrize("text", [
    "from lightning_compress.core.b import name",
    "import lightning_compress.core.b",
    "from . import b",
    "def f():\n    from lightning_compress.core import b",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_compress.core.b import name",
    "from importlib import import_module\nimport_module('lightning_compress.core.b')",
])  # fmt: skip
def test_a_circle_of_files_is_found_wherever_the_import_stands(text, package):
    folder = package(core__a=text, core__b="from lightning_compress.core.a import other")
    assert layers.problems(folder)["Cycles"] == ["files import each other in a circle: core/a.py, core/b.py"]
    assert layers.main(folder) == 1


def test_a_circle_of_folders_is_found_though_no_files_make_one(package):
    folder = package(
        pruning__a__one="import lightning_compress.pruning.b.one",
        pruning__b__two="import lightning_compress.pruning.a.two",
        pruning__a__two="",
        pruning__b__one="",
    )
    (line,) = layers.problems(folder)["Cycles"]
    assert line.startswith("entries of pruning/ import each other in a circle: a, b; fewest one way: ")
    assert "pruning/b/two.py -> pruning/a/two.py" in line or "pruning/a/one.py -> pruning/b/one.py" in line


def test_files_beside_a_subfolder_may_stand_above_and_below_it_but_not_the_same_file(package):
    files = {
        "pruning__callback": "import lightning_compress.pruning.ptq.run",
        "pruning__ptq__run": "import lightning_compress.pruning.modules",
        "pruning__ptq__other": "",
        "pruning__modules": "",
    }
    assert not layers.problems(package(**files))["Cycles"]
    files["pruning__modules"] = "import lightning_compress.pruning.ptq.other"
    (line,) = layers.problems(package(**files))["Cycles"]
    assert "circle: modules.py, ptq" in line


@pytest.mark.parametrize(("importer", "target"), [
    ("core__a", "nn.b"), ("nn__a", "training.b"), ("nn__a", "measure.b"), ("measure__a", "training.b"),
    ("training__callback", "pruning.b"), ("pruning__a", "recipe.b"), ("export__a", "reporting.b"),
    ("pruning__a", "injection"), ("reporting__a", "cli"), ("recipe__a", "injection"),
])  # fmt: skip
def test_an_import_that_goes_up_is_found(importer, target, package):
    folder = package(**{importer: f"import lightning_compress.{target}", target.replace(".", "__"): ""})
    lines = layers.problems(folder)["Upward imports"]
    assert any(f"imports {target.replace('.', '/')}" in line for line in lines)


def test_taking_a_name_of_the_package_itself_goes_up_but_taking_a_folder_does_not(package):
    folder = package(
        nn__a="from lightning_compress import export", nn__b="from lightning_compress import core", core__c=""
    )
    assert layers.problems(folder)["Upward imports"] == ["nn/a.py (layer 2) imports __init__.py (layer 9)"]


@pytest.mark.parametrize("other", ["distillation", "export", "reporting"])
def test_a_way_from_a_technique_through_a_third_is_found(other, package):
    folder = package(**{
        "pruning__callback": "import lightning_compress.pruning.masks",
        "pruning__masks": "def f():\n    import lightning_compress.nn.surgery",
        "nn__surgery": f"import lightning_compress.{other}.values",
        f"{other}__values": "",
    })  # fmt: skip
    lines = layers.problems(folder)["Ways between techniques, to export or to reporting"]
    assert lines == [f"pruning reaches {other}: pruning/masks.py -> nn/surgery.py -> {other}/__init__.py"]


def test_running_the_init_of_a_folder_counts_as_a_way(package):
    folder = package(pruning__a="from lightning_compress.nn.names import shown", nn__names="", distillation__b="")
    (folder / "nn" / "__init__.py").write_text("import lightning_compress.distillation.b")
    assert "pruning/a.py -> nn/__init__.py -> distillation/__init__.py" in " ".join(
        chain(*layers.problems(folder).values())
    )


@pytest.mark.parametrize("text", [
    "from torch import nn", "import torch.nn", "import torch\ntorch.nn.Linear(1, 1)", "from torch.nn import Module",
    "from torch.optim import SGD", "import torch\ntorch.optim.SGD", "import pytorch_lightning",
    "from torch.nn.parallel import DistributedDataParallel", "from lightning_utilities.core import rank_zero",
])  # fmt: skip
@pytest.mark.parametrize("place", ["core__a", "pruning__functional__a", "quantization__functional__quantizers__a"])
def test_modules_optimizers_and_lightning_are_found_where_only_pure_files_lie(text, place, package):
    (line,) = layers.problems(package(**{place: text}))["Pure files that are not"]
    assert line.startswith(f"{place.replace('__', '/')}.py is pure by its place, but uses ")


def test_a_pure_file_that_imports_one_that_is_not_is_found(package):
    folder = package(pruning__functional__a="import lightning_compress.pruning.masks", pruning__masks="")
    lines = layers.problems(folder)["Upward imports"]
    assert "pruning/functional/a.py is pure by its place, but imports pruning/masks.py" in lines


@pytest.mark.parametrize("text", ["import lightning.pytorch", "from pytorch_lightning import Callback"])
def test_lightning_imported_elsewhere_is_found(text, package):
    (line,) = layers.problems(package(pruning__callback=text))["Lightning"]
    assert line.startswith("pruning/callback.py imports ")


def test_the_door_to_lightning_used_by_who_must_not_know_it_is_found(package):
    text = "from lightning_compress._lightning import Trainer"
    folder = package(
        _lightning="", pruning__masks=text, pruning__callback=text, recipe__run=text, training__loggers=text
    )
    (line,) = layers.problems(folder)["Lightning"]
    assert line.startswith("pruning/masks.py imports _lightning.py")


def test_levels_and_ways_of_a_graph_by_hand():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"e"}, "e": {"d", "c"}}
    assert levels(graph) == {"a": 3, "b": 2, "c": 1, "d": 2, "e": 2}
    assert cycles(graph) == [["d", "e"]]
    assert shortest_way(graph, "a", ["c"]) == ["a", "c"]
    assert shortest_way(graph, "c", ["a"]) == []
    files = {"x/y/1.py": {"x/2.py", "z/3.py"}, "x/2.py": {"x/y/1.py"}, "z/3.py": set()}
    assert collapse(files) == {"x": {"z"}, "z": set()}
    assert collapse(files, "x") == {"y": {"2.py"}, "2.py": {"y"}}


def test_the_package_is_read_at_all():
    graph = layers.Package.read(layers.PACKAGE).graph
    assert len(graph) > 200
    assert "core/phases.py" in graph["pruning/callback.py"]
    techniques = {layers.top(file) for file in graph if layers.layer(file) == layers.TECHNIQUE}
    assert {"pruning", "channel_pruning", "quantization", "distillation", "finetuning"} <= techniques
