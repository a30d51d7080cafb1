"""Print names that are defined twice, known to no field, private to Lightning, or described and not there.

    python -m tests.tools.names

Ends with status 1 if there are any that the rules do not allow.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from token import NAME
from tokenize import generate_tokens

from tests.tools.import_graph import read_trees
from tests.tools.layers import PACKAGE

# Files whose names are looked up by string, each in its own subpackage: `criterion="random"` of two callbacks.
REGISTRIES = (
    "core/schedules.py", "*/functional/criteria.py", "*/functional/distributions.py", "*/functional/penalties.py",
    "distillation/losses/*", "quantization/functional/quantizers/*",
)  # fmt: skip
PRIVATE_IN_LIGHTNING = (
    "_batches_that_stepped", "_setup_model", "_register_ddp_hooks", "_average_model", "_skip_backward",
    "_on_before_batch_transfer", "_wandb_init", "_experiment", "_log_model", "_ForwardRedirection",
)  # fmt: skip
PROJECT_WORDS = ("hand", "moment", "moments", "whole", "gone", "held", "told", "how", "itself")
LIGHTNING_OBJECTS = (
    "trainer", "pl_module", "strategy", "fit_loop", "epoch_loop", "val_loop", "logger", "loggers", "callback",
    "callbacks", "datamodule", "lightning_module",
)  # fmt: skip


def duplicates(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Public functions and classes that several files define, with these files; names of registries may be."""
    places = defaultdict(list)
    for file, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                places[node.name].append(file)
    several = {name: files for name, files in sorted(places.items()) if len(files) > 1}
    return {name: files for name, files in several.items() if not all(map(is_registry, files))}


def is_registry(file: str) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in REGISTRIES)


def private_uses(trees: Mapping[str, ast.Module]) -> list[str]:
    """Where files other than `_lightning.py` use a private attribute of Lightning, or of an object that is its own."""
    return [
        f"{file}:{node.lineno} uses {name}; give it a function in _lightning.py"
        for file, tree in trees.items()
        if file != "_lightning.py"
        for node, owner, name in _attributes(tree)
        if any(known in name for known in PRIVATE_IN_LIGHTNING) or (is_private(name) and owner in LIGHTNING_OBJECTS)
    ]


def project_words(package: Path) -> dict[str, list[str]]:
    """Names in the code, not in texts or comments, that only this project's history explains; with their files."""
    found = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        for token in generate_tokens(StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == NAME and token.string.strip("_").lower() in PROJECT_WORDS:
                found[token.string].add(path.relative_to(package).as_posix())
    return {word: sorted(files) for word, files in sorted(found.items())}


def strangers_in_docstrings(trees: Mapping[str, ast.Module]) -> list[str]:
    """Names that the sections Args and Attributes of a docstring describe, and its function or class does not have.

    Classes that derive from others are left out: they have their names from there too.
    """
    return [
        f"{file}:{node.lineno}: {node.name} has no '{name}'"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.ClassDef) and not node.bases)
        for name in _described(ast.get_docstring(node) or "")
        if name not in _own_names(node)
    ]


def _described(docstring: str) -> Iterator[str]:
    for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: .*)?\n?)*)", docstring, re.MULTILINE):
        for names in re.findall(r"^    ([*a-z_][\w*, ]*):", section, re.MULTILINE):
            yield from (name.strip().lstrip("*") for name in names.split(","))


def _own_names(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
    fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    given = {name for one in methods if one.name == "__init__" for name in _own_names(one)}
    kept = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self"}
    return fields | {one.name for one in methods} | given | kept


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _attributes(tree: ast.AST) -> Iterator[tuple[ast.expr, str, str]]:
    """Each attribute that is read, set, or named in a string: its node, the last name before it, and its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node, _last_name(node.value), node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                yield node, _last_name(node.args[0]), str(node.args[1].value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node, "", node.value


def _last_name(node: ast.expr) -> str:
    """`trainer` for `self.trainer`, `trainer[0]` and `trainer`; nothing for the result of a call."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def main() -> int:
    trees = read_trees(PACKAGE)
    several, private = duplicates(trees), private_uses(trees)
    print(f"Public names defined several times: {len(several) or 'none'}")
    for name, files in several.items():
        print(f"  {name}: {', '.join(files)}")
    print(f"Private attributes of Lightning outside _lightning.py: {len(private) or 'none'}")
    for line in private:
        print(f"  {line}")
    words = project_words(PACKAGE)
    print(f"Names that only this project's history explains: {len(words) or 'none'}")
    for word, files in words.items():
        print(f"  {word}: {', '.join(files)}")
    strangers = strangers_in_docstrings(trees)
    print(f"Names that a docstring describes and its code does not have: {len(strangers) or 'none'}")
    for line in strangers:
        print(f"  {line}")
    return int(bool(several or private or words or strangers))


if __name__ == "__main__":
    sys.exit(main())
