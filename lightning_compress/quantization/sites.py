"""Where activations are quantized, as a deployed integer network does it, read off the flow of one step.

Integer kernels want a grid on the input of each layer, and convolutions one on their output too: after the BatchNorm
and the activation function that follow them, which a runtime folds into the kernel. One grid serves all who take the
value, so it lies where the value is made, if a module's end is there, else at a door that all who take it lie behind.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.core.flow import Flow, Operation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Kind: TypeAlias = tuple[Any, ...]
EDGE_BITS = 8

DROPOUTS = {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.dropout}
# These move numbers about and make no new ones, so what lay on a grid lies on it still.
MOVES = {
    *DROPOUTS, functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, torch.max_pool1d, torch.max_pool2d,
    torch.max_pool3d, torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, functional.pad, functional.pixel_shuffle, Tensor.view, Tensor.reshape,
    Tensor.flatten, Tensor.unflatten, Tensor.transpose, Tensor.permute, Tensor.squeeze, Tensor.unsqueeze,
    Tensor.contiguous, Tensor.chunk, Tensor.split, Tensor.unbind, Tensor.expand, Tensor.__getitem__, Tensor.to,
    Tensor.movedim,
}  # fmt: skip
# Runtimes have integer kernels for these, or compute them after the input was dequantized at no harm.
JOINS = {
    torch.add, torch.cat, torch.concat, torch.concatenate, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__,
    Tensor.__radd__, torch.mean, Tensor.mean, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
}  # fmt: skip
# Kernels take these along: a clip is what a grid with its zero at one end does anyway.
CLIPS = {functional.relu, functional.relu_, functional.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
NON_NEGATIVE = CLIPS | {functional.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid}
# What is made of non-negative numbers alone by these is not negative.
KEEP_SIGN = MOVES | JOINS


@dataclass(frozen=True)
class Site:
    """A place where numbers are put on a grid: what a module returns, or what it is given at one position.

    Attributes:
        module: its name.
        port: "output", or "input 0", "input 1", ... for its tensors in the order of its arguments.
        non_negative: whether no negative number can come there.
    """

    module: str
    port: str
    non_negative: bool

    @property
    def name(self) -> str:
        return f"{self.module} {self.port}"


@dataclass(frozen=True)
class Layout:
    """Where activations are quantized, and which layers and normalizations belong together.

    Attributes:
        sites: in the order in which they were found.
        order: the quantized layers in the order of their calls.
        inputs: layer to the name of the site whose grid its first input lies on.
        norms: layer to the BatchNorm that alone takes its output.
        floating: layers whose output stays in floating point, and why.
    """

    sites: tuple[Site, ...] = ()
    order: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    floating: Mapping[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "sites": [[site.module, site.port, site.non_negative] for site in self.sites],
            "order": list(self.order),
            "inputs": dict(self.inputs),
            "norms": dict(self.norms),
            "floating": dict(self.floating),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Layout":
        """What `state` has put down."""
        sites = tuple(Site(str(module), str(port), bool(sign)) for module, port, sign in state["sites"])
        return cls(sites, tuple(state["order"]), dict(state["inputs"]), dict(state["norms"]), dict(state["floating"]))


def lay_out(
    flow: Flow,
    layers: Iterable[str],
    computing: Iterable[str] | Mapping[str, Kind],
    modules: Mapping[str, nn.Module],
    joins: bool = True,
) -> Layout:
    """Find the places for grids.

    Args:
        flow: of one step.
        layers: names of all quantized layers.
        computing: those of them that are to compute with quantized inputs; with the kind of grid, as `(bits, ...)`, if
            not all have one kind.
        modules: the modules by name.
        joins: whether what is added up or pooled may lie on the grid of a layer's input too.

    Raises:
        ValueError: if a layer was not called.
    """
    layers = list(layers)
    if missed := [name for name in layers if name not in flow.given]:
        raise ValueError(
            f"The first step did not call {', '.join(map(repr, missed))}: a layer that only some steps reach is not "
            f"trained for its grid, and gets no range for its activations. Leave such layers out: ignore={missed}."
        )
    norms = {layer: norm for layer in layers if (norm := _norm_after(flow, layer, modules)) is not None}
    kinds = computing if isinstance(computing, Mapping) else dict.fromkeys(computing, (EDGE_BITS,))
    planner = _Planner(flow, kinds, modules, joins)
    inputs = planner.place()
    order = tuple(name for name in flow.given if name in layers)
    return Layout(tuple(planner.sites.values()), order, inputs, norms, planner.floating)


class _Planner:
    def __init__(self, flow: Flow, kinds: Mapping[str, Kind], modules: Mapping[str, nn.Module], joins: bool) -> None:
        self.flow, self.kinds, self.modules, self.joins = flow, kinds, modules, joins
        # What has more bits comes first: fewer may be made of those behind the shared place, but not more of fewer.
        self.layers = sorted(kinds, key=lambda name: -kinds[name][0])
        self.sites: dict[str, Site] = {}
        self.site_of: dict[tuple[int, Kind], Site] = {}
        self.floating: dict[str, str] = {}

    def place(self) -> dict[str, str]:
        """Find all sites; returns that of each layer's input."""
        for layer in self.layers:
            if isinstance(self.modules[layer], CONVOLUTIONS):
                self.close(layer)
        inputs = {}
        for layer in self.layers:
            width = 3 if isinstance(self.modules[layer], nn.MultiheadAttention) else 1
            given = self.flow.given[layer][0][:width]
            # Attention is often given one tensor three times.
            found = [self.open(layer, given.index(value), value) for value in dict.fromkeys(given)]
            inputs[layer] = found[0].name
        return inputs

    def open(self, layer: str, port: int, value: int) -> Site:
        """The site of what a layer takes."""
        way, kind = self.way_up(value), self.kinds[layer]
        known = [self.site_of[one, kind] for one in way if (one, kind) in self.site_of]
        if known:
            return known[0]
        if len(self.flow.given[layer]) == 1:
            for one in self.before_dropouts(way):
                place = self.place_of(one)
                taken = place is not None and " ".join(place) in self.sites
                if place is not None and not taken and all(self.suits(use) for use in self.leaf_uses(one)):
                    return self.put(one, *place, kind)
        return self.put(value, layer, f"input {port}", kind, shared=False)

    def close(self, layer: str) -> None:
        """See to it that what a convolution makes gets a grid, so that an integer kernel can compute it."""
        for value in self.flow.returned[layer]:
            end = None if value is None else self.after_the_kernel(value)
            uses = [] if end is None else self.leaf_uses(end)
            place = None if end is None else self.place_of(end)
            if end is None or not uses or any(use.module is None for use in uses):
                # A grid on what leaves the network would cost accuracy to save time in one layer.
                self.floating[layer] = "its output leaves the network"
            elif all(use.module in self.layers for use in uses):
                continue  # those who take it see to it
            elif place is None:
                self.floating[layer] = "its output is used in the middle of a forward, where no module begins or ends"
            else:
                # Of 8 bits; where the layers that take it have fewer, those have a coarser grid of their own.
                self.put(end, *place, self.kinds[layer], shared=self.joins)

    def place_of(self, value: int) -> tuple[str, str] | None:
        """The module's end or door from which on all who use a value see it; never that of the whole model."""
        if boundary := self.flow.boundary(value):
            return boundary, "output"
        users = [f"{use.module}." for use in self.flow.uses(value)]
        doors = [
            name
            for name, calls in self.flow.given.items()
            if name
            and len(calls) == 1
            and value in calls[0][: self.flow.doors[name]]
            and all(user.startswith(f"{name}.") for user in users)
        ]
        innermost = max(doors, key=len, default=None)
        return None if innermost is None else (innermost, f"input {self.flow.given[innermost][0].index(value)}")

    def put(self, value: int, module: str, port: str, kind: Kind, shared: bool = True) -> Site:
        site = Site(module, port, self.is_non_negative(value))
        site = self.sites.setdefault(site.name, site)
        if shared:
            self.site_of[value, kind] = site
        return site

    def suits(self, use: Operation) -> bool:
        return use.module in self.layers or (self.joins and use.function in JOINS)

    def after_the_kernel(self, value: int) -> int:
        """The value behind the BatchNorm and the clip that a kernel takes along."""
        for functions in ({functional.batch_norm}, CLIPS):
            uses = self.flow.uses(value)
            if len(uses) == 1 and uses[0].function in functions and len(uses[0].outputs) == 1:
                value = uses[0].outputs[0]
        return value

    def way_up(self, value: int) -> list[int]:
        """The value, and what it was before it was moved about, nearest first."""
        way = [value]
        made = self.flow.made_by.get(value)
        while made is not None and made.function in MOVES and made.inputs:
            way.append(made.inputs[0])
            made = self.flow.made_by.get(made.inputs[0])
        return way

    def before_dropouts(self, way: list[int]) -> list[int]:
        """Those of the way that no dropout has scaled yet: a deployed network has none."""
        made = [self.flow.made_by.get(value) for value in way]
        last = max((place for place, one in enumerate(made) if one and one.function in DROPOUTS), default=-1)
        return way[last + 1 :]

    def leaf_uses(self, value: int) -> list[Operation]:
        """Who computes with this value, moved about or not."""
        found: list[Operation] = []
        for use in self.flow.uses(value):
            # What a quantized layer does with its own input is its own business.
            if use.function in MOVES and use.module not in self.layers:
                for output in use.outputs:
                    found += self.leaf_uses(output)
            else:
                found.append(use)
        return found

    def is_non_negative(self, value: int, depth: int = 64) -> bool:
        made = self.flow.made_by.get(value)
        if made is None or not depth:
            return False
        if made.function in NON_NEGATIVE:
            return True
        keeps = made.function in KEEP_SIGN and bool(made.inputs)
        return keeps and all(self.is_non_negative(one, depth - 1) for one in made.inputs)


def _norm_after(flow: Flow, layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The BatchNorm that alone takes the layer's output."""
    values = flow.returned[layer]
    uses = flow.uses(values[0]) if len(values) == 1 and values[0] is not None else []
    if len(uses) != 1 or uses[0].function is not functional.batch_norm or uses[0].module is None:
        return None
    norm = uses[0].module
    return norm if len(flow.given[norm]) == 1 and isinstance(modules.get(norm), NORMS) else None
