"""What a quantizer remembers: ranges as buffers, what it learns as parameters; kept beside the user's model."""

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.formats import NumberFormat, Side, activation_format, read_format
from lightning_compress.quantization.functional.granularity import ChannelGroups
from lightning_compress.quantization.functional.quantizers.uniform import uniform
from lightning_compress.quantization.functional.ranges import RangeEstimator, affine_qparams, min_max
from lightning_compress.quantization.functional.rounding import Quantized


class QuantState:
    """What the quantizers of one model do at the moment.

    Attributes:
        enabled: whether the quantized phase has begun.
        fake_quant_enabled: whether values are put on their grids.
        observer_enabled: whether a batch of training is under way: ranges of activations follow what comes, and chance
            acts.
        observers_frozen: whether no range changes any more.
        step: what is drawn depends on it, and on a seed, alone.
    """

    def __init__(self) -> None:
        self.enabled, self.fake_quant_enabled, self.observer_enabled, self.observers_frozen = False, False, False, False
        self.step = 0

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Random numbers of a seed at this step: the same again if a forward is computed anew for its gradient."""
        return torch.Generator(device).manual_seed((seed * 1_000_003 + self.step) % 2**63)


class FakeQuantize(nn.Module):
    """A quantizer function with what it has learned and seen.

    Args:
        function: of `quantizers`, or one like those.
        form: the format of the values.
        mode: shared by all quantizers of a model.
        seed: of what it draws.
    """

    side: Side = "weights"
    scale: Tensor

    def change_format(self, form: NumberFormat) -> None:
        """Go over to another number of bits."""
        raise NotImplementedError

    def __init__(self, function: Callable[..., Quantized], form: NumberFormat, mode: QuantState, seed: int = 0) -> None:
        super().__init__()
        self.function, self.fmt, self.final, self.mode, self.seed = function, form, form, mode, seed
        self.quant_min, self.quant_max = form.quant_min, form.quant_max
        self.learned: dict[str, Callable[..., Tensor]] = getattr(function, "learned", {})
        # To look the names up at each call would take as long as a small operator.
        self.named = tuple(signature(function).parameters)
        self.train(False)

    def quantizer_state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        tensors = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        return {"tensors": tensors, "format": self.fmt.name}

    def load_quantizer_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave; its format may be one on the way to the final one."""
        if (form := read_format(state["format"], self.side)) is not None:
            self.change_format(form)
        self.load_state_dict(state["tensors"])

    @property
    def uses_observer(self) -> bool:
        """Whether its grid comes from a range that it watches."""
        return "scale" in self.named

    def move_qparams_to(self, device: torch.device) -> None:
        """Be where the model is: a Trainer brings it back from its accelerator in the end."""
        if self.scale.device != device:
            self.to(device)

    def quantized(self, values: Tensor, **offered: Any) -> Quantized:
        """`values` on the grid."""
        offered |= {"values": values, "quant_min": self.quant_min, "quant_max": self.quant_max, "dtype": self.fmt.dtype}
        offered |= {name: getattr(self, name) for name in self.learned}
        if "generator" in self.named:
            # What is drawn keeps training from a bias; what is deployed draws nothing.
            drawing = self.mode.observer_enabled
            offered["generator"] = self.mode.generator(self.seed, values.device) if drawing else None
        found: Quantized = self.function(**{name: offered[name] for name in self.named if name in offered})
        return found


class ConvertedWeight:
    """The grid of a weight that was put on it for good, so that it is not rounded a second time.

    Some quantizers would make other values of what they made themselves: DoReFa squashes weights by tanh, TTQ's
    threshold follows the largest weight.

    Args:
        rows: which weights share a scale.
        scale: of each row, `(rows, 1)`; None if there is no one grid.
        levels: the values that the weight has, where there is no scale; None in short floating point.
        dtype: of short floating point.
    """

    def __init__(
        self, rows: ChannelGroups, scale: Tensor | None, levels: Tensor | None, dtype: torch.dtype | None
    ) -> None:
        self.rows, self.scale, self.levels, self.dtype = rows, scale, levels, dtype
        self._seen: tuple[Any, ...] | None = None

    def holds(self, weight: Tensor) -> bool:
        """Whether the weight still lies on this grid: training, or loading, may have moved it."""
        if torch.compiler.is_compiling():
            return True
        seen = None if weight.is_inference() else (weight._version, weight.data_ptr(), weight.dtype)
        if seen is None or seen != self._seen:
            if not self._lies_there(weight.detach()):
                return False
            self._seen = seen
        return True

    def scale_on(self, device: torch.device) -> Tensor | None:
        """The scale, where the weight is now."""
        if self.scale is not None and self.scale.device != device:
            self.scale = self.scale.to(device)
        return self.scale

    def _lies_there(self, weight: Tensor) -> bool:
        if self.dtype is not None:
            return torch.equal(weight.to(self.dtype).to(weight.dtype), weight)
        if self.scale is None:
            return self.levels is not None and bool(torch.isin(weight, self.levels.to(weight)).all())
        matrix, scale = self.rows.split(weight), self.scale.to(weight.device)
        return torch.equal(((to_float32(matrix) / scale).round() * scale).to(weight.dtype), matrix)


