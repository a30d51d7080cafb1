"""What criteria ask for about the units of a group: seen in the user's own forward and backward passes."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lightning_compress.channel_pruning.dependency.layer_types import channel_dim, is_norm
from lightning_compress.channel_pruning.dependency.probe import module_name
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, GroupMember
from lightning_compress.nn.surgery import get_tensor, tensors_by_name

SEEN = frozenset({"activations", "activation_grads", "feature_maps", "patches"})
PATCHES = 2000  # sampled positions of one layer, as many as the papers take
SAMPLES = 64  # of a batch of images that patches are cut from


class ChannelStatistics:
    """What the layers that read units are given, and its gradients, while `listening`.

    The hooks are there from the start and idle outside: one that comes after the first call of a compiled module never
    fires.
    """

    def __init__(self, model: nn.Module, asked: Iterable[str]) -> None:
        self.model, self.asked = model, frozenset(asked)
        self.listening, self.prefix = False, ""
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.input_grads: dict[str, dict[int, Tensor]] = {}  # by the number of the call: backward comes in reverse
        self.weight_grads: dict[str, Tensor] = {}

    def hooks(self) -> list[RemovableHandle]:
        """Listen to every layer that could read units."""
        if not self.asked & SEEN:
            return []
        weighted = [
            (module_name(name), module)
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        ]
        handles = [
            module.register_forward_pre_hook(self._listener(name)) for name, module in weighted if not is_norm(module)
        ]
        if "feature_maps" in self.asked:
            handles += [module.register_forward_hook(self._output_listener(name)) for name, module in weighted]
        return handles

    def restrict_to(self, part: str) -> None:
        """From now on the submodule `part` is the model; what was seen goes by its names."""
        self.model, self.prefix = self.model.get_submodule(part), f"{part}." if part else ""
        known: tuple[dict[str, Any], ...] = (self.inputs, self.outputs, self.input_grads)
        for seen in known:
            for name in list(seen):
                seen[name.removeprefix(self.prefix)] = seen.pop(name)

    def reset(self) -> None:
        """Free all that was seen."""
        self.inputs, self.outputs, self.input_grads, self.weight_grads = {}, {}, {}, {}

    def take_gradients(self, groups: Sequence[ChannelGroup]) -> None:
        """Keep the gradients of the weights that make units, and of the scales behind them, that are there now."""
        if {"grad", "gamma_grad"} & self.asked:
            names = {one.tensor for group in groups for member in group.members for one in member.axis.slices}
            for name, tensor in tensors_by_name(self.model, sorted(names)).items():
                if tensor.grad is not None:
                    self.weight_grads[name] = tensor.grad.detach().clone()

    def _listener(self, name: str) -> Any:
        def listen(module: nn.Module, args: Any) -> None:
            if not (self.listening and args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
                return
            own = name.removeprefix(self.prefix)
            calls = self.inputs.setdefault(own, [])
            calls.append(args[0].detach())
            if "activation_grads" in self.asked and args[0].requires_grad:
                args[0].register_hook(partial(self._take, own, len(calls) - 1))  # type: ignore[no-untyped-call]

        return listen

    def _take(self, name: str, call: int, grad: Tensor) -> None:
        grads = self.input_grads.setdefault(name, {})
        grads[call] = grads[call] + grad.detach() if call in grads else grad.detach()

    def _output_listener(self, name: str) -> Any:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            if self.listening and isinstance(output, Tensor):
                self.outputs.setdefault(name.removeprefix(self.prefix), []).append(output.detach())

        return listen


def criterion_inputs(
    gathered: ChannelStatistics, group: ChannelGroup, generator: torch.Generator
) -> list[dict[str, Any]]:
    """What a criterion is offered about a group: once for each layer that makes its units, or that reads them."""
    needs, model = gathered.asked, gathered.model
    common: dict[str, Any] = {"generator": generator}
    if needs & {"gamma", "gamma_grad"}:
        common |= _gamma(gathered, group)
    if "feature_maps" in needs:
        return [common | {"feature_maps": _maps(gathered, group)}]
    if needs & SEEN:
        readers = [one for one in group.consumers if gathered.inputs.get(one.axis.module)]
        seen = [_seen(gathered, model.get_submodule(one.axis.module), one, group.units) for one in readers]
        return [common | one for one in seen] or [common | dict.fromkeys((*SEEN, "consumer_weight"))]
    if needs & {"weight", "grad"}:
        return [common | _made(gathered, one, group.units) for one in group.producers]
    return [common]


def unit_order(member: GroupMember) -> Tensor:
    """The channels of a place that belong to its group, sorted by unit."""
    return torch.tensor(
        [channel for _, channel in sorted((unit, channel) for channel, unit in enumerate(member.units) if unit >= 0)]
    )


def sum_by_unit(tensor: Tensor, member: GroupMember, units: int, dim: int = 0) -> Tensor:
    """Channels of a place along `dim` sorted by unit: shape (units, channels of one unit, *the other dimensions)."""
    chosen = tensor.movedim(dim, 0).index_select(0, unit_order(member).to(tensor.device))
    return chosen.reshape(units, -1, *chosen.shape[1:])


def _made(gathered: ChannelStatistics, member: GroupMember, units: int) -> dict[str, Any]:
    weight = member.axis.slices[0]
    tensor = get_tensor(gathered.model, weight.tensor).detach()
    grad = gathered.weight_grads.get(weight.tensor)
    rows = {"weight": tensor, "grad": grad}
    sections = member.axis.size // weight.size  # of a grouped transposed convolution, which share indices
    first = GroupMember(member.axis, member.units[: weight.size] if sections > 1 else member.units)
    return {
        name: None if one is None else sum_by_unit(one, first, units, weight.dim).flatten(1)
        for name, one in rows.items()
    }


def _gamma(gathered: ChannelStatistics, group: ChannelGroup) -> dict[str, Any]:
    """The mean size of the scales of all normalisation layers behind the units."""
    scales, grads = [], []
    for member in group.members:
        if member.axis.side != "channels" or not is_norm(gathered.model.get_submodule(member.axis.module)):
            continue
        for one in member.axis.slices:
            if one.tensor.endswith(".weight"):
                tensor = get_tensor(gathered.model, one.tensor).detach()
                scales.append(sum_by_unit(tensor.abs(), member, group.units).flatten(1).mean(1))
                if (grad := gathered.weight_grads.get(one.tensor)) is not None:
                    grads.append(sum_by_unit(grad, member, group.units).flatten(1).mean(1))
    mean = [torch.stack(several).mean(0) if several else None for several in (scales, grads)]
    return {"gamma": mean[0], "gamma_grad": mean[1]}


def _seen(gathered: ChannelStatistics, module: nn.Module, member: GroupMember, units: int) -> dict[str, Any]:
    name = member.axis.module
    found: dict[str, Any] = {}
    calls, grads = gathered.inputs[name], gathered.input_grads.get(name, {})
    numbers = sorted(grads) or range(len(calls))  # a call without a gradient has nothing to be multiplied with
    for key, values in (("activations", calls), ("activation_grads", grads)):
        if key in gathered.asked:
            apart = [_samples_first(module, values[one], member, units) for one in numbers] if values else []
            found[key] = torch.cat(apart) if apart else None
    if "patches" in gathered.asked:
        found["patches"], found["consumer_weight"] = input_patches(module, gathered.inputs[name], member, units)
    return found


def _maps(gathered: ChannelStatistics, group: ChannelGroup) -> Tensor | None:
    """What a convolution that reads the units is given; else what the last layer gives that has them as maps."""
    last = [member for member in group.members if member.axis.side == "channels"]
    for seen, members in ((gathered.inputs, group.consumers), (gathered.outputs, (*reversed(last), *group.producers))):
        for member in members:
            calls = seen.get(member.axis.module, [])
            module = gathered.model.get_submodule(member.axis.module)
            if calls and calls[0].ndim == 4:
                return torch.cat([_samples_first(module, one, member, group.units) for one in calls])
    return None


def _samples_first(module: nn.Module, given: Tensor, member: GroupMember, units: int) -> Tensor:
    """Shape (samples, units, *positions); channels of one unit are positions too, unless there is one of each."""
    apart = sum_by_unit(given, member, units, channel_dim(module, given, member.axis))
    apart = apart.squeeze(1) if apart.shape[1] == 1 else apart.movedim(1, -1)
    return apart.movedim(1, 0) if apart.ndim > 1 else apart.unsqueeze(0)


def input_patches(module: nn.Module, calls: Sequence[Tensor], member: GroupMember, units: int) -> tuple[Tensor, Tensor]:
    """Sampled inputs of a reading layer, shape (samples, units, taps), and its weight, shape (units, taps, outputs).

    Raises:
        ValueError: if the layer is neither linear nor an ungrouped convolution in two dimensions.
    """
    if isinstance(module, nn.Linear):
        rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in calls])
        rows = rows[_sampled(len(rows))]
        apart = sum_by_unit(rows, member, units, 1).permute(2, 0, 1)
        weight = sum_by_unit(module.weight.detach(), member, units, 1)
        return apart, weight
    is_plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    if isinstance(module, nn.Conv2d) and is_plain and not isinstance(module.padding, str):
        columns = [_columns(module, one) for one in calls]
        rows = torch.cat(columns)  # (positions, channels, taps)
        rows = rows[_sampled(len(rows))]
        apart = sum_by_unit(rows, member, units, 1).permute(2, 0, 1, 3).flatten(2)
        weight = sum_by_unit(module.weight.detach().flatten(2), member, units, 1).permute(0, 1, 3, 2).flatten(1, 2)
        return apart, weight
    raise ValueError(
        f"Patches are taken of linear layers and of ungrouped Conv2d with a number of zeros as padding, but "
        f"'{member.axis.module}' is {module}. Choose another criterion, or ignore the layers before it."
    )


def _columns(module: nn.Conv2d, given: Tensor) -> Tensor:
    # A batch has more positions than anyone needs: some samples of it are enough.
    given = given[_sampled(len(given), SAMPLES)]
    padding: Any = module.padding
    columns = functional.unfold(given, module.kernel_size, module.dilation, padding, module.stride)
    taps = module.kernel_size[0] * module.kernel_size[1]
    return columns.permute(0, 2, 1).reshape(-1, given.shape[1], taps)


def _sampled(rows: int, most: int = PATCHES) -> Tensor:
    """Which rows are taken, spread evenly."""
    return torch.linspace(0, rows - 1, min(rows, most)).round().long()
