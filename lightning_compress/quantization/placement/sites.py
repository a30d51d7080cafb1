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

from lightning_compress.nn.dataflow import Dataflow, Operation, is_plain_norm
from lightning_compress.quantization.layers import CONVOLUTIONS
from lightning_compress.quantization.placement.call_alignment import AlignedCalls, AlignedOperation, Track, is_submodule

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
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
PAD_VALUE = (3, "value")  # position and name of that argument
# With the position and the name of their lower limit.
CLAMPS: dict[Any, tuple[int, str]] = {
    **dict.fromkeys((functional.hardtanh, functional.hardtanh_), (1, "min_val")),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, Tensor.clamp, Tensor.clamp_, Tensor.clip), (1, "min")),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min, Tensor.clamp_min_), (1, "min")),
}
# Kernels take these along: a clip is what a grid with its zero at one end does anyway.
RELUS = {functional.relu, functional.relu_, functional.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
CLIPS = RELUS | set(CLAMPS)
NON_NEGATIVE = RELUS | {functional.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid}
# What is made of non-negative numbers alone by these is not negative.
KEEP_SIGN = MOVES | JOINS


@dataclass(frozen=True)
class ActivationSite:
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
class ActivationPlacement:
    """Where activations are quantized, and which layers and normalizations belong together.

    Attributes:
        sites: in the order in which they were found.
        order: the quantized layers in the order of their calls.
        inputs: layer to the name of the site whose grid its first input lies on.
        norms: layer to the BatchNorm that alone takes its output.
        floating: layers whose output stays in floating point, and why.
    """

    sites: tuple[ActivationSite, ...] = ()
    order: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    floating: Mapping[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "sites": [[site.module, site.port, site.non_negative] for site in self.sites],
            "order": list(self.order),
            "inputs": dict(self.inputs),
            "norms": dict(self.norms),
            "floating": dict(self.floating),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "ActivationPlacement":
        """What `state` has put down."""
        sites = tuple(ActivationSite(str(module), str(port), bool(sign)) for module, port, sign in state["sites"])
        return cls(sites, tuple(state["order"]), dict(state["inputs"]), dict(state["norms"]), dict(state["floating"]))


def place_fake_quantizers(
    flow: Dataflow,
    layers: Iterable[str],
    computing: Iterable[str] | Mapping[str, Kind],
    modules: Mapping[str, nn.Module],
    joins: bool = True,
) -> ActivationPlacement:
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
    if missed := [name for name in layers if name not in flow.inputs]:
        raise ValueError(
            f"The first step did not call {', '.join(map(repr, missed))}: a layer that only some steps reach is not "
            f"trained for its grid, and gets no range for its activations. Leave such layers out: ignore={missed}."
        )
    norms = {layer: norm for layer in layers if (norm := _norm_after(flow, layer, modules)) is not None}
    kinds = computing if isinstance(computing, Mapping) else dict.fromkeys(computing, (EDGE_BITS,))
    planner = _Planner(flow, kinds, modules, joins)
    inputs = planner.place()
    order = tuple(name for name in flow.inputs if name in layers)
    return ActivationPlacement(tuple(planner.sites.values()), order, inputs, norms, planner.floating)


class _Planner:
    def __init__(
        self, flow: Dataflow, kinds: Mapping[str, Kind], modules: Mapping[str, nn.Module], joins: bool
    ) -> None:
        self.flow, self.tracks, self.kinds, self.modules, self.joins = flow, AlignedCalls(flow), kinds, modules, joins
        # What has more bits comes first: fewer may be made of those behind the shared place, but not more of fewer.
        self.layers = sorted(kinds, key=lambda name: -kinds[name][0])
        self.leading = flow.ancestors(value for name in kinds for call in flow.inputs[name] for value in call)
        self.sites: dict[str, ActivationSite] = {}
        self.site_of: dict[tuple[Track, Kind], ActivationSite] = {}
        self.floating: dict[str, str] = {}

    def place(self) -> dict[str, str]:
        """Find all sites; returns that of each layer's input."""
        for layer in self.layers:
            if isinstance(self.modules[layer], CONVOLUTIONS):
                self.close(layer)
        inputs = {}
        for layer in self.layers:
            width = 3 if isinstance(self.modules[layer], nn.MultiheadAttention) else 1
            given = self.tracks.inputs(layer)[:width]
            # Attention is often given one tensor three times.
            found = [self.open(layer, given.index(value), value) for value in dict.fromkeys(given)]
            inputs[layer] = found[0].name
        return inputs

    def open(self, layer: str, port: int, track: Track) -> ActivationSite:
        """The site of what a layer takes."""
        way, kind = self.way_up(track), self.kinds[layer]
        known = [self.site_of[one, kind] for one in way if (one, kind) in self.site_of]
        if known:
            return known[0]
        for one in self.before_dropouts(way):
            place, uses = self.place_of(one), self.leaf_uses(one)
            free = place is not None and " ".join(place) not in self.sites
            if place is not None and free and uses is not None and all(map(self.suits, uses)):
                return self.put(one, *place, kind)
        return self.put(track, layer, f"input {port}", kind, shared=False)

    def close(self, layer: str) -> None:
        """See to it that what a convolution makes gets a grid, so that an integer kernel can compute it."""
        returned = self.tracks.outputs(layer)
        if returned is None:
            self.floating[layer] = "it returns no single tensor"
            return
        end = self.after_the_kernel(returned)
        uses, place = self.leaf_uses(end), self.place_of(end)
        if uses is None:
            self.floating[layer] = "what follows differs from call to call"
        elif self.leading.isdisjoint(end) or any(use.module is None for use in uses):
            # A grid on what leaves the network would cost accuracy to save time in one layer.
            self.floating[layer] = "its output leaves the network"
        elif all(use.module in self.layers for use in uses):
            return  # those who take it see to it
        elif place is None:
            self.floating[layer] = "its output is used in the middle of a forward, where no module begins or ends"
        else:
            # Of 8 bits; where the layers that take it have fewer, those have a coarser grid of their own.
            self.put(end, *place, self.kinds[layer], shared=self.joins)

    def place_of(self, track: Track) -> tuple[str, str] | None:
        """The module's end or door from which on all who use a value see it; never that of the whole model."""
        if boundary := self.tracks.boundary(track):
            return boundary, "output"
        users = self.tracks.consumers(track)
        doors = [
            door for door in self.tracks.argument_positions(track) if all(is_submodule(user, door[0]) for user in users)
        ]
        module, position = max(doors, key=lambda door: len(door[0]), default=("", 0))
        return (module, f"input {position}") if module else None

    def put(self, track: Track, module: str, port: str, kind: Kind, shared: bool = True) -> ActivationSite:
        site = ActivationSite(module, port, all(map(self.is_non_negative, track)))
        site = self.sites.setdefault(site.name, site)
        if shared:
            self.site_of[track, kind] = site
        return site

    def suits(self, use: AlignedOperation) -> bool:
        return use.module in self.layers or (self.joins and use.function in JOINS)

    def after_the_kernel(self, track: Track) -> Track:
        """The value behind the BatchNorm and the clip that a kernel takes along."""
        for functions in ({functional.batch_norm}, CLIPS):
            uses = self.tracks.consumers_of(track) or []
            if len(uses) == 1 and uses[0].function in functions and len(uses[0].outputs) == 1:
                track = uses[0].outputs[0]
        return track

    def way_up(self, track: Track) -> list[Track]:
        """The value, and what it was before it was moved about, nearest first."""
        way = [track]
        made = self.tracks.producer(track)
        while made is not None and made.function in MOVES and made.inputs:
            way.append(made.inputs[0])
            made = self.tracks.producer(made.inputs[0])
        return way

    def before_dropouts(self, way: list[Track]) -> list[Track]:
        """Those of the way that no dropout has scaled yet: a deployed network has none."""
        made = [self.tracks.producer(track) for track in way]
        last = max((place for place, one in enumerate(made) if one and one.function in DROPOUTS), default=-1)
        return way[last + 1 :]

    def leaf_uses(self, track: Track) -> list[AlignedOperation] | None:
        """Who computes with this value, moved about or not; None if the calls differ in that."""
        found: list[AlignedOperation] = []
        uses = self.tracks.consumers_of(track)
        for use in uses or ():
            # What a quantized layer does with its own input is its own business.
            moved = use.function in MOVES and use.module not in self.layers
            behind = [self.leaf_uses(output) for output in use.outputs] if moved else [[use]]
            if None in behind:
                return None
            found += [one for several in behind for one in several or ()]
        return None if uses is None else found

    def is_non_negative(self, value: int, depth: int = 64) -> bool:
        made = self.flow.producer.get(value)
        if made is None or not depth:
            return False
        if made.function in NON_NEGATIVE or _clamps_at_zero(made):
            return True
        keeps = made.function in KEEP_SIGN and bool(made.inputs) and not _brings_negative(made)
        return keeps and all(self.is_non_negative(one, depth - 1) for one in made.inputs)


def _clamps_at_zero(made: Operation) -> bool:
    """Whether there is a lower limit that is a number, and not below zero."""
    return any(made.numbers.get(one, -1.0) >= 0 for one in CLAMPS.get(made.function, ()))


def _brings_negative(made: Operation) -> bool:
    """Whether a number among the arguments may be what is added or padded with, and is below zero."""
    numbers = made.numbers.values() if made.function in SUMS else [made.numbers.get(one, 0.0) for one in PAD_VALUE]
    return made.function in SUMS | {functional.pad} and min(numbers, default=0.0) < 0


def _norm_after(flow: Dataflow, layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The BatchNorm that alone takes the layer's output, at each of its calls, channel by channel."""
    tracks = AlignedCalls(flow)
    returned = tracks.outputs(layer)
    uses = (tracks.consumers_of(returned) if returned else None) or []
    norm = uses[0].module if len(uses) == 1 and uses[0].function is functional.batch_norm else None
    if returned is None or norm is None or len(flow.inputs[norm]) != len(returned) or norm not in modules:
        return None
    # BatchNorm's channels come second: a linear layer's too if there is nothing but samples before them.
    dimensions = {flow.dimensions[value] for value in returned}
    module = modules[layer]
    by_channel = dimensions == {2} if isinstance(module, nn.Linear) else dimensions == {_dimensions(module)}
    return norm if is_plain_norm(modules[norm]) and by_channel else None


def _dimensions(module: nn.Module) -> int | None:
    """Those of what a convolution gives for a batch."""
    return len(module.kernel_size) + 2 if isinstance(module, CONVOLUTIONS) else None
