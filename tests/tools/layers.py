"""Print the layers of the package as its imports draw them, and what breaks their rules.

    python -m tests.tools.layers [package folder]

Ends with status 1 if anything is wrong. The rules are those of "Who may import whom" in CONTRIBUTING.md; a folder that
no rule names is a technique.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tools.import_graph import (
    collapse,
    cycles,
    folders,
    import_graph,
    imported_names,
    levels,
    read_trees,
    shortest_way,
)

PACKAGE = Path(__file__).parents[2] / "lightning_compress"
TECHNIQUE = 5
# What stands higher may import what stands lower or level with it, never the other way round.
LAYERS = {
    "_version.py": 0, "_lightning.py": 0,
    "core": 1,
    "nn": 2,
    "measure": 3,
    "training": 4,
    "export": 6,
    "reporting": 7,
    "recipe": 8,
    "injection.py": 9, "__init__.py": 9,
    "cli.py": 10, "__main__.py": 10,
}  # fmt: skip
COMPOSITION = 8
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_utilities")


@dataclass(frozen=True)
class Package:
    """The parsed files of a package, and which imports which."""

    name: str
    trees: dict[str, ast.Module]
    graph: dict[str, set[str]]

    @classmethod
    def read(cls, folder: Path) -> "Package":
        trees = read_trees(folder)
        return cls(folder.name, trees, import_graph(trees, folder.name))


def top(file: str) -> str:
    """The folder or file directly below the package that a file belongs to."""
    return file.split("/")[0]


def layer(file: str) -> int:
    return LAYERS.get(top(file), TECHNIQUE)


def is_pure(file: str) -> bool:
    """Whether a file lies where neither torch modules nor Lightning may be: `core/`, or any folder `functional/`."""
    return top(file) == "core" or "functional" in Path(file).parent.parts


def cycle_problems(package: Package) -> Iterator[str]:
    """Cycles among files, and among the entries (files and subfolders) of each folder."""
    graph = package.graph
    for group in cycles(graph):
        yield f"files import each other in a circle: {', '.join(group)}"
    for folder in folders(graph):
        for group in cycles(collapse(graph, folder)):
            if not all(entry.endswith(".py") for entry in group):  # else the files said it
                where = folder or package.name
                fewest = _fewest_imports(graph, folder, group)
                yield f"entries of {where}/ import each other in a circle: {', '.join(group)}; fewest one way: {fewest}"


def _fewest_imports(graph: dict[str, set[str]], folder: str, group: list[str]) -> str:
    """The imports between the two entries of a circle that have the fewest: those to mend first."""
    prefix = f"{folder}/" if folder else ""
    entry = {file: file[len(prefix) :].split("/")[0] for file in graph if file.startswith(prefix)}
    found: dict[tuple[str, str], list[str]] = {}
    for file, own in entry.items():
        for target in sorted(graph[file]):
            pair = (own, entry.get(target, own))
            if own in group and pair[1] in group and own != pair[1]:
                found.setdefault(pair, []).append(f"{file} -> {target}")
    both_ways = {pair: imports for pair, imports in found.items() if pair[::-1] in found} or found
    return ", ".join(min(both_ways.values(), key=len))


def upward_problems(package: Package) -> Iterator[str]:
    """Imports of something in a higher layer; among them every import of the composition from below."""
    for file, targets in package.graph.items():
        for target in sorted(targets):
            if layer(target) > layer(file):
                yield f"{file} (layer {layer(file)}) imports {target} (layer {layer(target)})"
            elif is_pure(file) and not is_pure(target):
                yield f"{file} is pure by its place, but imports {target}"


def reach_problems(package: Package) -> Iterator[str]:
    """Ways from a technique to another, to `export/` or to `reporting/`, directly or through other files."""
    graph = package.graph
    techniques = sorted({top(file) for file in graph if layer(file) == TECHNIQUE})
    for technique in techniques:
        for other in [*techniques, "export", "reporting"]:
            ends = [file for file in graph if top(file) == other != technique]
            ways = [shortest_way(graph, file, ends) for file in graph if top(file) == technique]
            if any(ways):
                yield f"{technique} reaches {other}: {' -> '.join(min(filter(None, ways), key=len))}"


def purity_problems(package: Package) -> Iterator[str]:
    """Pure files that use `torch.nn` (but for `torch.nn.functional`), `torch.optim` or Lightning."""
    for file, tree in package.trees.items():
        if is_pure(file):
            used = imported_names(tree, package.name, file) | _attribute_chains(tree)
            impure = sorted(name for name in used if _is_impure(name) and name != "torch.nn")
            plain_nn = _imports_all_of_nn(tree)
            if impure or plain_nn:
                yield f"{file} is pure by its place, but uses {', '.join(impure or ['torch.nn'])}"


def _is_impure(name: str) -> bool:
    if name.split(".")[0] in LIGHTNING or (name + ".").startswith("torch.optim."):
        return True
    return (name + ".").startswith("torch.nn.") and not (name + ".").startswith("torch.nn.functional.")


def _attribute_chains(tree: ast.AST) -> set[str]:
    """Dotted names read in the code, such as `torch.nn.Linear`."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _imports_all_of_nn(tree: ast.AST) -> bool:
    """Whether `torch.nn` itself is imported: by `import torch.nn` or `from torch import nn`."""
    return any(
        (isinstance(node, ast.Import) and any(alias.name == "torch.nn" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "nn" for a in node.names))
        for node in ast.walk(tree)
    )


def lightning_problems(package: Package) -> Iterator[str]:
    """Lightning imported outside `_lightning.py`, or `_lightning.py` by files that must not know of it."""
    graph = package.graph
    for file, tree in package.trees.items():
        names = imported_names(tree, package.name, file)
        direct = sorted(name for name in names if name.split(".")[0] in LIGHTNING[:2])
        if direct and file != "_lightning.py":
            yield f"{file} imports {direct[0]}; take it from {package.name}._lightning"
        speaks = Path(file).name == "callback.py" or top(file) == "training" or layer(file) >= COMPOSITION
        if "_lightning.py" in graph[file] and not speaks:
            yield f"{file} imports _lightning.py; only callback.py files, training/ and the composition may"


RULES = {
    "Cycles": cycle_problems,
    "Upward imports": upward_problems,
    "Ways between techniques, to export or to reporting": reach_problems,
    "Pure files that are not": purity_problems,
    "Lightning": lightning_problems,
}


def problems(folder: Path) -> dict[str, list[str]]:
    """What breaks each rule."""
    package = Package.read(folder)
    return {title: list(rule(package)) for title, rule in RULES.items()}


def picture(package: Package) -> Iterator[str]:
    """The entries of the package by height, each with the entries it imports; then the heights within each folder."""
    graph = package.graph
    for folder in folders(graph):
        entries = collapse(graph, folder)
        heights = levels(entries)
        if len(heights) < 2:
            continue
        arrows = sum(len(targets) for targets in entries.values())
        yield f"\n{folder or package.name}/: {max(heights.values())} levels, {len(entries)} entries, {arrows} arrows"
        for height in range(max(heights.values()), 0, -1):
            yield f"  {height}  {'  '.join(sorted(name for name in heights if heights[name] == height))}"


def main(folder: Path = PACKAGE) -> int:
    print(
        "Levels (an entry imports only entries below its own level, if there is no cycle)",
        *picture(Package.read(folder)),
        sep="\n",
    )
    found = problems(folder)
    for title, lines in found.items():
        print(f"\n{title}: {len(lines) or 'none'}", *(f"  {line}" for line in lines), sep="\n")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
