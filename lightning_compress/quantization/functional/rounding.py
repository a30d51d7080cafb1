"""What every quantizer returns, and how a gradient comes through the rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
# Below it `1 / scale` would overflow float32, or a learned step could no longer come back.
SMALLEST_STEP = 1e-12


class Quantized(NamedTuple):
    """Numbers on a grid.

    Attributes:
        values: in the shape and precision of what was given; `values / scale + zero_point` are whole numbers.
        scale: the distance of neighbours, above 0, in float32; None if the values lie on no one such grid.
        zero_point: the whole number that stands for 0, as int32; None if `scale` is.

    >>> found = Quantized(torch.tensor([0.5, -1.0]), torch.tensor(0.5), torch.tensor(0))
    >>> found.values / found.scale
    tensor([ 1., -2.])
    """

    values: Tensor
    scale: Tensor | None
    zero_point: Tensor | None


def learns(**initial: Callable[[Tensor, int, int], Tensor]) -> Callable[[Function], Function]:
    """Mark a quantizer as one that learns: names of its learned tensors, and what each begins with.

    Each function is given `values` as a matrix `(rows, elements)`, `quant_min` and `quant_max`, and returns shape
    `(rows, 1)`.

    >>> @learns(step=lambda values, quant_min, quant_max: values.abs().amax(1, keepdim=True) / quant_max)
    ... def by_step(values, quant_max, step): ...
    >>> by_step.learned["step"](torch.tensor([[1.0, -14.0]]), -7, 7)
    tensor([[2.]])
    """

    def mark(function: Function) -> Function:
        function.learned = initial  # type: ignore[attr-defined]
        return function

    return mark


def for_sides(*kinds: str) -> Callable[[Function], Function]:
    """Mark for which kinds of formats a quantizer is: "integer", "ternary", "binary", "float".

    >>> @for_sides("integer")
    ... def rounded(values, scale): ...
    >>> rounded.kinds
    ('integer',)
    """

    def mark(function: Function) -> Function:
        function.kinds = kinds  # type: ignore[attr-defined]
        return function

    return mark


def bounds(bound: Callable[[int], float]) -> Callable[[Function], Function]:
    """Mark a quantizer whose weights are clipped after each update: to which size, by the largest whole number.

    >>> @bounds(lambda quant_max: 1.0)
    ... def clipped(values): ...
    >>> clipped.bound(7)
    1.0
    """

    def mark(function: Function) -> Function:
        function.bound = bound  # type: ignore[attr-defined]
        return function

    return mark


def code_range(ends: Callable[[int, int], tuple[int, int]], two_level: bool = False) -> Callable[[Function], Function]:
    """Mark an activation quantizer whose codes do not reach from `quant_min` to `quant_max`.

    Args:
        ends: smallest and largest code, `values / scale + zero_point`, of `quant_min` and `quant_max`.
        two_level: whether every value becomes one of the two.

    >>> @code_range(lambda quant_min, quant_max: (0, quant_max))
    ... def positive(values, quant_max): ...
    >>> positive.code_range(-8, 7), positive.two_level
    ((0, 7), False)
    """

    def mark(function: Function) -> Function:
        function.code_range, function.two_level = ends, two_level  # type: ignore[attr-defined]
        return function

    return mark


def straight_through(values: Tensor, result: Tensor, passes: Tensor | None = None) -> Tensor:
    """`result`, through which the gradient goes to `values` as if nothing had happened.

    Args:
        values: what was quantized.
        result: what it became, same shape; its own graph is cut.
        passes: what the gradient is multiplied with on its way, broadcast to the shape; None: 1.

    >>> values = torch.tensor([0.4, 2.6], requires_grad=True)
    >>> straight_through(values, values.round(), passes=values < 1).sum().backward()
    >>> values.grad
    tensor([1., 0.])
    """
    # Within a tuple: what is an argument itself would come back as a view, which nobody may change in place.
    kept: Tensor = _StraightThrough.apply(values, (result.detach().to(values.dtype),), passes)  # type: ignore[no-untyped-call]
    return kept


def symmetric_zero_point(scale: Tensor) -> Tensor:
    """The zero point of a grid that is symmetric around zero.

    >>> symmetric_zero_point(torch.tensor([[0.5], [0.25]]))
    tensor([[0],
            [0]], dtype=torch.int32)
    """
    return torch.zeros_like(scale, dtype=torch.int32)


def one_where_zero(scale: Tensor) -> Tensor:
    """The scale, and 1 where all values are zero.

    >>> one_where_zero(torch.tensor([0.0, 0.5]))
    tensor([1.0000, 0.5000])
    """
    return torch.where(scale == 0, 1.0, scale.clamp(min=SMALLEST_STEP))


def sign(values: Tensor) -> Tensor:
    """+1 for what is 0 or above, -1 for what is below; what is no number stays none.

    >>> sign(torch.tensor([-0.5, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    return torch.where(values < 0, -1.0, torch.where(values >= 0, 1.0, values))


def uniform_noise(values: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform random numbers in [0, 1), one for each of `values`.

    >>> noise = uniform_noise(torch.zeros(2, 3), torch.Generator().manual_seed(0))
    >>> noise.shape, bool((noise >= 0).all() and (noise < 1).all())
    (torch.Size([2, 3]), True)
    """
    return torch.rand(values.shape, generator=generator, device=generator.device).to(values.device)


def limits_around_zero(zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[Any, Any]:
    """The limits of `q - zero_point` for q in [quant_min, quant_max], as numbers where one zero point serves all.

    >>> limits_around_zero(torch.tensor(3), 0, 15)
    (-3, 12)
    """
    if zero_point.device.type != "cpu" or torch.compiler.is_compiling():
        return quant_min - zero_point, quant_max - zero_point  # to ask an accelerator for a number is to wait for it
    if zero_point.numel() == 1:
        return quant_min - int(zero_point), quant_max - int(zero_point)
    return (quant_min - zero_point, quant_max - zero_point) if zero_point.any() else (quant_min, quant_max)


def gradient_between_(gradient: Tensor, values: Tensor, lowest: Any, highest: Any) -> Tensor:
    """The gradient where `lowest < values < highest`, else 0, written over `values` if that is possible.

    Args:
        gradient, values: of one shape; no gradient comes to the values.
        lowest, highest: numbers, or tensors that broadcast to the shape.

    >>> gradient_between_(torch.ones(3), torch.tensor([-2.0, 0.0, 2.0]), -1, 1)
    tensor([0., 1., 0.])
    """
    # What is written over has no gradient of its own, which penalties of gradients ask for.
    kept = gradient.requires_grad or gradient.dtype != values.dtype
    if isinstance(lowest, Tensor) or kept or torch.compiler.is_compiling():
        between: Tensor = (values > lowest) & (values < highest)
        return gradient * between
    # On a CPU masks of booleans take many times as long as this operator, and so do new tensors of this size.
    written: Tensor = torch.ops.aten.hardtanh_backward.grad_input(gradient, values, lowest, highest, grad_input=values)
    return written


def scale_of_rows(values: Tensor, scale: float) -> Tensor:
    """The same scale for each row of a matrix, shape `(rows, 1)`.

    >>> scale_of_rows(torch.zeros(2, 5), 0.25)
    tensor([[0.2500],
            [0.2500]])
    """
    return torch.full((len(values), 1), scale, device=values.device)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, result: tuple[Tensor], passes: Tensor | None) -> Tensor:
        ctx.save_for_backward(passes)
        return result[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return (gradient if passes is None else (gradient * passes).to(gradient.dtype)), None, None
