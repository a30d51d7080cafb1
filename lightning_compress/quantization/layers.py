"""Which layers hold the weights that are quantized, and from where their forward reads them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lightning_compress.nn.forward_capture import display_name
from lightning_compress.nn.selection import Candidate, Patterns, Selection, select

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# These multiply their weight with what they are given, for which runtimes have integer kernels.
COMPUTING = (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
KNOWN = (*COMPUTING, *RECURRENT, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)

# By what torch's hooks put behind the name of a weight that they compute.
MADE_BY_HOOKS = {
    "_g": "remove the weight norm by torch.nn.utils.remove_weight_norm",
    "_v": "remove the weight norm by torch.nn.utils.remove_weight_norm",
    "_orig": "remove the spectral norm by torch.nn.utils.remove_spectral_norm",
}


@dataclass(frozen=True)
class WeightRef:
    """One weight: its name, the module whose attribute it is, and its output channels' axis."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    leaf: str
    axis: int


@dataclass(frozen=True)
class Layer:
    """A module in whose forward quantized weights are used. `owner.leaf` of each is read there."""

    name: str
    module: nn.Module
    weights: tuple[WeightRef, ...]

    @property
    def computes(self) -> bool:
        """Whether it could compute with integers, given quantized inputs."""
        return isinstance(self.module, COMPUTING)


def quantizable_layers(
    model: nn.Module, targets: Patterns = None, ignore: Patterns = ()
) -> tuple[Selection, list[Layer]]:
    """The layers whose weights are chosen, frozen ones too, in the order of the model; what is left out and why.

    Args:
        model: the module to look through.
        targets, ignore: which weights; without targets all of convolutions, linear and recurrent layers, attention
            projections and embeddings.

    Raises:
        ValueError: if nothing is left, or something is asked for that cannot be quantized.
    """
    # What is frozen while it is trained, or once it is, computes on its grid where it is deployed.
    selection = select(model, targets if targets is not None else _is_weight_of(model), ignore, frozen=True)
    modules = {display_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    chosen, left_out = [], dict(selection.left_out)
    for candidate in selection.chosen:
        if reason := _obstacle(candidate, asked=targets is not None):
            left_out[candidate.name] = reason
        else:
            chosen.append(candidate)
    found: dict[str, list[WeightRef]] = {}
    first: dict[int, str] = {}  # a module that has several names is one layer
    for candidate in chosen:
        for name in candidate.names:
            host, weight_ref = _weight_ref(name, candidate, modules)
            if first.setdefault(id(modules[host]), host) == host:
                found.setdefault(host, []).append(weight_ref)
    order = [name for name in modules if name in found]
    layers = [Layer(name, modules[name], tuple(found[name])) for name in order]
    if not layers:
        raise ValueError(f"No weight is left to quantize. Left out: {left_out}.")
    share = selection.covered * sum(one.parameter.numel() for one in chosen) / _count(selection.chosen)
    return Selection(tuple(chosen), left_out, share), layers


def _is_weight_of(model: nn.Module) -> "Patterns":
    weights = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, KNOWN)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not name.startswith("bias")
    }
    return lambda _name, parameter: id(parameter) in weights


def _obstacle(candidate: Candidate, asked: bool) -> str | None:
    if "parametrizations" in candidate.name.split("."):
        reason = "computed by a parametrization; remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
    elif not isinstance(candidate.owner, KNOWN):
        reason = f"{type(candidate.owner).__name__} is no layer whose forward is known to read it"
    elif made := _made_by_hook(candidate.owner, candidate.name.rpartition(".")[2]):
        reason = f"what the layer computes with is made of it before each call; {made} first"
    else:
        return None
    if asked:
        raise ValueError(f"'{candidate.name}' cannot be quantized: {reason}.")
    return reason


def _made_by_hook(owner: nn.Module, leaf: str) -> str | None:
    """How to give a layer its own weight back, if a hook of torch's computes that from this one and others."""
    for suffix, mend in MADE_BY_HOOKS.items():
        weight = leaf.removesuffix(suffix)
        if weight != leaf and hasattr(owner, weight) and weight not in owner._parameters:
            pruned = hasattr(owner, f"{weight}_mask")
            return f"make the pruning permanent by torch.nn.utils.prune.remove(layer, '{weight}')" if pruned else mend
    return None


def _weight_ref(name: str, candidate: Candidate, modules: dict[str, nn.Module]) -> tuple[str, WeightRef]:
    path, _, leaf = name.rpartition(".")
    owner, (above, _, last) = modules[path], path.rpartition(".")
    # Attention never calls its output projection: it reads the weight itself.
    read_above = last == "out_proj" and isinstance(modules.get(above), nn.MultiheadAttention)
    axis = 1 if isinstance(owner, TRANSPOSED) else 0
    return above if read_above else path, WeightRef(candidate.name, candidate.parameter, owner, leaf, axis)


def _count(candidates: Iterable[Candidate]) -> int:
    return max(1, sum(one.parameter.numel() for one in candidates))
