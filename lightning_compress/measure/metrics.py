"""What compression has reached, as torchmetrics: for `self.log`, a `MetricCollection`, or any loop.

Each tells of the model at its last `update`, not of an average over updates: sparsity is a state of the model, not of
the data. Over several processes that each hold the whole model the value is that of one of them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_compress.measure.sparse_encoding import as_float32, encoded_size_bytes
from lightning_compress.measure.stored_tensors import identity, nonzero_count, stored_tensors

Model = nn.Module | Tensor | Iterable[Tensor]


class _OfModel(Metric):
    """Update takes a module, a tensor or tensors; subclasses keep int64 states that are overwritten by each update."""

    is_differentiable = False
    full_state_update = True

    def forward(self, model: Model) -> Any:
        # torchmetrics walks the arguments twice, and a generator ends after the first time.
        return super().forward(model if isinstance(model, nn.Module) else _tensors(model))


class Sparsity(_OfModel):
    """Fraction of elements that are exactly zero, in [0, 1]; -0.0 is zero.

    Over all parameters of the module, tied ones once, biases and frozen ones too, but no buffers; or over all given
    tensors. `Sparsity(min_dimensions=2)` leaves out what has fewer dimensions: biases and normalisation.

    >>> layer = nn.Linear(3, 2)
    >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]])
    >>> Sparsity(min_dimensions=2)(layer)
    tensor(0.5000)

    Raises:
        ValueError: if there is no element to count.
    """

    higher_is_better = True
    zeros: Tensor
    elements: Tensor

    def __init__(self, min_dimensions: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_dimensions = min_dimensions
        self.add_state("zeros", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("elements", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, model: Model) -> None:
        tensors = [tensor for tensor in _tensors(model) if tensor.ndim >= self.min_dimensions]
        elements = sum(tensor.numel() for tensor in tensors)
        if not elements:
            raise ValueError(
                f"Sparsity needs elements, but there is no tensor of {self.min_dimensions} or more dimensions. Give a "
                f"module or a list of tensors (a generator can be walked only once), or lower min_dimensions."
            )
        self.elements = torch.tensor(elements, device=self.device)
        self.zeros = self.elements - _nonzeros(tensors, self.device)

    def compute(self) -> Tensor:
        return self.zeros / self.elements


class NonzeroParameters(_OfModel):
    """How many elements are not exactly zero, of the same tensors as `Sparsity` counts.

    >>> NonzeroParameters()(torch.tensor([0.0, 1.0, -0.0, 2.0]))
    tensor(2)
    """

    higher_is_better = False
    nonzeros: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nonzeros", torch.tensor(0), dist_reduce_fx="max")

    def update(self, model: Model) -> None:
        self.nonzeros = _nonzeros(_tensors(model), self.device)

    def compute(self) -> Tensor:
        return self.nonzeros


class CompressionRatio(_OfModel):
    """Bytes of the dense fp32 file over bytes of the sparse-coded file, not a ratio of parameter counts.

    Both files hold names, shapes, all parameters and persistent buffers, tied ones once (`measure.sparse_encoding`). An
    update writes no file but looks at every weight, about a second for 25 million: log it once an epoch.

    >>> layer = nn.Linear(100, 100)
    >>> layer.weight.data[:, 50:] = 0.0
    >>> 1.8 < CompressionRatio()(layer) < 2.0  # half of the weights, and a bit for the place of each
    tensor(True)
    """

    higher_is_better = True
    dense_bytes: Tensor
    coded_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("dense_bytes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("coded_bytes", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, model: Model) -> None:
        named = _named(model)
        dense_bytes = encoded_size_bytes(as_float32(named), sparse=False)
        self.dense_bytes = torch.tensor(dense_bytes, device=self.device)
        self.coded_bytes = torch.tensor(encoded_size_bytes(named), device=self.device)

    def compute(self) -> Tensor:
        return self.dense_bytes / self.coded_bytes


def _named(model: Model) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return {one.name: one.tensor for one in stored_tensors(model)}
    return {str(place): tensor for place, tensor in enumerate(_tensors(model))}


def _tensors(model: Model) -> list[Tensor]:
    """Each parameter or tensor once.

    Raises:
        TypeError: if `model` is neither a module nor tensors.
        ValueError: if a parameter has no values to count.
    """
    if isinstance(model, nn.Module):
        return [one.tensor for one in stored_tensors(model) if one.is_parameter and not one.tied]
    tensors = [model] if isinstance(model, Tensor) else list(model)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Give a module, a tensor or a list of tensors, not a {type(tensor).__name__} in a list.")
    return list({identity(tensor): tensor for tensor in tensors}.values())


def _nonzeros(tensors: list[Tensor], device: torch.device) -> Tensor:
    counts = [nonzero_count(tensor).to(device) for tensor in tensors]
    return torch.stack(counts).sum() if counts else torch.tensor(0, device=device)


class Agreement(Metric):
    """Fraction of samples for which two networks name the same class, in [0, 1].

    >>> Agreement()(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.4, 0.6], [0.3, 0.7]]))
    tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    agreed: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreed", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Count one batch of logits, shape `(batch, ..., classes)` each.

        Raises:
            ValueError: if the shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"Logits have shapes {tuple(student.shape)} and {tuple(teacher.shape)}: compare equal ones."
            )
        same = student.argmax(-1) == teacher.argmax(-1)
        self.agreed += same.sum()
        self.samples += same.numel()

    def compute(self) -> Tensor:
        return self.agreed / self.samples
