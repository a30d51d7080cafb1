"""What the shapes of student and teacher must share, checked at the door of each loss."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

Shape = Sequence[int]

_POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


def check_same(student: Tensor, teacher: Tensor) -> None:
    """Refuse shapes that differ.

    Raises:
        ValueError: naming both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{_both(student.shape, teacher.shape)}, but this loss compares them element by element. Choose outputs of "
            f"one shape, or a loss that does without, such as projected_hint or similarity_preserving for features."
        )


def check_batch(student: Shape, teacher: Shape, dimensions: Sequence[int] = ()) -> None:
    """Refuse shapes of different batches, or of other than the given numbers of dimensions; none given: any from 2.

    Raises:
        ValueError: naming both shapes.
    """
    if len(student) < 2 or len(teacher) < 2 or student[0] != teacher[0]:
        raise ValueError(f"{_both(student, teacher)}, but the first of two or more dimensions is the batch of both.")
    if dimensions and (len(student) != len(teacher) or len(student) not in dimensions):
        raise ValueError(f"{_both(student, teacher)}, but both need the same of {list(dimensions)} dimensions.")


def check_layers(student: Sequence[object], teacher: Sequence[object], number: int | None = None) -> None:
    """Refuse lists of layers of different lengths, or of another length than `number`.

    Raises:
        ValueError: naming both lengths.
    """
    if len(student) != len(teacher) or len(student) != (number or max(len(student), 1)):
        wanted = "as many of each, and at least one" if number is None else f"{number} of each"
        raise ValueError(f"student has {len(student)} layers and teacher {len(teacher)}, but this loss takes {wanted}.")


def check_labels(target: Tensor, student: Tensor) -> None:
    """Refuse what is no integer class label for each row of `student`, shape `(batch, classes)`.

    Raises:
        ValueError: naming both shapes.
    """
    if student.ndim != 2 or target.shape != student.shape[:1] or target.is_floating_point():
        raise ValueError(
            f"student has shape {tuple(student.shape)} and target {tuple(target.shape)} of {target.dtype}, but student "
            f"is (batch, classes), and target (batch,) of integer class labels."
        )


def pool_to_same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Average both over space, shape `(batch, channels, *space)`, until each axis has the smaller size of the two."""
    size = [min(pair) for pair in zip(one.shape[2:], other.shape[2:], strict=True)]
    return _pooled(one, size), _pooled(other, size)


def _pooled(features: Tensor, size: list[int]) -> Tensor:
    return features if list(features.shape[2:]) == size else _POOLS[len(size)](features, size)


def _both(student: Shape, teacher: Shape) -> str:
    return f"student has shape {tuple(student)} and teacher {tuple(teacher)}"
