"""Replace the fake-quantize calls of a `DeployedModel` while it runs; the modules stay as they are."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_compress.core.patching import wrapped_method
from lightning_compress.quantization.lowering.deployed_model import DeployedModel

# Where the limits of the whole numbers stand among the arguments of that function.
LIMITS = 3


@dataclass(frozen=True)
class FakeQuantizeCall:
    """One call of a quantizer within one forward of the model.

    Attributes:
        quantizer: its name.
        number: how often it was called before.
        scale, zero_point: of its grid.
        lowest, highest: of the whole numbers that it rounds to.
    """

    quantizer: str
    number: int
    scale: float
    zero_point: int
    lowest: int
    highest: int

    @property
    def name(self) -> str:
        """The quantizer's name, with the number from the second call on."""
        return f"{self.quantizer} (call {self.number + 1})" if self.number else self.quantizer


def fixed_qparams(deployable: DeployedModel) -> dict[str, tuple[float, int]]:
    """Scale and zero point of the quantizers that have them, by name: one that only rounds floats has none."""
    numbers = {}
    for name, quantizer in deployable.quantizers.items():
        scale, zero_point = (getattr(quantizer, part, None) for part in ("scale", "zero_point"))
        if scale is not None and zero_point is not None:
            numbers[name] = float(scale), int(zero_point)
    return numbers


@contextmanager
def replaced_fake_quantize(
    deployable: DeployedModel, instead: Callable[[FakeQuantizeCall, Tensor], Tensor]
) -> Iterator[None]:
    """Within the context, `instead(call, values)` stands for `torch.fake_quantize_per_tensor_affine` in quantizers."""
    counts: dict[str, int] = {}

    def begin(*_: Any) -> None:
        counts.clear()

    # Read before the module is traced: then these are plain numbers and not symbols.
    with ExitStack() as undo:
        undo.callback(deployable.module.register_forward_pre_hook(begin).remove)
        for name, numbers in fixed_qparams(deployable).items():
            wrapper = _wrapper(name, numbers, counts, instead)
            undo.enter_context(wrapped_method(deployable.quantizers[name], "forward", wrapper))
        yield


def _wrapper(
    name: str, numbers: tuple[float, int], counts: dict[str, int], instead: Callable[[FakeQuantizeCall, Tensor], Tensor]
) -> Callable[..., Any]:
    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = counts.get(name, 0)
        counts[name] = number + 1
        with _Instead(lambda values, *limits: instead(FakeQuantizeCall(name, number, *numbers, *limits), values)):
            return original(*args, **kwargs)

    return wrapper


class _Instead(TorchFunctionMode):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.fake_quantize_per_tensor_affine:
            return self.function(args[0], *args[LIMITS:])
        return func(*args, **(kwargs or {}))
