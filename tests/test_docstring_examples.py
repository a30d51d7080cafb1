"""What users call and name has an example in its docstring, which pytest runs as a doctest."""

from doctest import DocTestFinder
from importlib import import_module
from inspect import isclass, isfunction
from pkgutil import walk_packages
from types import ModuleType

import pytest

import lightning_compress
from lightning_compress.core.registry import registered
from tests.tools.api_snapshot import REGISTRIES

PACKAGE = lightning_compress.__name__
# Where the names of arguments are looked up, and what those who write a technique of their own begin with.
MODULES = (
    *REGISTRIES, "distillation.teachers.base", "distillation.teachers.network",
    "distillation.teachers.self_teachers", "distillation.teachers.peer", "distillation.teachers.cached",
    "training.callback", "training.structural_callback", "training.initialize_from",
)  # fmt: skip
FOLDERS = ("functional", "measure")  # every public function and class in them


def public_names(modules, is_exported):
    """Each public function and class of `modules` by its full name: those of `__all__`, or those defined there."""
    found = {}
    for module in modules:
        names = getattr(module, "__all__", None) if is_exported(module) else None
        members = registered(module).values() if names is None else [getattr(module, name) for name in names]
        for member in members:
            if (isclass(member) or isfunction(member)) and member.__module__.startswith(f"{PACKAGE}."):
                found[f"{member.__module__}.{member.__qualname__}"] = member
    return found


def all_modules():
    return [import_module(one.name) for one in walk_packages(lightning_compress.__path__, f"{PACKAGE}.")]


def required():
    """What must have an example, by full name."""
    modules = [lightning_compress, *all_modules()]
    named = {f"{PACKAGE}.{name}" for name in MODULES}
    wanted = [
        module
        for module in modules
        if hasattr(module, "__path__")
        or module.__name__ in named
        or set(module.__name__.split(".")) & set(FOLDERS)
        or module.__name__.endswith(".callback")
    ]
    return public_names(wanted, lambda module: hasattr(module, "__path__"))


def has_example(member):
    """Whether the docstring of a function or class, or of one of its methods, has a line with `>>>`."""
    return any(test.examples for test in DocTestFinder(recurse=False).find(member, name=member.__name__))


REQUIRED = required()


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_public_name_has_an_example(name):
    assert has_example(REQUIRED[name]), f"{name}: write an example, `>>> ...`, with its result into its docstring."


def test_what_users_name_is_required():
    names = {
        "pruning.callback.Pruning", "core.schedules.Cubic", "pruning.functional.criteria.taylor",
        "channel_pruning.functional.penalties.slimming_gradient", "distillation.losses.logits.kl_divergence",
        "distillation.teachers.peer.PeerTeacher", "export.load.load_compressed", "recipe.recipe.Recipe",
        "quantization.functional.quantizers.learned.lsq", "quantization.ptq.quantize.quantize",
        "reporting.report.Report", "reporting.callback.CompressionReport", "measure.macs.count_macs",
        "training.structural_callback.StructuralCallback",
    }  # fmt: skip
    assert {f"{PACKAGE}.{name}" for name in names} <= set(REQUIRED)
    assert not any(name.rpartition(".")[2].startswith("_") for name in REQUIRED)


def test_a_name_without_an_example_is_found():
    module = ModuleType(f"{PACKAGE}.nowhere")
    exec(
        'def bare():\n    """Words."""\ndef shown():\n    """Words.\n\n    >>> 1 + 1\n    2\n    """\n'
        'def _own(): ...\nclass Empty:\n    def method(self):\n        """>>> 1\n        1\n        """',
        vars(module),
    )
    found = public_names([module], lambda _: False)
    assert {name.rpartition(".")[2]: has_example(member) for name, member in found.items()} == {
        "bare": False, "shown": True, "Empty": False,
    }  # fmt: skip
