"""Whom a student learns from: a network, a function, a deeper part of itself; `itself` and `peer` have others."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.distillation.loss_terms import OUTPUT, Names
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.forward_capture import ForwardCall, ForwardCapture, get_submodule
from lightning_compress.nn.isolation import preserved_random_state

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


class Teacher:
    """What every teacher can do; each kind overrides what it does its own way."""

    module: nn.Module | None = None
    learns = False  # whether it is trained at the same time
    copies_student = False  # whether it is a copy of the module that follows its weights
    there = True  # whether it can teach; False until `snapshot` for one that a moment of the run makes

    def start(self, followed: Optimizer) -> None:
        """Be trained as `followed` trains the student."""

    def names_for(self, student: Names) -> Names:
        """The teacher's layers that are compared with these of the student, if nobody says which."""
        return student

    def student_layers(self, names: Names) -> Names:
        """The student's own layers that this teacher must see, if it is asked for these names."""
        return ()

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        """Get ready for a fit of `model`, which holds the student; `layers` are those that will be asked for."""

    def on_student_changed(self, student: nn.Module) -> None:
        """The student has been found in the model."""

    def snapshot(self) -> None:
        """Its moment has come: be what the student is now."""

    def teach(self, call: ForwardCall, step: "TeacherStep") -> dict[str, Any]:
        """What the layers, and the "output", give for what the student was given in `call`; without gradient."""
        raise NotImplementedError

    def learn(self, distilled: Callable[[dict[str, Any]], Tensor], alpha: float, share: float) -> None:
        """Learn from the student in turn, if this teacher does.

        Args:
            distilled: tells how far the teacher's own outputs are from the student's.
            alpha: share of that in the teacher's loss.
            share: of this batch in an optimizer step.
        """

    def after_step(self) -> None:
        """The student's weights have just changed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def on_channels_pruned(self, cut: Cut) -> None:
        """Channels of the student's model are gone: follow, if this teacher has its shapes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""


@dataclass(frozen=True)
class TeacherStep:
    """What a teacher may want to know of a training step beside the student's call.

    Args:
        args, kwargs: what training_step was given.
        number: optimizer steps done before.
        dry_run: whether nothing is learned from it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    number: int
    dry_run: bool = False

    def as_dry_run(self) -> "TeacherStep":
        """The same, for nothing."""
        return replace(self, dry_run=True)


class NetworkTeacher(Teacher):
    """A network of its own, which is only ever looked at: in eval mode, without gradients, outside the model.

    Args:
        module: the network; modes and device are put back when the fit ends.
        precision: "32", "bf16" or "16"; None: that of the run.
        device: where it computes; None: where the student does.
    """

    def __init__(
        self, module: nn.Module, precision: str | None = None, device: torch.device | str | None = None
    ) -> None:
        self.module, self.precision, self.device = module, precision, device
        self.capture = ForwardCapture(module)
        self._placed: torch.device | None = None

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        network = self._network
        check_not_shared(network, model)
        self._placed = None
        self.capture = ForwardCapture(network, (name for name in layers if name != OUTPUT))
        undo.callback(self.capture.remove)
        restore_modes(network, undo)
        network.eval()

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        device = torch.device(self.device) if self.device is not None else step.device
        self._place(device)
        args, kwargs = (call.args, call.kwargs) if device == step.device else _moved((call.args, call.kwargs), device)
        with torch.no_grad(), self._precision(device), self.capture.recording():
            output = self._network(*args, **kwargs)
            self.capture.add(ForwardCall(args, kwargs, output))
            (seen,) = self.capture.pop_calls()
        found = {OUTPUT: output, **seen.layers}
        return found if device == step.device else _moved(found, step.device)

    @property
    def _network(self) -> nn.Module:
        assert self.module is not None
        return self.module

    def _place(self, device: torch.device) -> None:
        """Move the network, unless it is there: to ask each of its parts at each step takes as long as a small one."""
        first = next(self._network.parameters(), None)
        if self._placed != device or (first is not None and first.device != device):
            self._network.to(device)
            self._placed = device

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        kind = PRECISIONS[self.precision]
        return torch.autocast(device.type, kind, enabled=kind is not torch.float32)


class FunctionTeacher(Teacher):
    """Any function of what the student is given; it is called without gradients, and has outputs only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        if others := [name for name in layers if name != OUTPUT]:
            raise ValueError(
                f"The teacher is a function, which has no layers to compare: {', '.join(others)}. Give a module."
            )

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        with torch.no_grad():
            return {OUTPUT: self.function(*call.args, **call.kwargs)}


