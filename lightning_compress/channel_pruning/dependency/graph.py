"""Find out which channels of a module are coupled, by watching where marked values go."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channel_pruning.dependency.coupling import ChannelUnion
from lightning_compress.channel_pruning.dependency.layer_types import ChannelwiseLayer, DenseLayer
from lightning_compress.channel_pruning.dependency.probe import (
    LEAST,
    MOST,
    Probe,
    ProbeSource,
    ProbeTrace,
    Sink,
    module_name,
    tensor_keys,
)
from lightning_compress.channel_pruning.functional.groups import ChannelAxis, ChannelGroup, TensorSlice


def build_dependency_graph(model: nn.Module, example: Any) -> list[ChannelGroup]:
    """The groups of coupled channels of a module, whole ones with the reason why they are.

    Every mixing layer (convolution, linear, embedding) is cut through: its output is replaced by random numbers, and
    gradients tell which channel of which layer's input each of its elements reaches, whatever lies between: sums,
    concatenation, reshaping, attention. Normalisation layers and depth-wise convolutions pass channels on one by one.

    Args:
        example: what the module is called with: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ValueError: if a layer is lazy.
        Exception: what the module raises when it is called.
    """
    try:
        return _Observation(Probe(model, example)).groups()
    except (RuntimeError, TypeError) as error:
        # Some code insists on float32: masks that it makes, casts of its own.
        if "dtype" not in str(error).lower() and "type" not in str(error).lower():
            raise
        return _Observation(Probe(model, example, torch.float32)).groups()


class _Observation:
    def __init__(self, probe: Probe) -> None:
        self.probe, self.model = probe, probe.model
        self.coupling = ChannelUnion()
        self._generator = torch.Generator().manual_seed(2)
        self.makes: dict[str, int] = {}
        self.reads: dict[str, int] = {}
        self.dims: dict[tuple[str, int], int] = {}
        self.pending: dict[int, tuple[Sink, set[int]]] = {}
        exact = probe.dtype == torch.float64
        self.tolerance, self.noise = (1e-8, 1e-12) if exact else (1e-3, 1e-6)
        names = {module: module_name(name) for name, module in self.model.named_modules()}
        for module, kind in probe.kinds.items():
            self._add(names[module], kind)

    def groups(self) -> list[ChannelGroup]:
        passage = self.probe.run()
        self.sources = passage.sources
        self.sinks = passage.sinks
        for sink in passage.sinks:
            if sink.value.requires_grad:
                self._trace(sink)
            else:
                self._fix_all(self.reads.get(sink.name), "the module's input goes into it")
        self._resolve()
        for why, value in passage.ends:
            for source, touched in self._touched(value, self._weights(value)):
                self._fix(source, touched, f"it reaches {why}")
        for number, place in enumerate(self.coupling.places):
            if not place.side.startswith("dim") and place.module not in passage.called:
                self._fix_all(number, "the module's forward does not call it")
        return self.coupling.groups()

    # Places ---------------------------------------------------------------------------------------------------------

    def _add(self, name: str, kind: Any) -> None:
        coupling = self.coupling
        if isinstance(kind, DenseLayer):
            self.makes[name] = coupling.add(kind.makes)
            if kind.reads is not None:
                self.reads[name] = coupling.add(kind.reads)
            for place in (self.makes[name], self.reads.get(name)):
                if place is not None:
                    self._tie(place, kind.groups)
        if isinstance(kind, ChannelwiseLayer):
            self.reads[name] = coupling.add(kind.channels)
            self._tie(self.reads[name], kind.tied)

    def _tie(self, place: int, sections: int) -> None:
        """The same number of channels must leave every section: those at the same position go together."""
        if sections > 1:
            channels = torch.arange(self.coupling.places[place].size)
            first = channels % (len(channels) // sections)
            self.coupling.join(place, place, torch.stack([first, channels], dim=1))

    def _place(self, source: ProbeSource, dim: int) -> int | None:
        """The number of the place at which a source has its units along a dimension."""
        name, value = source.name, source.value
        if source.dim is not None:
            return self.makes[name] if dim == source.dim % value.ndim else None
        if name.endswith("#"):
            return None
        if (name, dim) not in self.dims:
            size = value.shape[dim]
            place = ChannelAxis(name, f"dim {dim}", size, (TensorSlice(name, dim, size),))
            self.dims[name, dim] = self.coupling.add(place)
        return self.dims[name, dim]

    # Edges ----------------------------------------------------------------------------------------------------------

    def _trace(self, sink: Sink) -> None:
        """Which single channel of a sink each element of each source reaches; more than one is left for later."""
        channels, place = sink.value.shape[sink.dim], self.reads[sink.name]
        if not channels:
            return
        labels = torch.randperm(channels, generator=torch.Generator().manual_seed(1)).to(sink.value.device) + 1
        channel_of = torch.empty_like(labels).scatter_(0, labels - 1, torch.arange(channels, device=labels.device))
        weights = self._weights(sink.value)
        times = [self._gradients(sink.value, weights * self._along(sink, labels.double() ** n)) for n in range(3)]
        reached = torch.zeros(channels, dtype=torch.bool)
        for source, zeroth, first, second in zip(self.sources, *times, strict=True):
            if zeroth is None:
                continue
            hit = (zeroth != 0) | (first != 0)
            mean, square = first / zeroth, second / zeroth
            nearest = mean.round()
            single = (square - mean**2).abs() <= self.tolerance * square.abs().clamp(min=1)
            single &= ((mean - nearest).abs() < 0.05) & (nearest >= 1) & (nearest <= channels)
            if bool((hit & ~single).any()):
                self.pending.setdefault(id(sink), (sink, set(range(channels))))
            # One more channel stands for none.
            found = torch.where(hit & single, channel_of[nearest.nan_to_num().long().clamp(1, channels) - 1], channels)
            reached |= _flags(found, channels + 1)[:channels].cpu()
            for dim in range(hit.ndim):
                if source.dim is not None and dim != source.dim % hit.ndim:
                    continue
                size = hit.shape[dim]
                index = torch.arange(size, device=hit.device).reshape([-1, *[1] * (hit.ndim - 1 - dim)])
                met = _flags(index * (channels + 1) + found, size * (channels + 1)).reshape(size, channels + 1)
                self._join(source, dim, place, met[:, :channels].nonzero())
        if id(sink) not in self.pending:
            self.coupling.fix(place, (~reached).nonzero()[:, 0], "the module's input goes into it")

    def _join(self, source: ProbeSource, dim: int, place: int, pairs: Tensor) -> None:
        if source.dim is None:
            # A bare parameter's dimension has channels if each channel meets one index of it.
            meets = len(pairs) == len(set(pairs[:, 1].tolist())) and len(set(pairs[:, 0].tolist())) > 1
            if not meets or source.name.endswith("#"):
                return
        number = self._place(source, dim)
        if number is not None:
            self.coupling.join(number, place, pairs)

    # Channels that are reached by the same elements: attention heads ------------------------------------------------

    def _resolve(self) -> None:
        while any(channels for _, channels in self.pending.values()):
            work = {key: (sink, {min(left)}) for key, (sink, left) in self.pending.items() if left}
            self._explore(work)
            for key, (_, met) in work.items():
                self.pending[key][1].difference_update(met)

    def _explore(self, work: dict[int, tuple[Sink, set[int]]]) -> None:
        """Take one channel of each sink, and all that hang together with it."""
        grown = set(work)
        while grown:
            moved: dict[int, Tensor] = {}
            for key in grown:
                sink, met = work[key]
                chosen = torch.zeros(sink.value.shape[sink.dim], dtype=torch.float64, device=sink.value.device)
                chosen[sorted(met)] = 1.0
                for source, touched in self._touched(sink.value, self._along(sink, chosen) * self._weights(sink.value)):
                    self._join_met(source, touched, self.reads[sink.name], sorted(met))
                    moved[id(source)] = moved.get(id(source), torch.zeros_like(touched)) | touched
            again = self._moved(moved)
            grown = {key for key in grown if self._grow(*work[key], again)}

    def _join_met(self, source: ProbeSource, touched: Tensor, place: int, met: list[int]) -> None:
        for dim in range(touched.ndim):
            units, channels = _met(touched, dim), torch.tensor(met, device=touched.device)
            # A bare parameter's dimension has channels if one channel meets one index of it.
            is_bare = source.dim is None
            if is_bare and not (len(met) == 1 == len(units) < touched.shape[dim]):
                continue
            if (number := self._place(source, dim)) is not None:
                pairs = [torch.stack([units, channels[:1].expand(len(units))], 1)]
                pairs += [torch.stack([units[:1].expand(len(channels)), channels], 1)]
                self.coupling.join(number, place, torch.cat(pairs))

    def _moved(self, touched: dict[int, Tensor]) -> ProbeTrace:
        """Run again with other values at the touched elements."""
        given = {}
        for key, source in zip(tensor_keys(self.sources), self.sources, strict=True):
            value = source.value.detach()
            if id(source) in touched:
                value = torch.where(touched[id(source)], LEAST + MOST - value, value)
            given[key] = value
        return self.probe.run(given)

    def _grow(self, sink: Sink, met: set[int], again: ProbeTrace) -> bool:
        """Add the channels that have changed; whether there were any new ones."""
        now = next(one for one, old in zip(again.sinks, self.sinks, strict=True) if old is sink)
        changed = (now.value.detach() - sink.value.detach()).abs() > self.noise
        channels = set(_met(changed, sink.dim).tolist())
        new = channels - met
        met |= channels
        return bool(new)

    # What stays -----------------------------------------------------------------------------------------------------

    def _fix(self, source: ProbeSource, touched: Tensor, why: str) -> None:
        for dim in range(touched.ndim):
            known = source.dim is not None or (source.name, dim) in self.dims
            if known and (number := self._place(source, dim)) is not None:
                units = _met(touched, dim)
                self.coupling.fix(number, units, why)

    def _fix_all(self, place: int | None, why: str) -> None:
        if place is not None:
            self.coupling.fix(place, torch.arange(self.coupling.places[place].size), why)

    # Gradients ------------------------------------------------------------------------------------------------------

    def _gradients(self, value: Tensor, seeds: Tensor) -> list[Tensor | None]:
        leaves = [source.value for source in self.sources]
        return list(torch.autograd.grad(value, leaves, seeds.to(value.dtype), retain_graph=True, allow_unused=True))

    def _touched(self, value: Tensor, seeds: Tensor) -> list[tuple[ProbeSource, Tensor]]:
        gradients = self._gradients(value, seeds)
        pairs = zip(self.sources, gradients, strict=True)
        return [(source, one != 0) for source, one in pairs if one is not None and bool((one != 0).any())]

    def _weights(self, value: Tensor) -> Tensor:
        """Random ones, so that what reaches a place by several ways does not cancel out."""
        drawn = torch.rand(value.shape, generator=self._generator, dtype=value.dtype)
        return drawn.to(value.device) + 0.5

    def _along(self, sink: Sink, values: Tensor) -> Tensor:
        shape = [1] * sink.value.ndim
        shape[sink.dim] = -1
        return values.to(sink.value.dtype).reshape(shape).expand(sink.value.shape)


def _flags(numbers: Tensor, count: int) -> Tensor:
    """Which numbers below `count` are there."""
    return torch.zeros(count, dtype=torch.bool, device=numbers.device).index_fill_(0, numbers.reshape(-1), True)


def _met(where: Tensor, dim: int) -> Tensor:
    """The indices along a dimension at which anything is true."""
    return where.movedim(dim, 0).reshape(where.shape[dim], -1).any(1).nonzero()[:, 0]
