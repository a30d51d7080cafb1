"""Imports go down: Lightning stops at files named `callback.py`, rooms are strangers, pure files see no modules."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_compress"
LIGHTNING = {"lightning", "lightning.pytorch", "pytorch_lightning"}
ROOMS = {path.parent.name for path in PACKAGE.glob("*/callback.py")} - {"core"}
# Floor 4: whoever brings everything together, and is imported by nobody below.
COMPOSITION = {"injection", "cli", "__init__", "__main__", "recipe"}
# In a folder of floor 4, but held to what holds below: these only read and find files.
BELOW = {"recipe/safe_yaml.py", "recipe/shipped.py"}
# Floor 1: torch, math and the standard library; no module goes in or comes out.
PURE = {
    "channels/choosing.py", "channels/coupling.py", "channels/criteria.py", "channels/distributions.py",
    "channels/groups.py", "channels/lasso_path.py", "channels/penalties.py", "channels/reconstruction.py",
    "channels/scoring.py",
    "core/checks.py", "core/duration.py", "core/lookup.py", "core/order.py", "core/patching.py", "core/schedules.py",
    "distillation/tokens.py", "distillation/losses/_divergence.py", "distillation/losses/_precision.py",
    "distillation/losses/_shapes.py", "distillation/losses/features.py", "distillation/losses/language.py",
    "distillation/losses/logits.py", "finetuning/arguments.py", "finetuning/moments.py",
    "finetuning/phases.py", "pruning/criteria.py", "pruning/distributions.py", "pruning/ranking.py",
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Dotted names of what a file imports anywhere in it, but for what only a type checker reads."""
    tree = ast.parse(path.read_text())
    unread = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in unread:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            # `torch.nn.functional` holds functions and no modules.
            if node.module != "torch.nn" or {alias.name for alias in node.names} != {"functional"}:
                found.add(node.module)
        if isinstance(node, ast.Import) and id(node) not in unread:
            found |= {alias.name for alias in node.names}
    return found


def part(path):
    """The room or top-level file that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts_seen(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("lightning_compress.")}


def shown(path):
    return path.relative_to(PACKAGE).as_posix()


def composes(path):
    return part(path) in COMPOSITION and shown(path) not in BELOW


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_only_one_file_imports_lightning(path):
    if path.name != "_lightning.py":
        assert not LIGHTNING & imports(path)


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_only_callbacks_speak_lightning(path):
    if "lightning_compress._lightning" in imports(path):
        assert path.name == "callback.py" or composes(path)


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_rooms_do_not_see_each_other_and_the_hall_sees_none(path):
    own = part(path)
    if composes(path) or own in ("export", "report"):  # these are about what comes out of any room
        return
    assert not parts_seen(path) & (ROOMS - {own})


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_nobody_below_imports_the_composition(path):
    if not composes(path):
        assert not parts_seen(path) & (COMPOSITION - {"__init__"})
        assert "lightning_compress" not in imports(path)


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_files_see_no_modules(name):
    seen = imports(PACKAGE / name)
    assert not {"torch.nn", "torch.optim"} & seen
    below = {one for one in seen if one.startswith("lightning_compress.")}
    allowed = {"lightning_compress." + one.removesuffix(".py").replace("/", ".") for one in PURE}
    below -= {"lightning_compress.core"}  # an empty package, named when one of its files is imported by name
    assert all(any(one == other or one.startswith(other + ".") for other in allowed) for one in below)


def test_the_exceptions_are_there():
    assert set(map(shown, FILES)) >= BELOW | PURE
