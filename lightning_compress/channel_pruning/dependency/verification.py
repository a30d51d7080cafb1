"""Whether a smaller module computes what the whole one computes with those channels silenced."""

import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.channel_pruning.cut_plan import indices_of, lost_channels, plan_cut
from lightning_compress.channel_pruning.dependency.layer_types import is_norm
from lightning_compress.channel_pruning.dependency.probe import install_probe, module_name, replaced_forward
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, ModuleAttribute, PrunedUnits
from lightning_compress.nn.example_inputs import call_model, copy_example, crop_images, resize_batch
from lightning_compress.nn.surgery import get_tensor, temporarily_cut

MOST_ATTRIBUTES = 6  # all of their combinations are tried
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PACKAGE, TORCH = Path(__file__).parents[1], Path(torch.__file__).parent


def verified_groups(model: nn.Module, example: Any, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The same groups, with the attributes that must follow them, and whole where the code around them insists on it.

    Some units of each group are removed on trial, and the module's output is compared with what it gives when all
    layers that read these units have zeros for them. In both, normalisation layers only scale, by one number each.
    """
    free = [group for group in groups if group.unprunable_reason is None]
    if not free or verify_cut(model, example, groups, _some(free)) is None:
        return list(groups)
    checked = {group.name: _alone(model, example, group) for group in free}
    found = [checked.get(group.name, group) for group in groups]
    free = [group for group in found if group.unprunable_reason is None]
    if free and (why := verify_cut(model, example, found, _some(free))) is not None:
        return [_left(group, f"together with others, {why}") if group in free else group for group in found]
    return found


def small_example(model: nn.Module, example: Any, batch: int = 2) -> Any:
    """Two samples of an example, if the module takes them; else the example."""
    for side in (32, None):  # small images tell as much, if the module takes them
        try:
            small = resize_batch(example, batch)
            with install_probe(model):
                call_model(model, copy_example(small if side is None else crop_images(small, side)))
        except Exception:  # whatever the user's code says to another batch size, or to smaller images
            continue
        return small
    return example


def verify_cut(model: nn.Module, example: Any, groups: Sequence[ChannelGroup], pruned: PrunedUnits) -> str | None:
    """Why these units cannot go: what the smaller module raises, or does otherwise; None if it is right."""
    cut = plan_cut(groups, pruned)
    scales = _Scales()
    with install_probe(model), scales.recording(model), _silenced(model, groups, pruned):
        expected = _run(model, example)
    try:
        with temporarily_cut(model, cut), install_probe(model), scales.replaying(model):
            found = _run(model, example)
    except Exception as error:  # whatever the user's code raises when channels are missing
        return f"{_place_of(error)} raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _difference(expected, found)


def _alone(model: nn.Module, example: Any, group: ChannelGroup) -> ChannelGroup:
    why = verify_cut(model, example, [group], _some([group]))
    if why is None:
        return group
    candidates = _candidates(model, group)[:MOST_ATTRIBUTES]
    for attributes in _subsets(candidates):
        tuned = replace(group, attributes=tuple(attributes))
        if verify_cut(model, example, [tuned], _some([group])) is None:
            return tuned
    return _left(group, why)


def _left(group: ChannelGroup, why: str) -> ChannelGroup:
    return replace(
        group, unprunable_reason=f"code around it depends on how many channels there are, or on their order: {why}"
    )


def _some(groups: Sequence[ChannelGroup]) -> PrunedUnits:
    """Other units of each group, up to a half; seldom so many that what is left divides evenly, unnoticed."""
    pruned = {}
    for number, group in enumerate(groups):
        generator = torch.Generator().manual_seed(number)
        count = max(1, group.units // (2 + number % 3) - (group.units > 4))
        pruned[group.name] = tuple(sorted(torch.randperm(group.units, generator=generator)[:count].tolist()))
    return pruned


def _candidates(model: nn.Module, group: ChannelGroup) -> list[ModuleAttribute]:
    """Numbers that the modules around a group's layers remember, and that count its units or channels."""
    most = max(sum(unit >= 0 for unit in member.units) for member in group.members)
    modules = {module_name(name): module for name, module in model.named_modules()}
    around = dict.fromkeys(_owner(modules, member.axis.module) for member in group.members)
    found = [
        ModuleAttribute(name, key, value // group.units)
        for name in around
        for key, value in vars(modules[name]).items()
        if type(value) is int and not key.startswith("_") and 0 < value <= most and value % group.units == 0
    ]
    return sorted(found, key=lambda one: (one.repeat > 1, "head" not in one.name, "dim" in one.name))


def _owner(modules: Mapping[str, nn.Module], name: str) -> str:
    """The module around a layer that has code of its own: lists, dicts and chains of layers remember nothing."""
    name = name.rpartition(".")[0]
    while name and type(modules.get(name)) in CONTAINERS:
        name = name.rpartition(".")[0]
    return name


def _subsets(candidates: list[ModuleAttribute]) -> Iterator[tuple[ModuleAttribute, ...]]:
    # The fewest first: a number that has nothing to do with the group would do no harm here, but later.
    sizes = range(1, len(candidates) + 1)
    return chain.from_iterable(combinations(candidates, size) for size in sizes)


@dataclass
class _Scales:
    """One number for each call of a normalisation layer, instead of the statistics that depend on all channels."""

    noted: list[float] = field(default_factory=list)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        with self._scaling(model, self._note):
            yield

    @contextmanager
    def replaying(self, model: nn.Module) -> Iterator[None]:
        remaining = iter(self.noted)
        with self._scaling(model, lambda _: next(remaining, 1.0)):
            yield

    @contextmanager
    def _scaling(self, model: nn.Module, scale: Callable[[Tensor], float]) -> Iterator[None]:
        with ExitStack() as undo:
            for module in model.modules():
                if is_norm(module):
                    undo.enter_context(replaced_forward(module, partial(_scaled, scale)))
            yield

    def _note(self, given: Tensor) -> float:
        self.noted.append(1.0 / max(float(given.float().std(correction=0)), 1e-6))
        return self.noted[-1]


def _scaled(scale: Callable[[Tensor], float], original: Any, given: Tensor, *_: Any, **__: Any) -> Tensor:
    return given * scale(given)


@contextmanager
def _silenced(model: nn.Module, groups: Sequence[ChannelGroup], pruned: PrunedUnits) -> Iterator[None]:
    """Zeros in every layer's weight for the units that it would no longer be given."""
    with ExitStack() as undo:
        for place, channels in lost_channels(groups, pruned).items():
            if place.side != "in":
                continue
            for one in place.slices:
                tensor = get_tensor(model, one.tensor)
                undo.callback(setattr, tensor, "data", tensor.data)
                tensor.data = tensor.data.index_fill(one.dim, indices_of(place, one, channels).to(tensor.device), 0)
        yield


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)  # for what the forward draws; the user's stream is put back
    with torch.no_grad():
        return [one for one in tree_leaves(call_model(model, copy_example(example))) if isinstance(one, Tensor)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> str | None:
    shapes = [[tuple(one.shape) for one in several] for several in (expected, found)]
    if shapes[0] != shapes[1]:
        return f"the output has shape {shapes[1]} instead of {shapes[0]}"
    for right, wrong in zip(expected, found, strict=True):
        if right.is_floating_point() and right.numel():
            scale = float(right.double().abs().nan_to_num().max())
            error = float((right.double() - wrong.double()).abs().nan_to_num().max())
            if error > (0.05 if right.element_size() < 4 else 1e-3) * scale + 1e-12:
                return f"the output differs by {error / (scale or 1):.1%} from that of the module with silent channels"
    return None


def _place_of(error: BaseException) -> str:
    """The line of the user's that was running: the last one outside of torch and of this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    if not frames:
        return "the module"
    last = frames[-1]
    line = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"`{line}` ({Path(last.filename).name}, line {last.lineno})"


def _is_ours(filename: str) -> bool:
    path = Path(filename)
    return PACKAGE in path.parents or TORCH in path.parents
