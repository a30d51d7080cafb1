"""Compare a graph in ONNX Runtime with its module in torch, place by place.

At each quantizer torch is given the whole numbers that ONNX Runtime has there, so that a difference is named where it
arises and nothing adds up on the way. Whole numbers may differ where a value lies between two of them: so what is
compared is the whole number of one with the value of the other before it is rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from lightning_compress.export.onnx.qdq.activations import ActivationGrid
from lightning_compress.export.onnx.qdq.fake_quantize_calls import (
    FakeQuantizeCall,
    fixed_qparams,
    replaced_fake_quantize,
)
from lightning_compress.export.onnx.qdq.graph import Array
from lightning_compress.export.onnx.qdq.output_agreement import OutputAgreement, compare_outputs
from lightning_compress.export.onnx.qdq.runtime import (
    as_arrays,
    call_for_outputs,
    make_session,
    relative_difference,
    run_session,
)
from lightning_compress.nn.example_inputs import batch_size, call_model, copy_example
from lightning_compress.quantization.lowering.deployed_model import DeployedModel

# Sums in another order, and biases that were not rounded to steps of a product before.
LARGEST_OUTPUT_DIFFERENCE = 1e-3


@dataclass
class Differences:
    """How far ONNX Runtime is from torch.

    Attributes:
        steps: beyond rounding, by quantizer in the order of their calls.
        local: of each output from what torch makes of the same whole numbers.
        outputs: of each output from what torch makes of the input.
        agreement: of the outputs with what torch makes of the input, in terms of their range and classes.
    """

    steps: dict[str, float] = field(default_factory=dict)
    local: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)
    agreement: OutputAgreement | None = None


def measure_differences(
    deployable: DeployedModel, model: ModelProto, places: Sequence[ActivationGrid], example: Any
) -> Differences:
    """Run both on an input.

    Raises:
        ValueError: if a quantizer is never called, or the graph with its whole numbers shown gives other outputs than
            without.
    """
    names = [one.name for one in model.graph.output]
    shown = run_session(make_session(_with_codes_shown(model, places)), example)
    alone = run_session(make_session(model), example)
    for name in names:
        if relative_difference(shown[name], alone[name]) > LARGEST_OUTPUT_DIFFERENCE:
            raise ValueError(f"The output '{name}' changes if the codes are shown, so they cannot be checked.")
    found, called = Differences(), set[str]()
    with replaced_fake_quantize(deployable, _forced(places, shown, found.steps, called)):
        local = as_arrays(call_for_outputs(call_model, deployable.module, copy_example(example)))
    if idle := [name for name in fixed_qparams(deployable) if name not in called]:
        raise ValueError(
            f"The module's forward never calls {', '.join(idle)}, or that does not call "
            f"torch.fake_quantize_per_tensor_affine: call each quantizer, or take it out of module.quantizers."
        )
    free = as_arrays(call_for_outputs(call_model, deployable.module, copy_example(example)))
    if len(free) != len(names):
        raise ValueError(f"The module returns {len(free)} tensors, but the graph {len(names)}: {', '.join(names)}.")
    found.local = [relative_difference(shown[name], one) for name, one in zip(names, local, strict=True)]
    found.outputs = [relative_difference(alone[name], one) for name, one in zip(names, free, strict=True)]
    if numpy.isfinite(found.outputs).all():
        found.agreement = compare_outputs([alone[name] for name in names], free, batch_size(example))
    return found


def check_differences(found: Differences, tolerance: float, hint: str) -> None:
    """Refuse a graph that does not compute what the module computes.

    Raises:
        ValueError: if a quantizer is more than `tolerance` steps beyond rounding, or else an output differs.
    """
    for name, steps in found.steps.items():
        if not steps <= tolerance:
            raise ValueError(
                f"ONNX Runtime disagrees with the module, first at '{name}': by {steps:.3g} steps of its grid beyond "
                f"rounding, where {tolerance:g} are allowed.{hint}"
            )
    for number, share in enumerate(found.local):
        if not share <= LARGEST_OUTPUT_DIFFERENCE:
            raise ValueError(
                f"ONNX Runtime disagrees with the module at output {number}, behind the last quantizer: by "
                f"{100 * share:.3g} % of the largest value.{hint}"
            )


def _with_codes_shown(model: ModelProto, places: Sequence[ActivationGrid]) -> ModelProto:
    shown = ModelProto()
    shown.CopyFrom(model)
    for name in dict.fromkeys(place.codes for place in places):
        shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    return shown


def _forced(
    places: Sequence[ActivationGrid], shown: dict[str, Array], steps: dict[str, float], called: set[str]
) -> Any:
    """Give torch the whole numbers that ONNX Runtime has, and note how far they are from its own values."""
    by_call = {(place.quantizer, place.number): place for place in places}

    def instead(call: FakeQuantizeCall, values: Tensor) -> Tensor:
        called.add(call.quantizer)
        place = by_call.get((call.quantizer, call.number))
        if place is None:  # nothing in the graph needed it
            return torch.fake_quantize_per_tensor_affine(values, call.scale, call.zero_point, call.lowest, call.highest)
        codes = torch.from_numpy(shown[place.codes])
        steps[call.name] = _beyond_rounding(codes, values, place)
        return (codes.to(torch.float32) - place.zero_point) * place.step

    return instead


def _beyond_rounding(codes: Tensor, values: Tensor, place: ActivationGrid) -> float:
    if codes.shape != values.shape:
        return numpy.inf
    wanted = (values.double() / place.step + place.zero_point).clamp(place.lowest, place.highest)
    if place.gain != 1.0:
        return numpy.inf if _has_wrong_signs(codes, values, wanted) else 0.0
    distance = (codes.double() - wanted).abs() - 0.5
    return float(distance.max().clamp(min=0.0)) if distance.numel() else 0.0


def _has_wrong_signs(codes: Tensor, values: Tensor, wanted: Tensor) -> bool:
    """Whether a number is on the wrong side of zero; what is next to nothing may be on either."""
    enough = values.abs() > LARGEST_OUTPUT_DIFFERENCE * values.abs().amax() if values.numel() else values.bool()
    return bool(((codes.double() != wanted.round()) & enough).any())
