"""Weights that are read elsewhere than in their layers' forward, where no hook puts them on a grid."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.nn.dataflow import Dataflow, Operation
from lightning_compress.quantization.layers import Layer
from lightning_compress.quantization.placement.operations import MOVES

TURNS = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__, Tensor.detach}  # type: ignore[attr-defined]
# To compute with a weight is to use it; to take its norm for a penalty is not.
COMPUTES = {
    functional.linear, functional.bilinear, functional.embedding, functional.embedding_bag, functional.conv1d,
    functional.conv2d, functional.conv3d, functional.conv_transpose1d, functional.conv_transpose2d,
    functional.conv_transpose3d, functional.multi_head_attention_forward, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.addmm,
}  # fmt: skip


def check_weight_reads(flow: Dataflow, layers: list[Layer]) -> None:
    """Refuse weights that the watched step also used outside of the layers that hold them.

    Raises:
        ValueError: if there is one; it is named.
    """
    holders: dict[str, list[str]] = {}
    for layer in layers:
        for weight_ref in layer.weights:
            holders.setdefault(weight_ref.name, []).append(f"{layer.name}.")
    for name, names in holders.items():
        for use in _uses(flow, flow.parameters.get(name, 0)):
            if not f"{use.module}.".startswith(tuple(names)):
                function = getattr(use.function, "__name__", use.function)
                where = f"in '{use.module}'" if use.module else "in the model's own forward or step"
                raise ValueError(
                    f"'{name}' is also used by {function} {where}, where it would stay in floating point. Let an "
                    f"nn.Linear, or another layer that is called, hold this parameter, or write ignore=['{name}']."
                )


def _uses(flow: Dataflow, value: int) -> list[Operation]:
    """Who computes with a value, turned about or not."""
    found = [use for use in flow.consumers_of(value) if use.function in COMPUTES]
    for use in flow.consumers_of(value):
        for output in use.outputs if use.function in MOVES or use.function in TURNS else ():
            found += _uses(flow, output)
    return found
