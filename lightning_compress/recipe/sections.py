"""The sections of a recipe: which there are, how they are written in full, what is checked before anything is made."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from lightning_compress.recipe.classes import Classes, arguments_of, is_callback
from lightning_compress.recipe.objects import as_object, check_keys, check_objects, find_class, short_name
from lightning_compress.recipe.safe_yaml import SourceValue

SECTIONS = ("callbacks", "start_from", "model", "data", "trainer", "seed_everything")
JOINING = ("callbacks", "start_from")  # what a run of somebody's own script can use


def known_sections(root: SourceValue) -> SourceValue:
    """Return `root`, which has the sections of a recipe.

    Raises:
        ValueError: if it has others, or neither callbacks nor a model.
    """
    if not isinstance(root.value, dict):
        raise ValueError(f"{root.where}: a recipe is a mapping with the key `callbacks:`, not {_kind(root.value)}.")
    for key, child in root.value.items():
        check_keys({key: child}, SECTIONS, "recipe", "key")
    if not root.value.keys() & {"callbacks", "model"}:
        raise ValueError(
            f"{root.where}: a recipe has the key `callbacks:`, a list, but here are {', '.join(root.value)}."
        )
    return root


def expand_sections(root: SourceValue) -> SourceValue:
    """Return the recipe with each callback, model, data and logger as `{class_path: ..., init_args: {...}}`.

    Raises:
        ValueError: if a section is not of its kind.
    """
    sections = dict(root.value)
    for key, kind in (("callbacks", list), ("trainer", dict)):
        if key in sections and not isinstance(sections[key].value, kind):
            expected = "a list" if kind is list else "a mapping"
            raise ValueError(f"{sections[key].where}: {key} is {expected}, not {_kind(sections[key].value)}.")
    if "callbacks" in sections:
        entries = enumerate(sections["callbacks"].value)
        written = [as_object(entry, f"callbacks[{index}]") for index, entry in entries]
        sections["callbacks"] = SourceValue(written, sections["callbacks"].where)
    for key in {"model", "data"} & sections.keys():
        sections[key] = as_object(sections[key], key)
    if "trainer" in sections and "logger" in sections["trainer"].value:
        trainer = sections["trainer"]
        logger = _loggers_written_out(trainer.value["logger"])
        sections["trainer"] = SourceValue({**trainer.value, "logger": logger}, trainer.where)
    return SourceValue(sections, root.where)


def callback_entries(root: SourceValue) -> list[tuple[str, SourceValue]]:
    """Each callback with its place, such as "callbacks[0]"."""
    callbacks = root.value.get("callbacks", SourceValue([], root.where))
    return [(f"callbacks[{index}]", entry) for index, entry in enumerate(callbacks.value)]


def section_names(root: SourceValue, classes: Classes) -> list[str]:
    """The name of each callback: its argument, its class's default, or for others the class in lower case."""
    return [_name(entry, place, classes) or short_name(entry).lower() for place, entry in callback_entries(root)]


def _name(entry: SourceValue, place: str, classes: Classes) -> str | None:
    if "name" in entry.value["init_args"].value:
        return str(entry.value["init_args"].value["name"].value)
    known = arguments_of(find_class(entry, f"{place}.{short_name(entry)}", classes)) or {}
    default = known["name"].default if "name" in known else None
    return default if isinstance(default, str) else None


def check_sections(root: SourceValue, classes: Classes) -> None:
    """Check every class, every argument's name and the callbacks' names; nothing is made.

    Raises:
        ValueError: with the file, the line, the place and the nearest right name.
    """
    _check_callbacks(callback_entries(root), classes)
    for name in ("model", "data"):
        if name in root.value:
            check_objects(root.value[name], name, classes)
    if "trainer" in root.value:
        _check_trainer(root.value["trainer"], classes)
    start = root.value.get("start_from")
    if start is not None and (not isinstance(start.value, str) or not start.value.strip()):
        raise ValueError(f"{start.where}: start_from is the path of a checkpoint, not {start.plain()!r}.")
    seed = root.value.get("seed_everything", SourceValue(False, root.where))
    if not isinstance(seed.value, int) or seed.value < 0:
        raise ValueError(f"{seed.where}: seed_everything is a whole number, true or false, not {seed.plain()!r}.")


def trainer_class(classes: Classes) -> type[Any]:
    """The Trainer of the Lightning that the recipe runs on."""
    return import_module(classes.lightning).Trainer  # type: ignore[no-any-return]


def _loggers_written_out(node: SourceValue) -> SourceValue:
    if isinstance(node.value, list):
        return SourceValue([_loggers_written_out(entry) for entry in node.value], node.where)
    return as_object(node, "trainer.logger") if isinstance(node.value, str | dict) else node


def _check_callbacks(callbacks: Iterable[tuple[str, SourceValue]], classes: Classes) -> None:
    taken: dict[str, str] = {}
    for place, entry in callbacks:
        check_objects(entry, place, classes)
        label = f"{place}.{short_name(entry)}"
        if not is_callback(find_class(entry, label, classes)):
            raise ValueError(f"{entry.where}: {label}: '{short_name(entry)}' is no callback.")
        name = _name(entry, place, classes)
        if name in taken:
            raise ValueError(
                f"{entry.where}: {label}: the name '{name}' is taken by {taken[name]}. Write another: name: {name}_2."
            )
        if name is not None:
            taken[name] = f"{label} ({entry.where})"


def _check_trainer(section: SourceValue, classes: Classes) -> None:
    if "callbacks" in section.value:
        raise ValueError(
            f"{section.value['callbacks'].where}: trainer.callbacks: in a recipe `callbacks:` stands at the top, by "
            f"`trainer:`."
        )
    check_keys(section.value, arguments_of(trainer_class(classes)), "trainer", "argument")
    for key, child in section.value.items():
        check_objects(child, f"trainer.{key}", classes)


def _kind(value: object) -> str:
    return {list: "a list", dict: "a mapping", type(None): "nothing"}.get(type(value), repr(value))
