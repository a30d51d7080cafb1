"""Quantize a trained model with nothing but a few batches."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.nn.copying import copy_uncompiled, copy_without_hooks
from lightning_compress.nn.dataflow import Dataflow, trace_dataflow
from lightning_compress.nn.forward_capture import display_name, tensors_in
from lightning_compress.nn.isolation import preserved_random_state
from lightning_compress.nn.selection import Patterns
from lightning_compress.quantization.config import LayerPlan, QuantizationConfig
from lightning_compress.quantization.functional.formats import Bits, parse_format
from lightning_compress.quantization.layers import Layer, quantizable_layers
from lightning_compress.quantization.methods import MethodLike, default_name
from lightning_compress.quantization.placement.layout import place_activations
from lightning_compress.quantization.placement.sites import ActivationPlacement
from lightning_compress.quantization.ptq.adaround import adaptive_rounding
from lightning_compress.quantization.ptq.bias_correction import correct_biases, record_mean_outputs
from lightning_compress.quantization.ptq.calibration_data import CalibrationBatches, Forward
from lightning_compress.quantization.ptq.cross_layer_equalization import equalize as equalize_pairs
from lightning_compress.quantization.ptq.cross_layer_equalization import find_layer_pairs
from lightning_compress.quantization.ptq.progress import DelayedProgress
from lightning_compress.quantization.ptq.range_averaging import RangeAveraging
from lightning_compress.quantization.quantized_model import QuantizedModel

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)
# Rounding takes a factor for a channel along but for the last bits, which add up from layer to layer.
SAME = 1e-3


def quantize(
    model: Model,
    loader: Iterable[Any] | None,
    *,
    weights: Bits = 8,
    activations: Bits = 8,
    method: MethodLike = None,
    granularity: str = "channel",
    symmetric: bool = True,
    first: Bits = None,
    last: Bits = None,
    overrides: Mapping[str, Any] | None = None,
    reduce_range: bool = True,
    quantize_output: bool = False,
    targets: Patterns = None,
    ignore: Patterns = (),
    batches: int | None = None,
    forward: Forward | None = None,
    equalize: bool = False,
    adaround: int = 0,
    bias_correction: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> Model:
    """Return a copy of a trained model that computes on grids; `export` writes it as an integer model.

    Args:
        model: any module; stays as it is.
        loader: batches like those of training: tensors, dicts of keywords, or tuples whose first part is the input. A
            few hundred samples are enough. None if only weights are quantized, and by themselves.
        weights, activations, granularity, symmetric, first, last, overrides, reduce_range, quantize_output, targets,
            ignore: as in `QuantizationAwareTraining`.
        method: as there; "moving_average" is the mean over the batches here. None: "mse" up to 4 bits, since nothing
            learns a step here, and for the rest what suits the bits.
        batches: how many of them to watch; None: all.
        forward: calls the model with a batch, `forward(model, batch)`; None: by the kinds of batches above.
        equalize: bring the channels of neighbouring layers to one range first. Weights, and what BatchNorm between
            them scales and shifts with, change; what the model computes in floating point does not. It helps grids of
            one scale for a whole tensor.
        adaround: steps of an optimization by which the weights of each layer are rounded up or down, rather than to
            the nearest; 0: to the nearest. It helps at 2 to 4 bits; 1000 are a good number. Weights then lie on their
            grids. The batches are kept in memory.
        bias_correction: take what quantization adds to each layer's output on average out of its bias, or of the
            running mean of the BatchNorm that follows. The batches are kept in memory.
        progress: show a bar on a terminal if it takes longer than two seconds.
        seed: of methods that draw, and of the samples that `adaround` draws; the user's random stream is untouched.

    Returns:
        A copy in eval mode whose `state_dict` has the same keys; the weights in it lie on their grids. Copies of it
        compute on the same grids; `remove_quantizers(copy)` takes those of activations off. It is not compiled, and
        where the float model was compiled too, torch tells the two apart by their hooks only with
        `torch._dynamo.config.skip_nnmodule_hook_guards = False`.

    Raises:
        ValueError: if there is no batch, or anything else cannot be done; nothing is changed then.

    Reference: Jacob et al., 2018, section 3, https://arxiv.org/abs/1712.05877

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> loader = [torch.randn(16, 4) for _ in range(3)]
    >>> quantized = quantize(model, loader, weights=4, first="same")
    >>> int(quantized[0].weight[0].unique().numel()) <= 15
    True
    """
    request = FixedConfig(
        weights, activations, method, granularity, symmetric, first, last, dict(overrides or {}), reduce_range,
        quantize_output=quantize_output,
    )  # fmt: skip
    if isinstance(adaround, bool) or not isinstance(adaround, int) or adaround < 0:
        raise ValueError(f"adaround is a number of steps, such as 1000, or 0 for none, but is {adaround!r}.")
    copy = copy_uncompiled(copy_without_hooks(model)).eval()
    _, layers = quantizable_layers(copy, targets, ignore)
    plans = request.plan_layers(layers)
    if loader is None:
        _refuse_without_data(plans, equalize=equalize, adaround=adaround, bias_correction=bias_correction)
        quantized = QuantizedModel(copy, layers, request, ActivationPlacement(order=tuple(plans)), seed)
        quantized.install()
        quantized.check_ranges()
        _settle(quantized)
        _convert(quantized)
        return copy
    with _undisturbed(), DelayedProgress(progress) as bar:
        given = CalibrationBatches(loader, batches, forward, kept=bool(adaround or bias_correction), progress=bar)
        flow, outputs = _watched_step(copy, given)
        layout = place_activations(flow, copy, layers, request)
        if equalize:
            _equalize(copy, layers, layout, flow)
            _refuse_other_outputs(copy, given, outputs)
        reference = copy_without_hooks(copy) if adaround else None
        quantized = QuantizedModel(copy, layers, request, layout, seed)
        calls = {name: len(flow.inputs[name]) for name in layout.order}
        del flow, outputs
        quantized.install()
        with record_mean_outputs(quantized, bias_correction) as means:
            _watch_ranges(copy, quantized, given)
        _settle(quantized)
        if reference is not None:
            _tell("adaround", adaptive_rounding(copy, reference, quantized, given, calls, adaround))
        if bias_correction:
            _tell("bias_correction", correct_biases(copy, quantized, means, given, calls))
        _convert(quantized)
    return copy


@dataclass(frozen=True)
class FixedConfig(QuantizationConfig):
    """A request about a model that is not trained any more: where no method is named, one that learns nothing."""

    def _planned(self, settings: Mapping[str, Any]) -> LayerPlan:
        return super()._planned({**settings, "method": _without_learning(settings)})


def _without_learning(settings: Mapping[str, Any]) -> MethodLike:
    method = settings["method"]
    if method is not None and not isinstance(method, Mapping):
        named: MethodLike = method
        return named
    by_side = dict(method or {})
    forms = {
        "weights": parse_format(settings["weights"]),
        "activations": parse_format(settings["activations"], "activations"),
    }
    for side, form in forms.items():
        if by_side.get(side) is None and form is not None and default_name(form, side) == "lsq":
            by_side[side] = "mse"
    return by_side or None


def _refuse_without_data(plans: Mapping[str, LayerPlan], **wanted: int) -> None:
    """Refuse to do without data what needs some."""
    reasons = [name for name, value in wanted.items() if value]
    activations = [name for name, plan in plans.items() if plan.activations is not None]
    if activations:
        reasons.append(f"activations, which are quantized at {', '.join(activations[:3])},")
    if reasons:
        raise ValueError(
            f"loader=None, but {' and '.join(reasons)} cannot do without calibration data. Give a loader, or quantize "
            f"weights alone: activations=None."
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without gradients, compilers, or a trace in the user's random streams."""
    # What is called a few times only is not worth compiling.
    with torch.no_grad(), preserved_random_state(), torch.compiler.set_stance("force_eager"):
        yield


