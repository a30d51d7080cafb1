"""What quantization adds to a layer's output on average, taken out of its bias.

Reference: Nagel et al., 2019, section 4.2 and appendix D, https://arxiv.org/abs/1906.04721
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.forward_capture import get_submodule
from lightning_compress.quantization.layers import CONVOLUTIONS
from lightning_compress.quantization.ptq.calibration_data import CalibrationBatches, StopForward, recorded_calls
from lightning_compress.quantization.quantized_model import QuantizedModel


class MeanOutputRecorder:
    """The mean of each channel that a layer gives, over all that it has given so far."""

    def __init__(self, module: nn.Module, once: bool = False) -> None:
        self.module, self.once = module, once
        self.sum: Tensor | float = 0.0
        self.count = 0

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note one call."""
        rows = _by_channel(self.module, output[0] if isinstance(output, tuple) else output)
        self.sum = self.sum + rows.sum(0, dtype=torch.float64)
        self.count += len(rows)
        if self.once:
            raise StopForward

    @property
    def value(self) -> Tensor:
        """Shape `(channels,)`, in float64."""
        return torch.as_tensor(self.sum / max(self.count, 1))


@contextmanager
def record_mean_outputs(quantized: QuantizedModel, wanted: bool = True) -> Iterator[dict[str, MeanOutputRecorder]]:
    """Means of what the quantized layers give within the context, by their names; none if they are not wanted."""
    layers = {name: layer for name, layer in quantized.layers.items() if layer.computes and wanted}
    with ExitStack() as undo:
        means = {name: MeanOutputRecorder(layer.module) for name, layer in layers.items()}
        for mean in means.values():
            undo.enter_context(recorded_calls(mean.module, mean))
        yield means


def correct_biases(
    model: nn.Module,
    quantized: QuantizedModel,
    means: Mapping[str, MeanOutputRecorder],
    batches: CalibrationBatches,
    calls: Mapping[str, int],
) -> dict[str, str]:
    """Give each layer in turn the mean output that it had in floating point.

    The difference goes into its bias; where it has none, into the running mean of the BatchNorm that alone takes its
    output. Each layer is corrected with those before it corrected already.

    Args:
        model: whose quantizers act, with fixed ranges.
        quantized: its quantizers.
        means: what its layers gave in floating point, for the same batches.
        batches: which can be gone through many times.
        calls: how often each layer is called in a forward.

    Returns:
        The layers that are left as they are, and why.
    """
    left = {}
    for name in quantized.placement.order:
        if name not in means:
            continue
        correction = _correction(model, quantized, name)
        if correction is None:
            left[name] = "it has neither a bias nor a BatchNorm with running statistics that alone takes its output"
            continue
        shifted, sign = correction
        now = MeanOutputRecorder(means[name].module, once=calls[name] == 1)
        with recorded_calls(now.module, now):
            batches.run(model, f"Bias of {name}")
        error = now.value - means[name].value - _rounding(quantized, name)
        shifted.add_(error.to(shifted), alpha=sign)
    return left


def _correction(model: nn.Module, quantized: QuantizedModel, name: str) -> tuple[Tensor, int] | None:
    """What is to be shifted, and in which direction, by the mean error of the layer's output."""
    module = quantized.layers[name].module
    owner = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
    if isinstance(owner.bias, Tensor):
        return owner.bias, -1
    norm = quantized.placement.norms.get(name)
    mean = get_submodule(model, norm).running_mean if norm is not None else None
    # What BatchNorm subtracts may grow by as much as the output did.
    return (mean, 1) if isinstance(mean, Tensor) else None


def _rounding(quantized: QuantizedModel, name: str) -> Tensor | float:
    """What the rounding of its bias adds to a layer's output, which a new bias is to undergo anew."""
    rounded = quantized.integer_biases().get(name)
    own = None if rounded is None else quantized.modules[name]._parameters["bias"]
    return 0.0 if rounded is None else rounded if own is None else rounded - own


def _by_channel(module: nn.Module, output: Tensor) -> Tensor:
    """As a matrix with a column for each channel."""
    dim = -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1
    return output.movedim(dim, -1).flatten(0, -2) if output.ndim > 1 else output[None]
