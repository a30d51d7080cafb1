"""Read YAML as plain values that know where they were written; nothing in the text can make an object.

Numbers, `null` and `true`/`yes`/`on` are read as in LightningCLI's files; every other plain word is text, so that `2:4`
stays a pattern, where PyYAML, and so LightningCLI, makes 124 of it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

MAX_BYTES = 2**20
MAX_NODES = 10_000
MAX_DEPTH = 100


@dataclass(frozen=True)
class SourceValue:
    """A value as written: a scalar, a list or a dict of located values, and `where`, such as "prune.yaml:3"."""

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


def read_yaml(path: str | Path) -> SourceValue:
    """Read a file of one YAML document.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text, too large, empty, or anything that `parse_yaml` refuses.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked in {path.absolute().parent}).")
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, but a recipe has at most {MAX_BYTES:,}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}."
        ) from error
    return parse_yaml(text, lambda line: f"{path}:{line}")


def parse_yaml(text: str, where: Callable[[int], str]) -> SourceValue:
    """Read one YAML document; `where` names the place of a line, counted from 1.

    Raises:
        ValueError: for invalid YAML, tags, a key that stands twice, an alias of itself, or more than 10,000 values.

    >>> parse_yaml("{granularity: 2:4, rate: 1e-3}", str).plain()
    {'granularity': '2:4', 'rate': 0.001}
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{where(mark.line + 1 if mark else 1)}: {_in_words(error)}.") from error
    if root is None:
        raise ValueError(f"{where(1)}: nothing is written here.")
    return _Reader(where).read(root)


class _Loader(yaml.SafeLoader):
    """Composes nodes, makes no values, and stops at tags and at too many or too deep nodes."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(f"the tag '{tag}' is refused: a recipe holds plain values only", event)
        if self.nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES:,} values", event)
        if self.depth > MAX_DEPTH:
            raise _Refused(f"more than {MAX_DEPTH} values inside each other", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Refused(yaml.MarkedYAMLError):
    """What is YAML, but not for us."""

    def __init__(self, problem: str, event: yaml.Event) -> None:
        super().__init__(problem=problem, problem_mark=cast("yaml.error.Mark", event.start_mark))


def _in_words(error: yaml.YAMLError) -> str:
    if isinstance(error, _Refused):
        return str(error.problem)
    if isinstance(error, yaml.MarkedYAMLError):
        return "not valid YAML: " + ", ".join(filter(None, (error.context, error.problem)))
    return "not valid YAML: " + " ".join(str(error).split())


_KINDS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (
        r"(?i:true|yes|on|false|no|off)",
        "tTyYoOfFnN",
        lambda text: text.lower() in ("true", "yes", "on"),
    ),
    "int": (r"[-+]?(0|[1-9][0-9]{0,39}|[1-9][0-9]{0,2}(_[0-9]{3}){1,12})", "-+0123456789", int),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
    "merge": (r"<<", "<", str),
}
for _kind, (_pattern, _first, _) in _KINDS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _kind == "null" else [])]
    )


class _Reader:
    """Turns nodes into located values, aliases written out, and counts them."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self._where, self._left, self._open = where, MAX_NODES, set[int]()

    def read(self, node: yaml.Node) -> SourceValue:
        where = self._place(node)
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"{where}: more than {MAX_NODES:,} values once every alias is written out.")
        if id(node) in self._open:
            raise ValueError(f"{where}: this value contains an alias of itself.")
        self._open.add(id(node))
        value = self._value(node)
        self._open.discard(id(node))
        return SourceValue(value, where)

    def _value(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child) for child in node.value]
        kind = node.tag.rpartition(":")[2]
        return _KINDS[kind][2](node.value) if kind in _KINDS else node.value

    def _mapping(self, node: yaml.MappingNode) -> dict[Any, SourceValue]:
        merged: dict[Any, SourceValue] = {}
        own: dict[Any, SourceValue] = {}
        for key_node, value_node in node.value:
            value = self.read(value_node)
            if key_node.tag.endswith(":merge"):
                merged = {**self._merge(value), **merged}
                continue
            key, where = self._key(key_node), self._place(key_node)
            if key in own:
                raise ValueError(f"{where}: '{key}' stands here twice; the first is at {own[key].where}. Remove one.")
            own[key] = SourceValue(value.value, where)
        return {**merged, **own}

    def _key(self, node: yaml.Node) -> str | int | float:
        key = self._value(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int | float):
            raise ValueError(f"{self._place(node)}: a key is a word or a number; quote any other text.")
        return key

    def _merge(self, value: SourceValue) -> dict[Any, SourceValue]:
        sources = value.value if isinstance(value.value, list) else [value]
        if not all(isinstance(source.value, dict) for source in sources):
            raise ValueError(f"{value.where}: '<<' takes a mapping, or a list of mappings.")
        return {key: child for source in reversed(sources) for key, child in source.value.items()}

    def _place(self, node: yaml.Node) -> str:
        return self._where(node.start_mark.line + 1)