class WeightFakeQuantize(FakeQuantize):
    """Puts a weight on its grid: each of its rows has a scale."""

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        rows: ChannelGroups,
        function: Callable[..., Quantized],
        form: NumberFormat,
        mode: QuantState,
        range_: RangeEstimator,
        symmetric: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(function, form, mode, seed)
        self.channel_groups, self.range, self.symmetric = rows, range_, symmetric
        count = len(rows.split(weight))
        self.register_buffer("scale", torch.ones(count, 1, dtype=torch.float32, device=weight.device))
        self.register_buffer("zero_point", torch.zeros(count, 1, dtype=torch.int32, device=weight.device))
        for name in self.learned:
            self.register_parameter(name, nn.Parameter(torch.ones(count, 1, dtype=torch.float32, device=weight.device)))
        self.converted: ConvertedWeight | None = None
        self.begin(weight)

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Begin anew with the weight as it is."""
        matrix = self.channel_groups.split(weight.detach())
        for name, initial in self.learned.items():
            self.get_parameter(name).copy_(initial(matrix.float(), self.quant_min, self.quant_max))
        self.observe(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        return self.on_grid(weight)[0]

    def on_grid(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight on its grid, and the scale of each row, if there is one grid."""
        self.move_qparams_to(weight.device)
        if self.converted is not None and self.converted.holds(weight):
            return weight, self.converted.scale_on(weight.device)
        matrix = self.channel_groups.split(weight)
        if self.uses_observer and not self.mode.observers_frozen:
            self.observe(matrix)
        values, scale, _ = self.quantized(matrix, scale=self.scale, zero_point=self.zero_point)
        return self.channel_groups.join(values), scale

    @torch.no_grad()
    def convert(self, weight: Tensor) -> None:
        """Put the weight itself on its grid; it is taken as it is for as long as it stays there."""
        values, scale = self.on_grid(weight)
        weight.copy_(values)
        levels = None if scale is not None or self.fmt.dtype is not None else torch.unique(weight)
        self.converted = ConvertedWeight(self.channel_groups, scale, levels, self.fmt.dtype)

    @torch.no_grad()
    def observe(self, matrix: Tensor) -> None:
        """Fit the scales to the weight as it is."""
        if self.uses_observer:
            minimum, maximum = self.range.estimate(
                matrix.detach(), dim=1, quant_min=self.quant_min, quant_max=self.quant_max
            )
            scale, zero_point = affine_qparams(minimum, maximum, self.quant_min, self.quant_max, self.symmetric)
            self.scale.copy_(scale)
            if not self.symmetric:
                self.zero_point.copy_(zero_point)

    @property
    def bound(self) -> float | None:
        """The largest size that the weight itself may have after an update, if its method has one."""
        bound: Callable[[int], float] | None = getattr(self.function, "bound", None)
        return None if bound is None else bound(self.quant_max)

    def invalid_reason(self) -> str | None:
        """Why no grid fits to the weight, if so."""
        steps = [self.scale, *self.parameters()]
        return None if all(bool(one.isfinite().all()) for one in steps) else "are not all finite"

    @torch.no_grad()
    def off_grid(self, weight: Tensor) -> Tensor:
        """How far the weight is from its place on the grid; 0 beyond the ends of the grid."""
        values, scale = self.on_grid(weight)
        if scale is None:
            return torch.zeros_like(weight)
        inside = (self.channel_groups.split(weight).abs() <= scale * max(self.quant_max, -self.quant_min)).to(
            weight.dtype
        )
        return (weight - values) * self.channel_groups.join(inside)

    @torch.no_grad()
    def change_format(self, form: NumberFormat) -> None:
        """Go over to another number of bits; a learned step keeps its range."""
        if "step" in self.learned and form.quant_max and self.quant_max:
            self.get_parameter("step").mul_(self.quant_max / form.quant_max)
        self.fmt, self.quant_min, self.quant_max = form, form.quant_min, form.quant_max


