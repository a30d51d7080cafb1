"""Where activations are quantized, as a deployed integer network does it, read off the flow of one step.

Integer kernels want a grid on the input of each layer, and convolutions one on their output too: after the BatchNorm
and the activation function that follow them, which a runtime folds into the kernel. One grid serves all who take the
value, so it lies where the value is made, if a module's end is there, else at a door that all who take it lie behind.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn
from torch.nn import functional

from lightning_compress.nn.dataflow import Dataflow
from lightning_compress.quantization.layers import CONVOLUTIONS
from lightning_compress.quantization.placement.call_alignment import AlignedCalls, AlignedOperation, Track, is_submodule
from lightning_compress.quantization.placement.gates import GATE, gated_modules
from lightning_compress.quantization.placement.norms import norm_after
from lightning_compress.quantization.placement.operations import (
    CLIPS,
    DROPOUTS,
    JOINS,
    MOVES,
    PRODUCTS,
    SUMS,
)
from lightning_compress.quantization.placement.signs import is_non_negative

Kind: TypeAlias = tuple[Any, ...]
EDGE_BITS = 8
TAKEN_ALONG = ({functional.batch_norm}, CLIPS)
FEATURE_MAP_DIMENSIONS = 4


@dataclass(frozen=True)
class ActivationSite:
    """A place where numbers are put on a grid: what a module returns, or what it is given at one position.

    Attributes:
        module: its name.
        port: "output", or "input 0", "input 1", ... for its tensors in the order of its arguments; "gate" for what a
            SiLU or a Hardswish multiplies its input with.
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

    def renamed(self, rename: Callable[[str], str]) -> "ActivationPlacement":
        """The same of a model whose modules have other names."""
        sites = {site.name: replace(site, module=rename(site.module)) for site in self.sites}
        return ActivationPlacement(
            tuple(sites.values()),
            tuple(map(rename, self.order)),
            {rename(layer): sites[site].name for layer, site in self.inputs.items()},
            {rename(layer): rename(norm) for layer, norm in self.norms.items()},
            {rename(layer): why for layer, why in self.floating.items()},
        )

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
    outputs: bool = False,
) -> ActivationPlacement:
    """Find the places for grids.

    Args:
        flow: of one step.
        layers: names of all quantized layers.
        computing: those of them that are to compute with quantized inputs; with the kind of grid, as `(bits, ...)`, if
            not all have one kind.
        modules: the modules by name.
        joins: whether what is added up or pooled may lie on the grid of a layer's input too.
        outputs: whether what convolutions make may lie on a grid if it leaves the network.

    Raises:
        ValueError: if a layer was not called.
    """
    layers = list(layers)
    if missed := [name for name in layers if name not in flow.inputs]:
        raise ValueError(
            f"The first step did not call {', '.join(map(repr, missed))}: a layer that only some steps reach is not "
            f"trained for its grid, and gets no range for its activations. Leave such layers out: ignore={missed}."
        )
    norms = {layer: norm for layer in layers if (norm := norm_after(flow, layer, modules)) is not None}
    kinds = computing if isinstance(computing, Mapping) else dict.fromkeys(computing, (EDGE_BITS,))
    planner = _Planner(flow, kinds, modules, joins, outputs)
    inputs = planner.place()
    order = tuple(name for name in flow.inputs if name in layers)
    return ActivationPlacement(tuple(planner.sites.values()), order, inputs, norms, planner.floating)


