"""Which tensor flows where in a module, found out by watching it work once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_compress.nn.forward_capture import display_name, ordered_arguments, tensors_in


@dataclass(frozen=True)
class Operation:
    """One call of a torch function: the values it took and made, by number, and the module that made the call.

    `module` is the innermost module whose forward was running, None outside of all of them; `numbers` are those among
    the arguments that are no tensors, by position or keyword.
    """

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str | None
    numbers: Mapping[int | str, float] = field(default_factory=dict, compare=False)


@dataclass
class Dataflow:
    """Values, numbered in the order in which they came up, the operations between them, and modules' ends.

    Attributes:
        operations: in the order of their calls.
        inputs: for each module the tensors among its arguments, call by call; first those that are arguments
            themselves, then those within lists and other objects.
        num_positional: for each module how many of the tensors of each call are arguments themselves.
        outputs: for each module what it returned, call by call; None where that was no single tensor.
        parameters: the model's parameters by name, as they were at the beginning.
        boundaries: for each value the modules that returned it and had not been given it, the innermost first.
        dimensions: how many each value has.
    """

    operations: list[Operation] = field(default_factory=list)
    inputs: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    num_positional: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, list[int | None]] = field(default_factory=dict)
    producer: dict[int, Operation] = field(default_factory=dict)
    consumers: dict[int, list[Operation]] = field(default_factory=dict)
    boundaries: dict[int, list[str]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    dimensions: dict[int, int] = field(default_factory=dict)

    def add(self, operation: Operation) -> None:
        """Note that an operation was made."""
        self.operations.append(operation)
        for value in operation.inputs:
            self.consumers.setdefault(value, []).append(operation)
        for value in operation.outputs:
            self.producer[value] = operation

    def consumers_of(self, value: int) -> list[Operation]:
        """The operations that took this value."""
        return self.consumers.get(value, [])

    def ancestors(self, values: Iterable[int]) -> set[int]:
        """These values, and all that they were made of."""
        found, waiting = set[int](), list(values)
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                waiting += self.producer[value].inputs if value in self.producer else ()
        return found


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm and nothing else, of one process or over several, which torch does not tell."""
    return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, float]:
    plain: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: float(value) for key, value in plain if isinstance(value, int | float)}


@contextmanager
def trace_dataflow(model: nn.Module, names: Iterable[str] = ()) -> Iterator[Dataflow]:
    """Note in the returned Flow what happens in `model` within the context; what is compiled runs uncompiled meanwhile.

    Every tensor of the calls stays in memory until the end, so watch one step, not an epoch.
    """
    flow = Dataflow()
    watcher = _Watcher(flow)
    flow.parameters = {
        display_name(name): watcher.number(one) for name, one in model.named_parameters(remove_duplicate=False)
    }
    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(watcher.enter(display_name(name)), with_kwargs=True, prepend=True),
            module.register_forward_hook(watcher.leave(display_name(name)), with_kwargs=True),
        ]
    try:
        with torch.compiler.set_stance("force_eager"), watcher:
            yield flow
    finally:
        for handle in handles:
            handle.remove()


class _Watcher(TorchFunctionMode):
    """Numbers the tensors that it sees. One that is changed in place is a new value from there on."""

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow
        self.running: list[str] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []  # an id is a tensor's own only as long as the tensor lives
        self.count, self.silent = 0, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.silent:
            return function(*args, **kwargs)
        inputs = tuple(dict.fromkeys(self.number(one) for one in tensors_in((args, kwargs))))
        result = function(*args, **kwargs)
        # To write into a part of a tensor returns nothing.
        made = list(tensors_in(args[0])) if function is Tensor.__setitem__ else list(tensors_in(result))
        if made and not isinstance(result, torch.Size):
            outputs = tuple(self.renumber(one) for one in made)
            within = self.running[-1] if self.running else None
            self.flow.add(Operation(function, inputs, outputs, within, _numbers(args, kwargs)))
        return result

    def number(self, tensor: Tensor) -> int:
        return self.numbers[id(tensor)] if id(tensor) in self.numbers else self.renumber(tensor)

    def renumber(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        self.count += 1
        self.numbers[id(tensor)] = self.count
        self.flow.dimensions[self.count] = tensor.ndim
        return self.count

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(name)
            arguments = ordered_arguments(module, args, kwargs)
            given = [one for one in arguments if isinstance(one, Tensor)]
            within = tensors_in([one for one in arguments if not isinstance(one, Tensor)])
            self.flow.num_positional[name] = min(len(given), self.flow.num_positional.get(name, len(given)))
            self.flow.inputs.setdefault(name, []).append(tuple(map(self.number, (*given, *within))))
            self.silent += is_plain_norm(module)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.running.pop()
            if is_plain_norm(module):
                self.silent -= 1
                given = self.flow.inputs[name][-1][:1]
                self.flow.add(Operation(functional.batch_norm, given, (self.renumber(output),), name))
            value = self.number(output) if isinstance(output, Tensor) else None
            self.flow.outputs.setdefault(name, []).append(value)
            # A module that hands on what it was given has not made it.
            if value is not None and value not in self.flow.inputs[name][-1]:
                self.flow.boundaries.setdefault(value, []).append(name)

        return hook
