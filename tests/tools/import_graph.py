"""Read which file of a package imports which, and find levels, cycles and ways in that graph.

Imports inside functions and under `TYPE_CHECKING` count, and so do `import_module("package.module")` calls with a
constant name. Files are named by their path below the package, such as "core/phases.py".
"""

import ast
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def imported_names(tree: ast.AST, package: str, file: str) -> set[str]:
    """Dotted names of all that a file imports, each with the module it comes from; relative ones are made absolute."""
    found: set[str] = set()
    folder = [package, *Path(file).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            found |= {
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return found


def read_trees(package: Path) -> dict[str, ast.Module]:
    """Each file of a package, parsed."""
    files = sorted(package.rglob("*.py"))
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in files
    }


def import_graph(trees: Mapping[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Each file of a package, by what `read_trees` returns, with the files of the package that it imports.

    Whoever imports `package.a.b` also runs `a/__init__.py`, so that counts too, unless the importing file lies below
    `a` itself. The package's own `__init__.py` counts only where something is taken from it by name.
    """
    return {
        file: set(_targets(imported_names(tree, package, file), file, package, trees)) for file, tree in trees.items()
    }


def _targets(names: set[str], file: str, package: str, files: Iterable[str]) -> Iterator[str]:
    for name in names:
        first, *parts = name.split(".")
        if first != package:
            continue
        target = _file_of(parts, files)
        if target is None:  # `package.module.function`: its module is among the names as well
            continue
        # `from package import module` names the package too, but takes nothing that its `__init__.py` defines.
        if target == "__init__.py" and all(_file_of(other.split(".")[1:], files) for other in _members(names, package)):
            continue
        if target != file:
            yield target
        for depth in range(1, len(parts)):
            parent = "/".join([*parts[:depth], "__init__.py"])
            if parent in files and parent != file and not file.startswith("/".join(parts[:depth]) + "/"):
                yield parent


def _members(names: set[str], package: str) -> set[str]:
    members = {name for name in names if name.startswith(package + ".") and name.count(".") == 1}
    return members or {package + ".?"}  # a plain `import package` may use anything of it


def _file_of(parts: list[str], files: Iterable[str]) -> str | None:
    path = "/".join(parts)
    candidates = (f"{path}.py", f"{path}/__init__.py") if path else ("__init__.py",)
    return next((candidate for candidate in candidates if candidate in files), None)


def collapse(graph: Graph, folder: str = "") -> dict[str, set[str]]:
    """What the entries of one folder, files and subfolders, import of each other.

    A subfolder stands for all files below it. The folder's own `__init__.py` is an entry like any other.
    """
    prefix = f"{folder}/" if folder else ""
    entry = {file: file[len(prefix) :].split("/")[0] for file in graph if file.startswith(prefix)}
    collapsed: dict[str, set[str]] = {name: set() for name in entry.values()}
    for file, own in entry.items():
        collapsed[own] |= {entry[target] for target in graph[file] if target in entry} - {own}
    return collapsed


def folders(graph: Graph) -> list[str]:
    """Every folder with files in it, the package itself ("") first."""
    return sorted({"", *(parent.as_posix() for file in graph for parent in Path(file).parents if parent != Path())})


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of entries that reach each other, largest first; empty if there is no cycle."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {tuple(sorted({node, *(other for other in seen if node in reach[other])})) for node, seen in reach.items()}
    return sorted((list(group) for group in groups if len(group) > 1), key=lambda group: (-len(group), group))


def reachable(graph: Graph, start: str) -> set[str]:
    """All that is imported by an entry, directly or through others."""
    seen, todo = set[str](), [start]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def shortest_way(graph: Graph, start: str, ends: Iterable[str]) -> list[str]:
    """The files on the shortest chain of imports from one file to any of others; empty if there is none."""
    wanted, came_from, todo = set(ends), {start: ""}, deque([start])
    while todo:
        node = todo.popleft()
        if node in wanted and node != start:
            way = [node]
            while came_from[way[-1]]:
                way.append(came_from[way[-1]])
            return way[::-1]
        for target in sorted(graph.get(node, ())):
            if target not in came_from:
                came_from[target] = node
                todo.append(target)
    return []


def levels(graph: Graph) -> dict[str, int]:
    """The height of each entry: 1 if it imports nothing, else one above the highest it imports; a cycle counts once."""
    reach = {node: reachable(graph, node) for node in graph}

    def height(node: str, known: dict[str, int]) -> int:
        if node not in known:
            below = {other for other in reach[node] if node not in reach.get(other, ()) and other != node}
            known[node] = 1 + max((height(other, known) for other in below), default=0)
        return known[node]

    known: dict[str, int] = {}
    return {node: height(node, known) for node in graph}
