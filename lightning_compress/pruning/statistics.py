"""What criteria ask for beyond the weight of the moment; gathered only if a criterion names it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.distributed import all_reduce_sum_, is_distributed
from lightning_compress.nn.channel_cut import Kept
from lightning_compress.nn.isolation import is_measuring
from lightning_compress.nn.selection import Candidate
from lightning_compress.nn.surgery import slice_tensor

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CriterionStatistics:
    """Running sums beside the model, for those of the `needs` that need them.

    Args:
        layers: the weights by name.
        needs: names of a criterion's parameters.

    Raises:
        ValueError: if input norms are asked for where a weight's inputs cannot be seen.
    """

    def __init__(self, layers: dict[str, Candidate], needs: Iterable[str]) -> None:
        self.layers, self.needs = layers, frozenset(needs)
        self.initial: dict[str, Tensor] = {}
        self.weight_grad: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.listening = False
        if "input_norm" in self.needs:
            _refuse_unseen(layers)

    def hooks(self) -> list[Any]:
        """Listen to the inputs of layers; returns handles to remove."""
        if "input_norm" not in self.needs:
            return []
        return [
            candidate.owner.register_forward_pre_hook(self._listener(name)) for name, candidate in self.layers.items()
        ]

    @torch.no_grad()
    def remember_initial(self) -> None:
        """Keep the weights as they are now."""
        if "initial_weight" in self.needs:
            self.initial = {name: one.parameter.detach().clone() for name, one in self.layers.items()}

    @torch.no_grad()
    def add_gradients(self, stepping: set[nn.Parameter]) -> None:
        """Add this step's `weight * grad` of the parameters that are about to be stepped."""
        if "weight_grad_sum" not in self.needs:
            return
        for name, candidate in self.layers.items():
            parameter = candidate.parameter
            if parameter.grad is not None and parameter in stepping:
                if name not in self.weight_grad:
                    self.weight_grad[name] = torch.zeros_like(parameter)
                self.weight_grad[name].addcmul_(parameter, parameter.grad)

    def inputs_for(self, name: str) -> dict[str, Tensor]:
        """Everything gathered about one weight."""
        parameter = self.layers[name].parameter
        offered = {}
        if "initial_weight" in self.needs:
            offered["initial_weight"] = self._initial_of(name).to(parameter.device)
        if "weight_grad_sum" in self.needs:
            kept = self.weight_grad.get(name)
            offered["weight_grad_sum"] = torch.zeros_like(parameter) if kept is None else kept.to(parameter.device)
        if "input_norm" in self.needs:
            offered["input_norm"] = _spread(self.squares[name].sqrt(), self.layers[name])
        return offered

    def all_reduce(self) -> None:
        """Bring the ranks' sums together, before scores are made from them.

        Raises:
            RuntimeError: if a layer's inputs were never seen.
        """
        if "input_norm" not in self.needs:
            return
        unseen = sorted(self.layers.keys() - self.squares.keys())
        if unseen:
            raise RuntimeError(
                f"No input of {', '.join(unseen)} was seen, so its norm is unknown: its module is not called, or was "
                f"compiled and called before training began. ignore={unseen}, or choose a criterion without input_norm."
            )
        if is_distributed():
            all_reduce_sum_(self.squares[name] for name in self.layers)

    def reset_inputs(self) -> None:
        """Begin anew after an update."""
        self.squares = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        kept = {"initial": self.initial, "weight_grad": self.weight_grad, "squares": self.squares}
        return {key: {name: value.cpu() for name, value in part.items()} for key, part in kept.items() if part}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take what `state` gave.

        Raises:
            ValueError: if it belongs to another model, or is damaged.
        """
        _refuse_foreign(state, self.layers)
        for key, part in state.items():
            on_device = {name: value.to(self.layers[name].parameter.device) for name, value in part.items()}
            setattr(self, key, on_device)

    @torch.no_grad()
    def take_over(self, older: "CriterionStatistics") -> None:
        """Take the sums of weights that are still there after modules were replaced; new weights begin without."""
        same = {name for name, one in self.layers.items() if _is_in(one, name, older.layers)}
        for own in ("weight_grad", "squares"):
            setattr(self, own, {name: value for name, value in getattr(older, own).items() if name in same})
        self.remember_initial()
        self.initial |= {name: value for name, value in older.initial.items() if name in same}

    def drop(self, name: str) -> None:
        """One weight is no longer one of these."""
        self.layers = {key: one for key, one in self.layers.items() if key != name}
        for seen in (self.initial, self.weight_grad, self.squares):
            seen.pop(name, None)

    def slice_channels(self, kept: Mapping[str, Kept]) -> None:
        """Cut sums as their weights have been cut."""
        self.initial = {name: slice_tensor(one, kept[name]) for name, one in self.initial.items()}
        self.weight_grad = {name: slice_tensor(one, kept[name]) for name, one in self.weight_grad.items()}
        # Which inputs of grouped filters are gone is not told by a weight's own dimensions: these are summed anew.
        alone = {name for name, one in self.layers.items() if getattr(one.owner, "groups", 1) == 1 or not kept[name]}
        inputs = {name: {0: dims[1]} if 1 in dims else {} for name, dims in kept.items()}
        self.squares = {name: slice_tensor(one, inputs[name]) for name, one in self.squares.items() if name in alone}

    def _initial_of(self, name: str) -> Tensor:
        if name not in self.initial:
            raise RuntimeError(
                f"The initial weight of '{name}' is not known. Call remember_initial() before training begins."
            )
        return self.initial[name]

    def _listener(self, name: str) -> Callable[..., None]:
        owner = self.layers[name].owner

        def listen(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.listening and inputs and torch.is_grad_enabled() and not is_measuring():
                squares = _squares(inputs[0].detach(), owner)
                self.squares[name] = self.squares[name] + squares if name in self.squares else squares

        return listen


def _is_in(candidate: Candidate, name: str, layers: Mapping[str, Candidate]) -> bool:
    return name in layers and layers[name].parameter is candidate.parameter


def _squares(inputs: Tensor, owner: nn.Module) -> Tensor:
    """The sum of squares of each input feature (linear) or channel (convolution), in float32."""
    inputs = inputs.float()
    if isinstance(owner, nn.Linear):
        return inputs.flatten(0, -2).square().sum(0) if inputs.ndim > 1 else inputs.square()
    spatial = len(owner.kernel_size)  # type: ignore[arg-type]
    batched = inputs if inputs.ndim == spatial + 2 else inputs[None]
    return batched.square().sum([0, *range(2, batched.ndim)])


def _spread(norm: Tensor, candidate: Candidate) -> Tensor:
    """Shape the norm of each input so that it broadcasts to the weight; each group of filters has inputs of its own."""
    weight, groups = candidate.parameter, getattr(candidate.owner, "groups", 1)
    per_group = norm.to(weight.dtype).view(groups, -1)
    per_filter = per_group.repeat_interleave(len(weight) // groups, 0) if groups > 1 else per_group
    return per_filter.view(*per_filter.shape, *[1] * (weight.ndim - 2))


def _refuse_foreign(state: Any, layers: dict[str, Candidate]) -> None:
    if not isinstance(state, dict) or not state.keys() <= {"initial", "weight_grad", "squares"}:
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"The checkpoint's sums are damaged: they are {found}.")
    for key, name, value in ((key, *item) for key, part in state.items() for item in part.items()):
        if name not in layers:
            raise ValueError(
                f"The checkpoint has the {key} of '{name}', which is not pruned here. Resume with the targets of that "
                f"run; here they are {', '.join(layers)}."
            )
        weight = layers[name].parameter
        inputs = [weight.shape[1] * getattr(layers[name].owner, "groups", 1)]
        shape = list(value.shape) if isinstance(value, Tensor) else None
        if shape != (inputs if key == "squares" else list(weight.shape)):
            found = f"a {type(value).__name__}" if shape is None else f"shape {shape}"
            raise ValueError(
                f"The checkpoint's {key} of '{name}' has {found}, but the weight has shape {list(weight.shape)}. It "
                f"belongs to another model, or is damaged."
            )


def _refuse_unseen(layers: dict[str, Candidate]) -> None:
    seen = (nn.Linear, *CONVOLUTIONS)
    unseen = [
        name for name, one in layers.items() if not isinstance(one.owner, seen) or "Dynamically" in str(one.owner)
    ]
    if unseen:
        raise ValueError(
            f"input_norm is known for linear and convolution layers only, not for {', '.join(unseen)}. "
            f"ignore={unseen}, or choose a criterion without input_norm."
        )
