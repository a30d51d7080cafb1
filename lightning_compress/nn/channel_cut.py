"""What is cut out of a model, as data: which indices of which tensors stay."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_compress.nn.selection import canonical_name

Kept = dict[int, Tensor]  # dimension -> indices that stay, in order
Attributes = dict[str, dict[str, Any]]  # module -> attribute -> value


@dataclass(frozen=True)
class Cut:
    """What stays of which tensors, and what modules remember of their sizes.

    Attributes:
        kept: by the name of a parameter or buffer.
        attributes: new values by the name of a module and of its attribute.
        before: the values that these attributes had.
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)
    before: Attributes = field(default_factory=dict)

    def composed_with(self, first: "Cut") -> "Cut":
        """One cut in the place of `first` and then this one."""
        kept = {name: dict(dims) for name, dims in first.kept.items()}
        for name, dims in self.kept.items():
            for dim, indices in dims.items():
                older = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = indices if older is None else older[indices]
        return Cut(
            kept, merge_attributes(first.attributes, self.attributes), merge_attributes(self.before, first.before)
        )

    def prefixed(self, name: str) -> "Cut":
        """The same cut by the names that tensors have in a model that holds this one as `name`."""
        at = f"{name}." if name else ""

        def named_so(attributes: Attributes) -> Attributes:
            return {f"{at}{module}".rstrip("."): values for module, values in attributes.items()}

        kept = {f"{at}{tensor}": dims for tensor, dims in self.kept.items()}
        return Cut(kept, named_so(self.attributes), named_so(self.before))

    def restricted_to(self, prefix: str) -> "Cut":
        """The part of the cut that is about the submodule whose names begin with `prefix`, by that module's names."""

        def own(attributes: Attributes) -> Attributes:
            inner = {f"{name}.": values for name, values in attributes.items() if f"{name}.".startswith(prefix)}
            return {name.removeprefix(prefix).rstrip("."): values for name, values in inner.items()}

        kept = {name.removeprefix(prefix): dims for name, dims in self.kept.items() if name.startswith(prefix)}
        return Cut(kept, own(self.attributes), own(self.before))

    def without(self, module: str) -> "Cut":
        """The part of the cut that is not about this module or what is in it."""

        def others(attributes: Attributes) -> Attributes:
            return {name: values for name, values in attributes.items() if not f"{name}.".startswith(f"{module}.")}

        kept = {name: dims for name, dims in self.kept.items() if not name.startswith(f"{module}.")}
        return Cut(kept, others(self.attributes), others(self.before))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        kept = {name: {str(dim): one.int() for dim, one in dims.items()} for name, dims in self.kept.items()}
        return {"kept": kept, "attributes": _as(list, tuple, self.attributes), "before": _as(list, tuple, self.before)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Cut":
        """The cut that `state` tells of."""
        kept = {name: {int(dim): one.long() for dim, one in dims.items()} for name, dims in state["kept"].items()}
        return cls(kept, _as(tuple, list, state["attributes"]), _as(tuple, list, state["before"]))


def kept_indices(cut: Cut, names: Iterable[str]) -> Kept:
    """What stays of a tensor that has all of these names."""
    return next((cut.kept[name] for name in names if name in cut.kept), {})


def cut_prefix(cut: Cut, names: Collection[str]) -> str:
    """Where in a cut model a module with these tensors lies: the prefix under which most of its names are cut."""
    ends = {canonical_name(name) for name in names}
    prefixes = {full[: len(full) - len(name)] for full in cut.kept for name in ends if f".{full}".endswith(f".{name}")}
    return max(sorted(prefixes | {""}), key=lambda prefix: sum(f"{prefix}{name}" in cut.kept for name in ends))


def merge_attributes(older: Attributes, newer: Attributes) -> Attributes:
    """All of both; what is in both as `newer` has it."""
    return {name: {**older.get(name, {}), **newer.get(name, {})} for name in {**older, **newer}}


def _as(wanted: type, found: type, attributes: Attributes) -> Attributes:
    return {
        name: {key: wanted(value) if isinstance(value, found) else value for key, value in values.items()}
        for name, values in attributes.items()
    }