class ActivationFakeQuantize(FakeQuantize):
    """Puts what flows through a place on its grid, once it has seen what comes there.

    Attributes:
        started: whether it has seen anything but zeros.
        zeros: whether it has seen zeros, and nothing else yet.
        place: where that is, in words for errors.
    """

    place = "one place"
    minimum: Tensor
    maximum: Tensor
    scale: Tensor
    zero_point: Tensor
    side = "activations"

    def __init__(
        self,
        function: Callable[..., Quantized],
        form: NumberFormat,
        mode: QuantState,
        range_: RangeEstimator,
        non_negative: bool,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(function, form, mode, seed)
        self.range, self.non_negative, self.calibrated, self.zeros = range_, non_negative, False, False
        self._limit(form)
        # Where half or double precision is the default, ranges are still in single.
        for name in ("minimum", "maximum"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32, device=device))
        for name in self.learned:
            self.register_parameter(name, nn.Parameter(torch.ones((), dtype=torch.float32, device=device)))

    def forward(self, values: Tensor) -> Tensor:
        if values.is_nested:  # torch's encoder makes one of a padded batch, in evaluation
            return torch.nested.as_nested_tensor([self(one) for one in values.unbind()])
        if not values.is_floating_point() or not values.numel():
            return values
        self.move_qparams_to(values.device)
        if self.mode.observer_enabled and not self.mode.observers_frozen and not _is_backward():
            try:
                self.observe(values.detach())
            except ValueError as error:
                raise ValueError(f"The activations at {self.place} fit on no grid: {error}") from error
        return self.on_grid(values)[0] if self.calibrated and self.mode.fake_quant_enabled else values

    def on_grid(self, values: Tensor) -> Quantized:
        """What comes, on the grid."""
        return self.quantized(values, scale=self.scale, zero_point=self.zero_point)

    def invalid_reason(self, zeros: bool = True) -> str | None:
        """Why no grid fits to what has come, if so; `zeros`: whether nothing but those is a reason."""
        if not self.calibrated:
            return "are all zero" if zeros and self.zeros else None
        if not self.uses_observer:
            learned = [float(one.detach()) for one in self.parameters()]
            return None if all(map(math.isfinite, learned)) else f"have led to a step of {learned}"
        quant_min, quant_max = float(self.minimum), float(self.maximum)
        if not (math.isfinite(quant_min) and math.isfinite(quant_max)):
            return f"are not finite: they reach from {quant_min} to {quant_max}"
        return "are all zero" if zeros and quant_min == quant_max == 0 else None

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Let the range follow what comes; it, and what is learned, begin with the first that is not all zero."""
        if not self.calibrated and (self.uses_observer or self.learned) and not values.any():
            # Zeros lie on every such grid, and tell of none: states of a recurrence, and padding, begin with them.
            self.zeros = True
            return
        if self.uses_observer:
            found = self.range.estimate(values.float(), dim=None, quant_min=self.quant_min, quant_max=self.quant_max)
            if self.calibrated:
                found = self.range.join((self.minimum, self.maximum), found)
            self.minimum.copy_(found[0]), self.maximum.copy_(found[1])
            self.compute_qparams()
        if not self.calibrated:
            for name, initial in self.learned.items():
                row = values.float().reshape(1, -1)
                self.get_parameter(name).copy_(initial(row, self.quant_min, self.quant_max).reshape(()))
        self.calibrated, self.zeros = True, False

    @torch.no_grad()
    def compute_qparams(self) -> None:
        """Derive the grid from the range."""
        minimum = self.minimum.clamp(min=0.0) if self.non_negative else self.minimum
        scale, zero_point = affine_qparams(minimum, self.maximum, self.quant_min, self.quant_max, symmetric=False)
        self.scale.copy_(scale), self.zero_point.copy_(zero_point)

    def quantizer_state(self) -> dict[str, Any]:
        return {**super().quantizer_state(), "started": self.calibrated, "zeros": self.zeros}

    def load_quantizer_state(self, state: Mapping[str, Any]) -> None:
        super().load_quantizer_state(state)
        self.calibrated, self.zeros = bool(state["started"]), bool(state.get("zeros", False))

    def change_format(self, form: NumberFormat) -> None:
        """Go over to another number of bits; a learned step keeps its range."""
        before = self.quant_max
        self._limit(form)
        with torch.no_grad():
            if "step" in self.learned and self.quant_max and before:
                self.get_parameter("step").mul_(before / self.quant_max)
            if self.calibrated and self.uses_observer:
                self.compute_qparams()

    def _limit(self, form: NumberFormat) -> None:
        self.fmt, self.quant_min, self.quant_max = form, form.quant_min, form.quant_max
        # A learned step has no zero point beside it, so that signed values need a signed grid.
        if self.learned and not self.non_negative and form.quant_min == 0:
            half = (form.quant_max + 1) // 2
            self.quant_min, self.quant_max = -half, half - 1
        # Behind a ReLU levels below zero would be lost; and who rounds to whole numbers has but two of them in 0 and 1.
        elif form.kind == "ternary" and self.non_negative:
            self.quant_min, self.quant_max = 0, 2
        elif form.kind == "binary" and (self.non_negative or "quant_max" in self.named):
            self.quant_min = 0


class GateFakeQuantize(ActivationFakeQuantize):
    """Puts what a sigmoid makes on its grid, which is known: from 0 to 1."""

    def __init__(self, mode: QuantState, device: torch.device | None = None) -> None:
        form = activation_format(8)
        super().__init__(uniform, form, mode, RangeEstimator(min_max), non_negative=True, device=device)
        self.maximum.fill_(1.0)
        self.compute_qparams()
        self.calibrated = True

    def observe(self, values: Tensor) -> None:
        """Nothing that comes changes the grid."""
        self.calibrated = True


def _is_backward() -> bool:
    """Whether a checkpointed forward is computed a second time: then it must find what the first one found."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
