"""Which tensor flows where in a module, found out by watching it work once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.core.capture import shown, tensors


@dataclass(frozen=True)
class Operation:
    """One call of a torch function: the values it took and made, by number, and the module that made the call.

    `module` is the innermost module whose forward was running, None outside of all of them.
    """

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str | None


@dataclass
class Flow:
    """Values, numbered in the order in which they came up, the operations between them, and modules' ends.

    Attributes:
        operations: in the order of their calls.
        given: for each module the tensors among its arguments, call by call; first those that are arguments themselves,
            then those within lists and other objects.
        doors: for each module how many of the tensors of its first call are arguments themselves.
        returned: for each module what it returned, call by call; None where that was no single tensor.
        parameters: the model's parameters by name, as they were at the beginning.
    """

    operations: list[Operation] = field(default_factory=list)
    given: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    doors: dict[str, int] = field(default_factory=dict)
    returned: dict[str, list[int | None]] = field(default_factory=dict)
    made_by: dict[int, Operation] = field(default_factory=dict)
    used_by: dict[int, list[Operation]] = field(default_factory=dict)
    boundaries: dict[int, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def add(self, operation: Operation) -> None:
        """Note that an operation was made."""
        self.operations.append(operation)
        for value in operation.inputs:
            self.used_by.setdefault(value, []).append(operation)
        for value in operation.outputs:
            self.made_by[value] = operation

    def uses(self, value: int) -> list[Operation]:
        """The operations that took this value."""
        return self.used_by.get(value, [])

    def boundary(self, value: int) -> str | None:
        """The innermost module that returned this value, and that was called once."""
        name = self.boundaries.get(value)
        return name if name is not None and len(self.returned[name]) == 1 else None


@contextmanager
def watched(model: nn.Module, names: Iterable[str] = ()) -> Iterator[Flow]:
    """Note in the returned Flow what happens in `model` within the context; what is compiled runs uncompiled meanwhile.

    Every tensor of the calls stays in memory until the end, so watch one step, not an epoch.
    """
    flow = Flow()
    watcher = _Watcher(flow)
    flow.parameters = {shown(name): watcher.number(one) for name, one in model.named_parameters(remove_duplicate=False)}
    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(watcher.enter(shown(name)), with_kwargs=True, prepend=True),
            module.register_forward_hook(watcher.leave(shown(name)), with_kwargs=True),
        ]
    try:
        with torch.compiler.set_stance("force_eager"), watcher:
            yield flow
    finally:
        for handle in handles:
            handle.remove()


class _Watcher(TorchFunctionMode):
    """Numbers the tensors that it sees. One that is changed in place is a new value from there on."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.running: list[str] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []  # an id is a tensor's own only as long as the tensor lives
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(dict.fromkeys(self.number(one) for one in tensors((args, kwargs))))
        result = function(*args, **kwargs)
        made = [] if isinstance(result, torch.Size) else list(tensors(result))
        if made:
            outputs = tuple(self.renumber(one) for one in made)
            self.flow.add(Operation(function, inputs, outputs, self.running[-1] if self.running else None))
        return result

    def number(self, tensor: Tensor) -> int:
        return self.numbers[id(tensor)] if id(tensor) in self.numbers else self.renumber(tensor)

    def renumber(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        self.count += 1
        self.numbers[id(tensor)] = self.count
        return self.count

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(name)
            arguments = [*args, *kwargs.values()]
            given = [one for one in arguments if isinstance(one, Tensor)]
            within = tensors([one for one in arguments if not isinstance(one, Tensor)])
            self.flow.doors.setdefault(name, len(given))
            self.flow.given.setdefault(name, []).append(tuple(map(self.number, (*given, *within))))

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.running.pop()
            value = self.number(output) if isinstance(output, Tensor) else None
            self.flow.returned.setdefault(name, []).append(value)
            # A module that hands on what it was given has not made it.
            if value is not None and value not in self.flow.given[name][-1]:
                self.flow.boundaries.setdefault(value, name)

        return hook
