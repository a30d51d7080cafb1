"""The share of multiply-accumulates that an ONNX file computes in floating point."""

from collections.abc import Iterable
from typing import Any

from lightning_compress.measure.macs import count_macs
from lightning_compress.quantization.lowering.deployed_model import DeployedModel


def float_macs(deployable: DeployedModel, example: Any, integer_weights: Iterable[str]) -> dict[str, float]:
    """The share of all multiply-accumulates that each layer does in floating point, the largest first.

    Args:
        deployable: run in eval mode, and left as it was.
        example: what its module is called with.
        integer_weights: names of the weights that integer kernels take.

    Returns:
        Shares in (0, 1] by layer; products of activations with each other, as in attention, stand under the module that
        computes them. Empty if all is done with integers.
    """
    macs = {layer: one.dense for layer, one in count_macs(deployable.module, example).items() if one.dense}
    integer = {name.rpartition(".")[0] for name in integer_weights}
    left = {layer: count / sum(macs.values()) for layer, count in macs.items() if layer not in integer}
    return dict(sorted(left.items(), key=lambda one: -one[1]))
