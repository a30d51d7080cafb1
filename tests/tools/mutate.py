"""Break single lines of the package, one at a time, and count how many breaks the tests notice.

    python -m tests.tools.mutate --count 60 --seed 0 --write mutations.json

Lines are drawn by a seeded generator from all subpackages, in proportion to how many lines each has that can be broken.
Each break is made in a temporary copy of the tree, never in the tree itself. The tests that run are those that import
the broken file, those of its subpackage, the contract of its callback, and those of the subpackages that import the
file. `--root` and `--python` break another tree with this script, such as an older commit of the same project.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.tools.import_graph import import_graph, imported_names, read_trees

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_compress"
SLOW = ("tests/ddp", "tests/test_benchmarks.py", "tests/test_house.py", "tests/test_packaging.py", "tests/recipes")
ABOVE_CALLBACKS = ("(top)", "recipe", "export")  # what no callback imports
LIMIT_S = 180.0  # of each group of tests
COMPARED = {
    ast.Lt: ast.GtE, ast.LtE: ast.Lt, ast.Gt: ast.LtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin", "floor": "ceil"}


@dataclass(frozen=True)
class Mutation:
    """Text that takes the place of other text within one line; columns count UTF-8 bytes, as `ast` does."""

    file: str
    line: int
    begin: int
    end: int
    operator: str
    before: str
    after: str

    def apply(self, source: str) -> str:
        lines = source.split("\n")
        text = lines[self.line - 1].encode()
        assert text[self.begin : self.end].decode() == self.before, f"{self.file}:{self.line} is another line"
        lines[self.line - 1] = (text[: self.begin] + self.after.encode() + text[self.end :]).decode()
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """What the tests said about a mutation: "killed", "survived", "timeout", or "invalid" if they fail without it."""

    mutation: Mutation
    result: str
    failed: str = ""
    seconds: float = 0.0


def mutations(source: str, file: str) -> list[Mutation]:
    """Every break of one line that can be made within the functions of a file."""
    found: dict[Mutation, None] = {}
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                for node in _executed(statement):
                    found |= dict.fromkeys(_of_node(node, source, file))
    return list(found)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """A statement and what lies in it, but for annotations, messages of errors, and other functions."""
    yield node
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if name in ("annotation", "returns") or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        for child in children:
            if isinstance(child, ast.AST) and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _executed(child)


def _of_node(node: ast.AST, source: str, file: str) -> Iterator[Mutation]:
    for operator, changed in _changes(node):
        if node.lineno == node.end_lineno:  # type: ignore[attr-defined]
            before = ast.get_source_segment(source, node)
            if before is not None and before != changed:
                yield Mutation(file, node.lineno, node.col_offset, node.end_col_offset, operator, before, changed)  # type: ignore[attr-defined]


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The name of each operator that fits a node, with the text that takes its place."""
    match node:
        case ast.Compare(left=left, ops=[op, *ops], comparators=comparators):
            yield "comparison", _text(ast.Compare(left, [COMPARED[type(op)](), *ops], comparators))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in COMPUTED:
            yield "arithmetic", _text(ast.BinOp(left, COMPUTED[type(op)](), right))
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in COMPUTED:
            yield "arithmetic", ast.unparse(ast.AugAssign(target, COMPUTED[type(op)](), value))
        case ast.BoolOp(op=op, values=values):
            yield "and/or", _text(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "drop not or minus", _text(operand)
        case ast.Constant(value=bool(value)):
            yield "boolean", str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant + 1", str(value + 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in SWAPPED:
            yield "swap function", ast.unparse(ast.Call(ast.Name(SWAPPED[name]), args, keywords))
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=keywords) if name in SWAPPED:
            yield "swap function", ast.unparse(ast.Call(ast.Attribute(value, SWAPPED[name]), args, keywords))
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield "return None", "return None"
        case ast.Expr(value=ast.Call()):
            yield "delete statement", "pass"
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "swap branches", _text(ast.IfExp(test, orelse, body))


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def draw(root: Path, count: int, seed: int) -> list[Mutation]:
    """Mutations of different lines, from every subpackage in proportion to its lines, and at least one of each."""
    package, generator = root / PACKAGE, random.Random(seed)
    lines: dict[str, dict[tuple[str, int], list[Mutation]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        for mutation in mutations(path.read_text(encoding="utf-8"), file):
            lines[subpackage(file)][file, mutation.line].append(mutation)
    shares = quotas({name: len(found) for name, found in lines.items()}, count)
    drawn = []
    for name, share in sorted(shares.items()):
        places = generator.sample(sorted(lines[name]), share)
        drawn += [generator.choice(lines[name][place]) for place in places]
    return drawn


def subpackage(file: str) -> str:
    """The folder of a file below the package; "(top)" for those that lie in the package itself."""
    return file.split("/")[0] if "/" in file else "(top)"


def quotas(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Whole shares of a count in proportion to sizes, at least 1 each, that add up to it.

    >>> quotas({"a": 60, "b": 39, "c": 1}, 10)
    {'a': 6, 'b': 3, 'c': 1}
    """
    total = sum(sizes.values())
    shares = {name: max(1, count * size // total) for name, size in sizes.items()}
    while (missing := count - sum(shares.values())) != 0:
        step = 1 if missing > 0 else -1
        open_ones = [name for name in sizes if shares[name] + step >= 1 and shares[name] + step <= sizes[name]]
        if not open_ones:
            break
        farthest = max(open_ones, key=lambda name: step * (count * sizes[name] / total - shares[name]))
        shares[farthest] += step
    return shares


def groups_of_tests(root: Path, file: str) -> list[list[str]]:
    """Arguments of pytest for each group of tests that may notice a break in a file, the nearest first."""
    package, top = root / PACKAGE, subpackage(file)
    near = _tests_that_import(root, file)
    if (root / "tests" / top).is_dir():
        near.append(f"tests/{top}")
    contract = ["tests/contract", "-k", _contract_filter(package / top / "callback.py")]
    # A file of the package beside files of tests would be imported a second time, under the same name.
    doctests = [f"{PACKAGE}/{file}"] if ">>>" in (package / file).read_text(encoding="utf-8") else []
    groups = [doctests, near, contract if top not in ABOVE_CALLBACKS and (root / contract[0]).is_dir() else []]
    importers = {
        subpackage(name) for name, targets in import_graph(read_trees(package), PACKAGE).items() if file in targets
    }
    far = [f"tests/{name}" for name in sorted(importers - {top}) if (root / "tests" / name).is_dir()]
    far += [f"tests/{name}" for name in ("test_golden.py", "test_pairs.py") if (root / "tests" / name).exists()]
    return [*groups, far]


def _tests_that_import(root: Path, file: str) -> list[str]:
    """Test files that import a file, or are named after it; the latter first."""
    module = f"{PACKAGE}.{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
    named, importing = [], []
    for path in sorted((root / "tests").rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(SLOW):
            continue
        if path.stem == f"test_{Path(file).stem}" and path.stem != "test_callback":
            named.append(name)
        elif module in imported_names(ast.parse(path.read_text(encoding="utf-8")), PACKAGE, name):
            importing.append(name)
    return named + importing


def _contract_filter(callback: Path) -> str:
    """Under one Lightning name: all cases of the callbacks that a file defines, or of all callbacks."""
    if not callback.exists():
        return "pytorch_lightning"
    names = [
        node.name for node in ast.parse(callback.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    return (
        f"pytorch_lightning and ({' or '.join(names)})"
        if callback.parent.name not in ("core", "training")
        else "pytorch_lightning"
    )


def run_tests(tree: Path, python: str, arguments: Sequence[str], limit_s: float) -> tuple[str, str]:
    """Run pytest in a tree until the first failure; returns "killed", "survived" or "timeout", and what failed."""
    command = [python, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no", *arguments]
    environment = os.environ | {
        "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "timeout", ""
    if process.returncode in (0, 5):  # 5: no test was selected
        return "survived", ""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "killed", (lines or output.splitlines()[-1:] or [f"status {process.returncode}"])[0]


def try_mutation(tree: Path, python: str, mutation: Mutation, limit_s: float = LIMIT_S) -> Outcome:
    """Break a line of a tree, run the tests that may notice, and mend the line again."""
    path = tree / PACKAGE / mutation.file
    source, groups, start = path.read_text(encoding="utf-8"), groups_of_tests(tree, mutation.file), time.monotonic()
    result, failed, timed_out = "survived", "", False
    path.write_text(mutation.apply(source), encoding="utf-8")
    try:
        for group in filter(None, groups):
            result, failed = run_tests(tree, python, group, limit_s)
            timed_out |= result == "timeout"
            if result == "killed":
                break
    finally:
        path.write_text(source, encoding="utf-8")
    if result == "killed" and not _passes(tree, python, failed, limit_s):
        result = "invalid"
    if result == "survived" and timed_out:
        result = "timeout"
    return Outcome(mutation, result, failed, time.monotonic() - start)


def _passes(tree: Path, python: str, failed: str, limit_s: float) -> bool:
    """Whether the file of a failed test passes in the tree as it is now."""
    file = failed.partition(" ")[2].partition(" ")[0].partition("::")[0]
    return not (tree / file).is_file() or run_tests(tree, python, [file], limit_s)[0] == "survived"


def copy_tree(root: Path, target: Path) -> Path:
    """Copy what tests need, without version control, environments and outputs."""
    unwanted = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", "*.egg-info", ".*_cache", "wandb")
    return Path(shutil.copytree(root, target / "tree", ignore=unwanted))


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Results by subpackage, and in all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        counts[subpackage(outcome.mutation.file)][outcome.result] += 1
        counts["all"][outcome.result] += 1
    return {name: dict(found) for name, found in counts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="mutations to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to break a copy of")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the tests")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each group of tests")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--write", type=Path, help="a JSON file for the results")
    chosen = parser.parse_args(arguments)
    drawn = draw(chosen.root, chosen.count, chosen.seed)
    if chosen.list:
        for mutation in drawn:
            print(f"{mutation.file}:{mutation.line}: {mutation.operator}: {mutation.before} -> {mutation.after}")
        return 0
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(chosen.root, Path(folder))
        for mutation in drawn:
            outcome = try_mutation(tree, chosen.python, mutation, chosen.limit)
            outcomes.append(outcome)
            where = f"{mutation.file}:{mutation.line}: {mutation.before} -> {mutation.after}"
            print(
                f"{len(outcomes)}/{len(drawn)} {outcome.result} {outcome.seconds:.0f} s  {where}  {outcome.failed}",
                flush=True,
            )
            if chosen.write is not None:
                result = {"seed": chosen.seed, "summary": summary(outcomes), "outcomes": [*map(asdict, outcomes)]}
                chosen.write.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(summary(outcomes), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
