"""Change a recipe from outside: `pruning.final_sparsity=0.95`, `callbacks.0.begin=20%`, `trainer.max_epochs=3`."""

import re
from collections.abc import Iterable
from typing import Any

from lightning_compress.core.registry import near_miss
from lightning_compress.recipe.objects import as_object, is_object, short_name
from lightning_compress.recipe.safe_yaml import SourceValue, parse_yaml


def apply_override(root: SourceValue, setting: str, names: list[str], sections: Iterable[str]) -> SourceValue:
    """Return the recipe with one value changed.

    Args:
        root: the recipe, its callbacks written out as objects.
        setting: `key=value`. The key is a path from the top or from the name of a callback; the value is YAML.
        names: the name of each callback, in their order.
        sections: the keys that a recipe may have.

    Raises:
        ValueError: if the key leads nowhere; the message has the nearest one that is there.
    """
    where = f"--set {setting}"
    key, equals, text = setting.partition("=")
    keys = [part for part in re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".") if part]
    if not equals or not keys:
        raise ValueError(f"{where}: write key=value, such as pruning.final_sparsity=0.95.")
    sections = list(sections)
    if keys[0] not in sections:
        keys = ["callbacks", str(_index_of(keys[0], names, sections, where)), *keys[1:]]
    return _changed(root, keys, parse_yaml(text, lambda line: where), [])


def _index_of(name: str, names: list[str], sections: list[str], where: str) -> int:
    if names.count(name) > 1:
        places = " or ".join(f"callbacks.{index}" for index, other in enumerate(names) if other == name)
        raise ValueError(f"{where}: {names.count(name)} callbacks are named '{name}'. Write {places}.")
    if name not in names:
        known = sorted({*names, *sections})
        raise ValueError(f"{where}: nothing is named '{name}'.{near_miss(name, known)} Known: {', '.join(known)}.")
    return names.index(name)


def _changed(node: SourceValue, keys: list[str], new: SourceValue, path: list[str]) -> SourceValue:
    if not keys:
        return new
    if isinstance(node.value, list):
        return _changed_list(node, keys, new, path)
    if is_object(node.value):
        return _changed_object(node, keys, new, path)
    if isinstance(node.value, dict):
        return _changed_mapping(node, keys, new, path)
    written_form = "[...]" if keys[0].isdecimal() else "{class_path: ..., init_args: {...}}"
    raise ValueError(
        f"{new.where}: {'.'.join(path)} is {node.value!r}, which has no '{'.'.join(keys)}'. Set it as a whole: "
        f"{'.'.join(path)}={written_form}."
    )


def _changed_list(node: SourceValue, keys: list[str], new: SourceValue, path: list[str]) -> SourceValue:
    items, index = list(node.value), int(keys[0]) if keys[0].isdecimal() else -1
    if not 0 <= index < len(items):
        raise ValueError(
            f"{new.where}: {'.'.join(path)} has {len(items)} entries, counted from 0, so '{keys[0]}' leads nowhere."
        )
    items[index] = _changed(items[index], keys[1:], new, [*path, keys[0]])
    return SourceValue(items, node.where)


def _changed_object(node: SourceValue, keys: list[str], new: SourceValue, path: list[str]) -> SourceValue:
    node = as_object(node, ".".join(path))
    part = "class_path" if keys[0] == "class_path" else "init_args"
    if keys[0] in ("class_path", "init_args", short_name(node)):
        path, keys = [*path, keys[0]], keys[1:]
    return SourceValue({**node.value, part: _changed(node.value[part], keys, new, path)}, node.where)


def _changed_mapping(node: SourceValue, keys: list[str], new: SourceValue, path: list[str]) -> SourceValue:
    values: dict[Any, SourceValue] = node.value
    written_form = ".".join(keys)
    if written_form in values or len(keys) == 1:  # a key may have dots of its own, such as the wildcard "*.conv1"
        return SourceValue({**values, written_form: new}, node.where)
    if keys[0] in values:
        child = values[keys[0]]
    elif path:
        here, known = ".".join(path), [str(key) for key in values]
        raise ValueError(
            f"{new.where}: {here} has no '{keys[0]}' in the recipe.{near_miss(keys[0], known)} Written there: "
            f"{', '.join(known) or 'nothing'}. Set it as a whole: {here}.{keys[0]}={{{'.'.join(keys[1:])}: ...}}."
        )
    else:
        child = SourceValue({}, new.where)
    return SourceValue({**values, keys[0]: _changed(child, keys[1:], new, [*path, keys[0]])}, node.where)