class BranchTeacher(Teacher):
    """A deeper part of the student: what it gives in the same forward pass teaches a shallower one.

    Args:
        layer: of the model, whose output is the teacher's.

    Reference: Zhang et al., 2019, section 3.1, https://arxiv.org/abs/1905.08094
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def names_for(self, student: Names) -> Names:
        return (OUTPUT,)

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        for name in self.student_layers(tuple(layers)):
            get_submodule(model, name)  # refuses what is not there

    def student_layers(self, names: Names) -> Names:
        return tuple(self.layer if name == OUTPUT else name for name in names)

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        return {OUTPUT: call.layers.get(self.layer), **call.layers}


def check_not_shared(teacher: nn.Module, model: nn.Module) -> None:
    """Refuse a teacher that is part of the model, where it would be trained, saved and counted.

    Raises:
        ValueError: if it is.
    """
    mine = {id(one): name for name, one in model.named_parameters()}
    shared = [mine[id(one)] for one in teacher.parameters() if id(one) in mine]
    inside = [name for name, module in model.named_modules() if module is teacher]
    if shared or inside:
        where = f"as '{inside[0]}'" if inside else f"and shares {shared[0]}"
        raise ValueError(
            f"The teacher is inside the module that is trained, {where}: it would be optimized and saved with it. Keep "
            f"it outside, and hand it to Distillation alone; for a part of the student use BranchTeacher."
        )


def restore_modes(module: nn.Module, undo: ExitStack) -> None:
    """Promise that modes and devices will be as they are now."""
    modes = [(one, one.training) for one in module.modules()]
    first = next(iter(module.parameters()), None)
    device = None if first is None else first.device

    def back() -> None:
        for one, training in modes:
            one.training = training
        if device is not None:
            module.to(device)

    undo.callback(back)


def copied(module: nn.Module) -> nn.Module:
    """A copy of weights and structure without anybody's hooks, which may hold on to the original."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept: dict[int, Any] = {}
    for part in module.modules():
        kept |= {id(vars(part)[name]): type(vars(part)[name])() for name in hooks}
    with preserved_random_state():
        return copy.deepcopy(module, kept)


def load_teacher(path: str, teacher_class: Any) -> nn.Module:
    """Read a teacher from a checkpoint: Lightning's if the class can load one, else a state dict for `teacher_class()`.

    Raises:
        ValueError: if the checkpoint cannot be read without running code, or does not fit the class.
    """
    with preserved_random_state():
        try:
            if hasattr(teacher_class, "load_from_checkpoint"):
                return teacher_class.load_from_checkpoint(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
            state = torch.load(path, map_location="cpu", weights_only=True)
            module: nn.Module = teacher_class()
            module.load_state_dict(state.get("state_dict", state))
        except Exception as error:
            name = getattr(teacher_class, "__name__", teacher_class)
            raise ValueError(
                f"The teacher's checkpoint '{path}' does not load into {name}: {error}. Load it yourself, and hand the "
                f"module over: Distillation(teacher=module)."
            ) from error
    return module


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(one, device) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    if hasattr(value, "logits"):  # Hugging Face's outputs are mappings that are no dicts in every version
        return type(value)(**{key: _moved(one, device) for key, one in value.items()})
    return value
