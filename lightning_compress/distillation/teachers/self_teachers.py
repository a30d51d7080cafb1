"""Teachers made of the student itself: an average of its weights, or a snapshot of them."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.loss_terms import OUTPUT
from lightning_compress.distillation.teachers.base import Teacher, TeacherStep
from lightning_compress.distillation.teachers.network import copy_network
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.forward_capture import ForwardCall, ForwardCapture
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.surgery import cut_model, reshape_model, tensors_by_name


class SelfTeacher(Teacher):
    """A copy of the student's model in eval mode, outside the model; subclasses decide which weights the copy has.

    >>> model, teacher = nn.Sequential(nn.Linear(2, 1), nn.Dropout()), SelfTeacher()
    >>> with ExitStack() as undo:
    ...     teacher.attach(model, ["output"], undo)
    ...     teacher.on_student_changed(model)
    >>> bool((teacher.module[0].weight == model[0].weight).all()), teacher.module[1].training
    (True, False)
    """

    copies_student = True

    def __init__(self) -> None:
        self.module = None
        self._copies: nn.Module | None = None

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        self._model, self._layers = model, list(layers)
        self._copies = copy_network(model).eval().requires_grad_(False)

    def on_student_changed(self, student: nn.Module) -> None:
        name = next(name for name, module in self._model.named_modules() if module is student)
        self.module = self._model_copy.get_submodule(name)
        self._capture = ForwardCapture(self._model_copy, (one for one in self._layers if one != OUTPUT))

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        assert self.module is not None
        with torch.no_grad(), self._capture.recording():
            output = self.module(*call.args, **call.kwargs)
            self._capture.add(ForwardCall(call.args, call.kwargs, output))
            (seen,) = self._capture.pop_calls()
        return {OUTPUT: output, **seen.layers}

    def on_channels_pruned(self, cut: Cut) -> None:
        cut_model(self._model_copy, cut)

    @property
    def _model_copy(self) -> nn.Module:
        assert self._copies is not None
        return self._copies


class AveragedTeacher(SelfTeacher):
    """The exponential moving average of the student's weights teaches the student ("mean teacher").

    Args:
        decay: in [0, 1): share of the average that is kept at each optimizer step.

    Raises:
        ValueError: if `decay` is not in [0, 1).

    Reference: Tarvainen & Valpola, 2017, section 2, https://arxiv.org/abs/1703.01780

    >>> model, teacher = nn.Linear(1, 1, bias=False), AveragedTeacher(decay=0.75)
    >>> _ = nn.init.constant_(model.weight, 4.0)
    >>> with ExitStack() as undo:
    ...     teacher.attach(model, ["output"], undo)
    ...     teacher.on_student_changed(model)
    ...     _ = nn.init.constant_(model.weight, 8.0)  # an optimizer step
    ...     teacher.after_step()
    >>> teacher.module.weight.item()  # 0.75 * 4 + 0.25 * 8
    5.0
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is in [0, 1), but is {decay}. For an average over 1,000 steps write 0.999.")
        super().__init__()
        self.decay = decay

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        super().attach(model, layers, undo)
        self._pairs = _pairs(self._model_copy, model)

    @torch.no_grad()
    def after_step(self) -> None:
        for average, now in self._pairs:
            if average.is_floating_point():
                average.lerp_(now.to(average.dtype), 1.0 - self.decay)
            else:
                average.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in self._model_copy.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._model_copy.load_state_dict(state)


class SnapshotTeacher(SelfTeacher):
    """The student's weights at one step of this run teach it from then on; `snapshot` copies them.

    The copy computes in floating point, even while the student is quantized, and keeps channels that are pruned from
    the student later.

    >>> model, teacher = nn.Linear(1, 1, bias=False), SnapshotTeacher()
    >>> with ExitStack() as undo:
    ...     teacher.attach(model, ["output"], undo)
    ...     teacher.on_student_changed(model)
    ...     _ = nn.init.constant_(model.weight, 8.0)
    ...     teacher.snapshot()
    ...     _ = nn.init.constant_(model.weight, 9.0)
    >>> teacher.ready, teacher.module.weight.item()
    (True, 8.0)
    """

    ready = False

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        super().attach(model, layers, undo)
        self.ready, self._lost = False, Cut()

    @torch.no_grad()
    def snapshot(self) -> None:
        now, mine = _tensors(self._model), _tensors(self._model_copy)
        if changed := [name for name in now.keys() | mine.keys() if _shape(now, name) != _shape(mine, name)]:
            raise ValueError(
                f"The module cannot be its own teacher: {', '.join(sorted(changed)[:8])} came, went or changed shape "
                f"since the fit began. Build all layers before the fit, or take the snapshot at its beginning: "
                f"'self@0%'."
            )
        for name, value in now.items():
            mine[name].copy_(value)
        self.ready = True

    def on_channels_pruned(self, cut: Cut) -> None:
        if self.ready:
            self._lost = cut.composed_with(self._lost)
        else:
            super().on_channels_pruned(cut)

    def state_dict(self) -> dict[str, Any]:
        if not self.ready:
            return {}
        weights = {name: value.detach().cpu() for name, value in _tensors(self._model_copy).items()}
        return {"weights": weights, "lost": self._lost.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        # The copy was made of the resumed module, which may have lost channels after the snapshot was taken.
        self._lost = Cut.from_state_dict(state["lost"])
        reshape_model(self._model_copy, state["weights"], Cut(), self._lost)
        for name, value in tensors_by_name(self._model_copy, state["weights"]).items():
            value.copy_(state["weights"][name])
        self.ready = True


def _pairs(copies: nn.Module, model: nn.Module) -> list[tuple[Any, Any]]:
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    average = dict(copies.named_parameters()) | dict(copies.named_buffers())
    return [(average[name], now[name]) for name in now]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones included, by each of their names."""
    parameters, buffers = (of(remove_duplicate=False) for of in (model.named_parameters, model.named_buffers))
    return {canonical_name(name): value for pairs in (parameters, buffers) for name, value in pairs}


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
