"""The objects of a recipe, a class and its arguments: read, checked, and only then made."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_compress.core.registry import near_miss
from lightning_compress.recipe.classes import Classes, arguments_of
from lightning_compress.recipe.safe_yaml import SourceValue


def is_object(value: Any) -> bool:
    """Whether a value is written as LightningCLI writes an object, at any depth."""
    return isinstance(value, dict) and "class_path" in value


def as_object(entry: SourceValue, place: str) -> SourceValue:
    """Write an entry out as `{class_path: ..., init_args: {...}}`.

    Args:
        entry: that form, or one of the short forms `Pruning` and `Pruning: {final_sparsity: 0.9}`.

    Raises:
        ValueError: if it is none of these.
    """
    value = entry.value
    if isinstance(value, str):
        value = {"class_path": entry}
    elif isinstance(value, dict) and len(value) == 1 and not is_object(value):
        ((name, arguments),) = value.items()
        value = {"class_path": SourceValue(name, arguments.where), "init_args": arguments}
    if not is_object(value):
        raise ValueError(f"{entry.where}: {place}: {_no_object(value)}")
    check_keys(value, ("class_path", "init_args"), place, "key")
    if not isinstance(value["class_path"].value, str):
        raise ValueError(
            f"{entry.where}: {place}.class_path: {value['class_path'].plain()!r} is not the name of a class."
        )
    arguments = value.get("init_args", SourceValue({}, entry.where))
    if arguments.value is None:
        arguments = SourceValue({}, arguments.where)
    if not isinstance(arguments.value, dict):
        raise ValueError(
            f"{arguments.where}: {place}: the arguments are a mapping, such as {{final_sparsity: 0.9}}, but here is "
            f"{arguments.plain()!r}."
        )
    return SourceValue({"class_path": value["class_path"], "init_args": arguments}, entry.where)


def short_name(node: SourceValue) -> str:
    """The class name of an object, without its package."""
    return str(node.value["class_path"].value).rpartition(".")[2]


def find_class(node: SourceValue, place: str, classes: Classes) -> type[Any]:
    """Return the class of an object.

    Raises:
        ValueError: if it is unknown or not allowed.
    """
    name = node.value["class_path"]
    try:
        return classes.find(name.value)
    except ValueError as error:
        raise ValueError(f"{name.where}: {place}: {error}") from error


def check_objects(node: SourceValue, place: str, classes: Classes) -> None:
    """Check the classes and the names of the arguments of a value and all within it; nothing is made.

    Raises:
        ValueError: for an unknown class or argument; the message has the place and the nearest right name.
    """
    if is_object(node.value):
        node = as_object(node, place)
        place = f"{place}.{short_name(node)}"
        found = find_class(node, place, classes)
        renamed = getattr(found, "renamed_arguments", {})
        check_keys(node.value["init_args"].value, arguments_of(found), place, "argument", renamed)
        node = node.value["init_args"]
    for inner_place, child in _children(node, place):
        check_objects(child, inner_place, classes)


def build_objects(node: SourceValue, place: str, classes: Classes) -> Any:
    """Make the objects of a value; plain values stay as they are.

    Raises:
        ValueError: as `check`; and what a constructor refuses, with the place in front of its words.
    """
    if isinstance(node.value, list):
        return [build_objects(child, inner_place, classes) for inner_place, child in _children(node, place)]
    if not isinstance(node.value, dict):
        return node.value
    if not is_object(node.value):
        return {key: build_objects(child, f"{place}.{key}", classes) for key, child in node.value.items()}
    node = as_object(node, place)
    place = f"{place}.{short_name(node)}"
    cls = find_class(node, place, classes)
    written = node.value["init_args"].value
    arguments = {key: build_objects(child, f"{place}.{key}", classes) for key, child in written.items()}
    return construct(cls, arguments, written, f"{node.where}: {place}")


def construct(cls: type[Any], arguments: dict[str, Any], written: dict[str, SourceValue], place: str) -> Any:
    """Make `cls(**arguments)`.

    Raises:
        ValueError: if the constructor raises, with its words and the place of the argument that they name.
    """
    try:
        return cls(**arguments)
    except Exception as error:  # a constructor may raise anything, and all of it happened at this place
        words = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        named = _blamed(words, written)
        if named is not None:
            place = f"{written[named].where}: {place.partition(': ')[2]}.{named}"
        raise ValueError(f"{place}: {words}") from error


def check_keys(
    values: dict[Any, SourceValue],
    known: Iterable[str] | None,
    place: str,
    kind: str,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Refuse a key that is not among `known`, if these are known.

    Raises:
        ValueError: with the place, the nearest known key, and all of them.
    """
    names = None if known is None else list(known)
    for key, child in values.items():
        if names is not None and key not in names:
            new = (renamed or {}).get(str(key))
            nearest = near_miss(str(key), names) if new is None else f" It is called '{new}' now."
            hint = f"{nearest} Known: {', '.join(names) or 'none'}."
            raise ValueError(f"{child.where}: {place}.{key}: unknown {kind} '{key}'.{hint}".replace(": .", ": "))


def _blamed(words: str, written: dict[str, SourceValue]) -> str | None:
    """The one argument whose name stands in the words of an error, or else whose value does."""
    by_name = [key for key in written if re.search(rf"\b{re.escape(str(key))}\b", words)]
    by_value = [key for key, child in written.items() if isinstance(child.value, str) and repr(child.value) in words]
    found = by_name or by_value
    return found[0] if len(found) == 1 else None


def _children(node: SourceValue, place: str) -> list[tuple[str, SourceValue]]:
    if isinstance(node.value, list):
        return [(f"{place}[{index}]", child) for index, child in enumerate(node.value)]
    return [(f"{place}.{key}", child) for key, child in node.value.items()] if isinstance(node.value, dict) else []


def _no_object(value: Any) -> str:
    if isinstance(value, dict) and value:
        keys = [str(key) for key in value]
        return (
            f"one class with its arguments belongs here, but there are {len(keys)} keys, {', '.join(keys)}. Indent the "
            f"arguments below the class, or write class_path and init_args."
        )
    found = "nothing" if value is None or value == {} else f"{value!r}" if isinstance(value, int | float) else "a list"
    return f"a class belongs here, such as `Pruning: {{final_sparsity: 0.9}}`, but here is {found}."