def _watched_step(model: nn.Module, given: CalibrationBatches) -> tuple[Dataflow, list[Tensor]]:
    """What flows where for the first batch, and all that leaves the network."""
    with trace_dataflow(model) as flow:
        # A use outside of all modules: what leaves must not be taken for what only the next layer sees.
        outputs = [one.detach().clone() for one in tensors_in(given.call(model, given.first))]
    return flow, outputs


def _equalize(model: nn.Module, layers: list[Layer], layout: ActivationPlacement, flow: Dataflow) -> None:
    modules = {display_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    pairs = find_layer_pairs(flow, model, layers, layout.norms, modules)
    if not pairs:
        logger.warning("equalize: no two quantized layers are connected by BatchNorm, ReLU and pooling alone.")
    equalize_pairs(pairs)


def _refuse_other_outputs(model: nn.Module, given: CalibrationBatches, outputs: list[Tensor]) -> None:
    for before, after in zip(outputs, tensors_in(given.call(model, given.first)), strict=True):
        if before.is_floating_point() and before.numel():
            moved, size = float((after - before).abs().max()), float(before.abs().max())
            if not moved <= max(SAME, 4 * torch.finfo(before.dtype).eps) * size:
                raise ValueError(
                    f"equalize=True would change what the model computes, by {moved:.3g} where outputs reach "
                    f"{size:.3g}: its forward reads weights, or numbers between layers, in a way that cannot be seen. "
                    f"Leave those layers out by `ignore`, or write equalize=False."
                )


def _watch_ranges(model: nn.Module, quantized: QuantizedModel, given: CalibrationBatches) -> None:
    """Let all quantizers see the activations in floating point."""
    quantized.set_step(0)
    quantized.state.enabled, quantized.state.observer_enabled = True, True
    ranges = RangeAveraging(quantized.activations.values())
    with ranges.recording():
        given.run(model, "Calibrating", ranges.end_batch)
    quantized.state.observer_enabled = False
    if missing := quantized.uncalibrated():
        raise ValueError(
            f"No number has come to {', '.join(missing)}: layers that only some batches reach get no range. Leave them "
            f"out by `ignore`, or give batches that reach them."
        )
    quantized.check_ranges()


def _settle(quantized: QuantizedModel) -> None:
    """From now on compute on grids that stay as they are."""
    mode = quantized.state
    mode.enabled, mode.observers_frozen, mode.fake_quant_enabled = True, True, True


def _convert(quantized: QuantizedModel) -> None:
    """Put the weights themselves on their grids; nobody will train on from what they were."""
    quantized.convert()
    quantized.latents.clear()


def _tell(what: str, left: Mapping[str, str]) -> None:
    for name, why in left.items():
        logger.warning("%s leaves '%s' as it is: %s.", what, name, why)
