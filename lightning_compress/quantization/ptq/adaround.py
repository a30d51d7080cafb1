"""Weights moved onto their grids layer by layer, so that each layer's output stays what it was.

Reference: Nagel et al., 2020, sections 3.2 and 3.3, https://arxiv.org/abs/2004.10568
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_compress.nn.forward_capture import get_submodule
from lightning_compress.quantization.fake_quantizers import WeightFakeQuantize
from lightning_compress.quantization.functional import quantizers
from lightning_compress.quantization.layers import CONVOLUTIONS, TRANSPOSED, Layer, WeightRef
from lightning_compress.quantization.ptq.calibration_data import CalibrationBatches, Note, StopForward, recorded_calls
from lightning_compress.quantization.ptq.rounding_candidates import RoundingCandidates, learn_rounding
from lightning_compress.quantization.quantized_model import QuantizedModel

Example: TypeAlias = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]
# Products of a weight and an input in one step: enough to see the direction, few enough to take many steps.
PRODUCTS = 10**8
# Their grids stay where they are when weights move onto them.
FIXED_GRIDS = (quantizers.uniform, quantizers.lsq)


class LayerExamples:
    """What a layer is given by the quantized network so far, and what it gave in floating point.

    Args:
        layer: a convolution or a linear layer.
        weight_ref: its weight.
        quantizer: of the weight.
        seed: of the samples that are drawn.
    """

    def __init__(self, layer: Layer, weight_ref: WeightRef, quantizer: WeightFakeQuantize, seed: int) -> None:
        self.layer, self.weight_ref, self.rows = layer.module, weight_ref, quantizer.channel_groups
        self.dimensions = 1 + len(layer.module.kernel_size) if isinstance(layer.module, CONVOLUTIONS) else 1
        transposed = isinstance(layer.module, TRANSPOSED)
        self.by_channel = not transposed or (layer.module.groups == 1 and quantizer.channel_groups.group >= 0)
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self.inputs: list[Tensor] = []
        self.calls: list[Callable[[Tensor], Tensor]] = []
        self.outputs: list[Tensor] = []

    def see_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what the layer was given."""
        forward = self.layer.forward
        if args:
            given, call = args[0], lambda values: forward(values, *args[1:], **kwargs)
        else:
            name = next(iter(kwargs))
            given, call = kwargs[name], lambda values: forward(**{**kwargs, name: values})
        self.inputs.append(self._as_batch(given))
        self.calls.append(call)

    def see_output(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what the layer gave."""
        self.outputs.append(self._as_batch(output))

    def error_of(self, matrix: Tensor, step: int | None) -> Tensor:
        """Mean squared errors of the output with this weight: of some samples at a step, else of all.

        There is one for each channel, or a single one where the rows of the weight are no rows of channels.
        """
        if step is not None:
            return self._error(matrix, *self._drawn(matrix.numel()))
        sizes = [one.numel() for one in self.outputs]
        errors = [size * self._error(matrix, *one) for size, one in zip(sizes, self._all(), strict=True)]
        return torch.stack(errors).sum(0) / sum(sizes)

    def _all(self) -> Iterable[Example]:
        return zip(self.calls, self.inputs, self.outputs, strict=True)

    def _drawn(self, weights: int) -> Example:
        sizes = torch.tensor([float(len(one)) for one in self.inputs])
        call = int(torch.multinomial(sizes, 1, generator=self.generator))
        given, output = self.inputs[call], self.outputs[call]
        pixels = output[0, 0].numel()
        count = max(PRODUCTS // (weights * pixels), 1)
        chosen = torch.randperm(len(given), generator=self.generator)[:count].to(given.device)
        return self.calls[call], given[chosen], output[chosen]

    def _error(self, matrix: Tensor, call: Callable[[Tensor], Tensor], given: Tensor, output: Tensor) -> Tensor:
        with replaced_weight(self.layer, self.weight_ref.leaf, self.rows.join(matrix).to(given.dtype)):
            error = call(given) - output
        errors = error.float().square().transpose(0, 1).flatten(1).mean(1)
        return errors if self.by_channel else errors.mean(0, keepdim=True)

    def _as_batch(self, values: Tensor) -> Tensor:
        """With a dimension for samples, channels next, and for convolutions those of pixels."""
        kept = values.detach().clone()  # what comes after may write into it
        if self.dimensions == 1:
            return kept.reshape(-1, kept.shape[-1])
        return kept if kept.ndim > self.dimensions else kept[None]


@contextmanager
def replaced_weight(module: nn.Module, leaf: str, value: Tensor) -> Iterator[None]:
    """Within the context `value` is what the module finds as its `leaf`."""
    vars(module)[leaf] = value
    try:
        yield
    finally:
        del vars(module)[leaf]


def adaptive_rounding(
    model: nn.Module,
    reference: nn.Module,
    quantized: QuantizedModel,
    batches: CalibrationBatches,
    calls: Mapping[str, int],
    steps: int,
) -> dict[str, str]:
    """Move the weights of each layer in turn onto their grids, rounded so that the layer's output stays as it was.

    Args:
        model: whose quantizers act, with fixed ranges.
        reference: the same model in floating point.
        quantized: the model's quantizers; their seed is that of what is drawn.
        batches: which can be gone through many times.
        calls: how often each layer is called in a forward.
        steps: of the optimization of each layer.

    Returns:
        The layers whose weights keep the nearest place on the grid, and why.
    """
    left = {}
    for number, name in enumerate(quantized.placement.order):
        layer = quantized.layers[name]
        if why := _obstacle(quantized, layer):
            left[name] = why
            continue
        (weight_ref,) = layer.weights
        if weight_ref.name not in quantized.weights:
            continue
        quantizer = quantized.weights[weight_ref.name]
        examples = LayerExamples(layer, weight_ref, quantizer, quantized.seed * 1_000_003 + number)
        once = calls[name] == 1
        _watch(reference, get_submodule(reference, name), examples.see_output, once, batches, f"Output of {name}")
        _watch(model, layer.module, examples.see_input, once, batches, f"Input of {name}")
        track = batches.progress.track(range(steps), f"Rounding of {name}", steps)
        matrix = learn_rounding(_roundings(weight_ref, quantizer), examples.error_of, track, steps)
        weight_ref.parameter.copy_(quantizer.channel_groups.join(matrix))
    return left


def _watch(model: nn.Module, module: nn.Module, note: Note, once: bool, batches: CalibrationBatches, what: str) -> None:
    def noting(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        note(args, kwargs, output)
        if once:
            raise StopForward

    with recorded_calls(module, noting):
        batches.run(model, what)


def _roundings(weight_ref: WeightRef, quantizer: WeightFakeQuantize) -> RoundingCandidates:
    matrix = quantizer.channel_groups.split(weight_ref.parameter.detach())
    _, scale, zero_point = quantizer.quantized(matrix, scale=quantizer.scale, zero_point=quantizer.zero_point)
    if scale is None or zero_point is None:
        raise ValueError(f"'{weight_ref.name}' lies on no grid of one step.")
    return RoundingCandidates.from_weight(matrix, scale.detach(), zero_point, quantizer.quant_min, quantizer.quant_max)


def _obstacle(quantized: QuantizedModel, layer: Layer) -> str | None:
    if isinstance(layer.module, nn.Embedding | nn.EmbeddingBag) and len(layer.weights) == 1:
        return "each number of an embedding is an output by itself"
    if not isinstance(layer.module, (*CONVOLUTIONS, nn.Linear)):
        return f"{type(layer.module).__name__} uses its weights in the middle of its forward"
    (weight_ref,) = layer.weights
    hosts = [other.name for other in quantized.layers.values() for one in other.weights if one.name == weight_ref.name]
    if len(hosts) > 1:
        return f"its weight is shared by {', '.join(hosts)}"
    quantizer = quantized.weights.get(weight_ref.name)
    if quantizer is not None and quantizer.function not in FIXED_GRIDS:
        return f"the grid of {getattr(quantizer.function, '__name__', quantizer.function)} moves with the weight"
    return None