class _Planner:
    def __init__(
        self, flow: Dataflow, kinds: Mapping[str, Kind], modules: Mapping[str, nn.Module], joins: bool, outputs: bool
    ) -> None:
        self.flow, self.tracks, self.kinds, self.modules = flow, AlignedCalls(flow), kinds, modules
        self.joins, self.outputs = joins, outputs
        # What has more bits comes first: fewer may be made of those behind the shared place, but not more of fewer.
        self.layers = sorted(kinds, key=lambda name: -kinds[name][0])
        self.leading = flow.ancestors(value for name in kinds for call in flow.inputs[name] for value in call)
        self.parameters = set(flow.parameters.values())
        self.sites: dict[str, ActivationSite] = {}
        self.site_of: dict[tuple[Track, Kind], ActivationSite] = {}
        self.floating: dict[str, str] = {}

    def place(self) -> dict[str, str]:
        """Find all sites; returns that of each layer's input."""
        for layer in self.layers:
            if isinstance(self.modules[layer], CONVOLUTIONS):
                self.close(layer)
        if self.joins:
            self.close_joins()
        inputs = {}
        for layer in self.layers:
            width = 3 if isinstance(self.modules[layer], nn.MultiheadAttention) else 1
            given = self.tracks.inputs(layer)[:width]
            # Attention is often given one tensor three times.
            found = [self.open(layer, given.index(value), value) for value in dict.fromkeys(given)]
            inputs[layer] = found[0].name
        if self.joins:
            self.put_gates()
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
        elif not self.outputs and self.leaves(end, uses):
            # A grid on what leaves the network would cost accuracy to save time in one layer.
            self.floating[layer] = "its output leaves the network"
        elif uses and all(use.module in self.layers for use in uses):
            return  # those who take it see to it
        elif place is None:
            self.floating[layer] = "its output is used in the middle of a forward, where no module begins or ends"
        else:
            # Of 8 bits; where the layers that take it have fewer, those have a coarser grid of their own.
            self.put(end, *place, self.kinds[layer], shared=self.joins)

    def leaves(self, end: Track, uses: Sequence[AlignedOperation]) -> bool:
        """Whether the network returns a value, rather than to let a quantized layer take what is made of it."""
        return self.leading.isdisjoint(end) or any(use.module is None for use in uses)

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
        site = ActivationSite(module, port, all(is_non_negative(self.flow, value) for value in track))
        site = self.sites.setdefault(site.name, site)
        if shared:
            self.site_of[track, kind] = site
        return site

    def suits(self, use: AlignedOperation) -> bool:
        return use.module in self.layers or (self.joins and use.function in JOINS | PRODUCTS)

    def close_joins(self) -> None:
        """See to it that sums, products and pools of feature maps take and make grids, where only kernels follow.

        Residual sums before a LayerNorm are none of them: on a grid they would lose accuracy, and gain no time.
        """
        convolutions = [layer for layer in self.layers if isinstance(self.modules[layer], CONVOLUTIONS)]
        ends = [track for layer in convolutions if (track := self.tracks.outputs(layer)) is not None]
        for use in self.tracks.descendants(ends):
            if len(use.outputs) == 1 and self.joins_feature_maps(use):
                self.close_join(use, self.kinds[convolutions[0]])

    def close_join(self, join: AlignedOperation, kind: Kind) -> None:
        """Put grids on what such an operation takes and makes, or on nothing of it."""
        end = self.after_the_kernel(join.outputs[0], (CLIPS,))
        followers = self.leaf_uses(end)
        if not followers or self.leading.isdisjoint(end) or not all(map(self.suits, followers)):
            return
        seen_to = all(use.module in self.layers for use in followers)
        places = {}
        for track in (*join.inputs, *(() if seen_to else (end,))):
            if any((one, kind) in self.site_of for one in self.way_up(track)):
                continue
            place, uses = self.place_of(track), self.leaf_uses(track)
            free = place is not None and " ".join(place) not in self.sites
            if place is None or not free or uses is None or not all(map(self.suits, uses)):
                return
            places[track] = place
        for track, place in places.items():
            self.put(track, *place, kind)

    def put_gates(self) -> None:
        """Put the gates of SiLU and Hardswish on grids, where feature maps come on a grid and leave on one."""
        gridded = {track for track, _ in self.site_of}
        for name in gated_modules(self.modules):
            given = self.tracks.inputs(name)[:1] if name in self.flow.inputs else ()
            maps = all(self.flow.dimensions[value] >= FEATURE_MAP_DIMENSIONS for one in given for value in one)
            came_on_one = any(not gridded.isdisjoint(self.way_up(one)) for one in given)
            if came_on_one and maps and self.tracks.outputs(name) in gridded:
                self.sites[f"{name} {GATE}"] = ActivationSite(name, GATE, non_negative=True)

    def joins_feature_maps(self, use: AlignedOperation) -> bool:
        """Whether an operation adds, multiplies or pools what convolutions of images make, and nothing else."""
        values = [value for track in use.inputs for value in track]
        maps = all(self.flow.dimensions[value] >= FEATURE_MAP_DIMENSIONS for value in values)
        enough = len(use.inputs) > 1 or use.function not in SUMS | PRODUCTS
        return use.function in JOINS | PRODUCTS and enough and maps and self.parameters.isdisjoint(values)

    def after_the_kernel(self, track: Track, taken_along: Sequence[Collection[Any]] = TAKEN_ALONG) -> Track:
        """The value behind the BatchNorm and the clip that a kernel takes along."""
        for functions in taken_along:
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
