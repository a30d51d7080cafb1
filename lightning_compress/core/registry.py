"""Find a function or class by its name: a module's public names are the registry."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from inspect import isclass, isfunction, signature
from types import ModuleType
from typing import Any

_allowed: ContextVar[tuple[str, ...] | None] = ContextVar("allowed dotted paths", default=None)


def registered(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The public functions and classes written in `module` itself, by their name in snake_case.

    A package has those that it imports from its own files. A name that would be a keyword is written with `_` at its
    end and found without.
    """
    own = {
        name: member
        for name, member in vars(module).items()
        if (isfunction(member) or isclass(member)) and _is_in(member.__module__, module.__name__) and name[0] != "_"
    }
    return {in_snake_case(name): member for name, member in own.items()}


def in_snake_case(name: str) -> str:
    """The name under which a function or class is found.

    >>> in_snake_case("OneCycle"), in_snake_case("global_")
    ('one_cycle', 'global')
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().rstrip("_")


def find(
    name: str | Callable[..., Any], module: ModuleType, renamed: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Return what `module` calls `name`, or what a dotted path `package.module.function` leads to.

    Args:
        name: or the function itself, which is returned.
        module: whose public functions and classes are meant.
        renamed: new names by old ones, for the words of an error.

    Raises:
        ValueError: if there is no such thing; the message lists what there is.
    """
    if callable(name):
        return name
    if not isinstance(name, str):
        raise ValueError(
            f"{name!r} is no name: write one of {sorted(registered(module))}, a dotted path or a function."
        )
    if "." in name:
        return _imported(name)
    known = registered(module)
    if name not in known:
        hint = f" It is called '{renamed[name]}' now." if renamed and name in renamed else near_miss(name, known)
        raise ValueError(
            f"No '{name}' in {module.__name__}.{hint} Choose one of {sorted(known)}, or give a dotted path to your own."
        )
    return known[name]


def check_signature(function: Callable[..., Any], offered: Iterable[str]) -> Callable[..., Any]:
    """Return `function`, if all it asks for is offered.

    Raises:
        ValueError: if not.
    """
    for name in required_args(function) - set(offered):
        raise ValueError(
            f"{getattr(function, '__name__', function)} asks for '{name}', which nobody gathers."
            f"{near_miss(name, offered)} Its parameters may be {', '.join(offered)}, or have "
            f"defaults; here they are {signature(function)}."
        )
    return function


def near_miss(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or nothing.

    >>> near_miss("magnitud", ["magnitude", "random"])
    " Did you mean 'magnitude'?"
    """
    close = get_close_matches(str(name), [str(one) for one in known], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def required_args(function: Callable[..., Any]) -> frozenset[str]:
    """What `function` asks for: the names of its parameters that have no default."""
    return frozenset(
        name for name, parameter in signature(function).parameters.items() if parameter.default is parameter.empty
    )


def call_with_supported_args(function: Callable[..., Any], **offered: Any) -> Any:
    """Call `function` with those of the `offered` values that it names as parameters."""
    return function(**{name: offered[name] for name in signature(function).parameters if name in offered})


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@contextmanager
def restricted_imports(allow: Iterable[str]) -> Iterator[None]:
    """Within the context, dotted paths are imported only if they match one of `allow`, with `*` wildcards.

    So must the place where the found thing is written, unless its path is allowed word for word.
    A file that somebody else wrote must not decide which code runs.
    """
    token = _allowed.set(tuple(allow))
    try:
        yield
    finally:
        _allowed.reset(token)


def path_matches(path: str, allow: Iterable[str]) -> bool:
    """Whether one of `allow` is this dotted path, with `*` wildcards."""
    return any(fnmatchcase(path, pattern) for pattern in allow)


def refuse_from_elsewhere(path: str, found: Any, allow: Collection[str]) -> None:
    """Refuse what an allowed module has only imported: `my_package.*` is about what is written in my_package.

    A path that stands in `allow` word for word is let in, wherever it leads.

    Raises:
        ValueError: if the place where `found`, or else its class, is written matches none of `allow`.
    """
    named = found if hasattr(found, "__qualname__") else type(found)
    module = getattr(named, "__module__", None) or type(named).__module__  # methods of built-in types have none
    home = f"{module}.{named.__qualname__}"
    if path not in allow and not path_matches(home, allow):
        raise ValueError(f"'{path}' is '{home}', which is not allowed here. If you trust it: allow=['{path}'].")


def _imported(path: str) -> Callable[..., Any]:
    allowed = _allowed.get()
    if allowed is not None and not path_matches(path, allowed):
        raise ValueError(f"'{path}' is not allowed here. If you trust it, allow it by name: allow=['{path}'].")
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two for "." and ".relative"
        raise ValueError(f"'{path}' cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"'{path}' is a {type(found).__name__}, but must be callable.")
    if allowed is not None:
        refuse_from_elsewhere(path, found, allowed)
    return found  # type: ignore[no-any-return]
