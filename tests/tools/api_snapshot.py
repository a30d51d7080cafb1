"""The public names of the package and their signatures, as plain values; kept in `tests/golden/api.json`.

    python -m tests.tools.api_snapshot           print how the code differs from the snapshot; status 1 if it does
    python -m tests.tools.api_snapshot --write   renew the snapshot, where a public name changed on purpose

It holds what `lightning_compress.__all__` names, with the public methods that the package itself defines, and the names
that arguments such as `criterion=` look up.
"""

import argparse
import difflib
import inspect
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_compress
from lightning_compress.core.registry import registered

PACKAGE = "lightning_compress"
SNAPSHOT = Path(__file__).parents[1] / "golden" / "api.json"
RENEW = "python -m tests.tools.api_snapshot --write"
REGISTRIES = (
    "core.schedules", "pruning.functional.criteria", "pruning.functional.distributions",
    "channel_pruning.functional.criteria", "channel_pruning.functional.distributions",
    "channel_pruning.functional.penalties", "distillation.losses", "quantization.functional.quantizers",
)  # fmt: skip


def snapshot() -> dict[str, Any]:
    """All that users may write, by name."""
    return {
        "public": {name: describe(getattr(lightning_compress, name)) for name in sorted(lightning_compress.__all__)},
        "registries": {name: _registry(import_module(f"{PACKAGE}.{name}")) for name in REGISTRIES},
    }


def describe(member: Any) -> Any:
    """The signature of a function; of a class also its methods and properties; the type of anything else."""
    if inspect.isclass(member):
        return {"()": signature_of(member)} | dict(sorted(_methods(member).items()))
    return signature_of(member) if callable(member) else type(member).__name__


def _methods(kind: type[Any]) -> dict[str, str]:
    """Public members that a class has from the package, not from Lightning or torch."""
    found = {}
    for owner in reversed(kind.__mro__):
        if owner.__module__.partition(".")[0] == PACKAGE and owner.__module__ != f"{PACKAGE}._lightning":
            for name, value in vars(owner).items():
                if not name.startswith("_"):
                    found[name] = _member(value)
    return found


def _member(value: Any) -> str:
    if isinstance(value, property):
        return "property"
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {signature_of(value.__func__)}"
    return signature_of(value) if callable(value) else type(value).__name__


def _registry(module: ModuleType) -> dict[str, str]:
    return {name: signature_of(member) for name, member in sorted(registered(module).items())}


def signature_of(function: Callable[..., Any]) -> str:
    """Parameters with their kinds and defaults, without types.

    >>> signature_of(lambda a, /, b=2, *c, d="x", e=max, **f: 0)
    "(a, /, b=2, *c, d='x', e=max, **f)"
    """
    found = inspect.signature(function)
    plain = [one.replace(annotation=one.empty, default=_shown(one.default)) for one in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


class _Name(str):
    """A text that stands in a signature without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _shown(default: Any) -> Any:
    if default is inspect.Parameter.empty or not hasattr(default, "__qualname__"):
        return default
    return _Name(default.__qualname__)


def as_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def differences() -> str:
    """A unified diff from the snapshot to the code; empty if they agree."""
    old, new = SNAPSHOT.read_text(encoding="utf-8"), as_text(snapshot())
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "snapshot", "code", n=1))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the snapshot")
    if parser.parse_args(arguments).write:
        SNAPSHOT.write_text(as_text(snapshot()), encoding="utf-8")
        print(f"Wrote {SNAPSHOT}")
        return 0
    print(found := differences() or "The code agrees with the snapshot.")
    return int(found.startswith("---"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
