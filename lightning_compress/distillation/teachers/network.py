"""Teachers with fixed weights: a network, a function, a deeper part of the student."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_compress.distillation.loss_terms import OUTPUT, Names
from lightning_compress.distillation.teachers.base import Teacher, TeacherStep
from lightning_compress.nn.forward_capture import ForwardCall, ForwardCapture, get_submodule
from lightning_compress.nn.isolation import preserved_random_state

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


class NetworkTeacher(Teacher):
    """A separate network, called in eval mode and without gradients.

    Args:
        module: the network, not part of the model; its modes and device are restored when the fit ends.
        precision: "32", "bf16" or "16"; None: the precision of the run.
        device: where it computes; None: on the student's device.

    >>> teacher, student = NetworkTeacher(nn.Dropout(p=0.5)), nn.Linear(3, 3)
    >>> call = ForwardCall(args=(torch.ones(1, 3),), kwargs={}, output=None)
    >>> with ExitStack() as undo:
    ...     teacher.attach(student, ["output"], undo)
    ...     outputs = teacher.teach(call, TeacherStep((), {}, torch.device("cpu"), number=0))
    >>> outputs["output"].tolist(), teacher.module.training  # no dropout in eval mode; training mode is restored
    ([[1.0, 1.0, 1.0]], True)
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
        """Move the network unless it is on the device: visiting all modules takes as long as a small forward pass."""
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
    """A function of the student's inputs, called without gradients; it has an output, but no layers.

    >>> teacher = FunctionTeacher(lambda inputs: 2 * inputs)
    >>> call = ForwardCall(args=(torch.tensor([3.0]),), kwargs={}, output=None)
    >>> teacher.teach(call, TeacherStep((), {}, torch.device("cpu"), number=0))
    {'output': tensor([6.])}
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        if others := [name for name in layers if name != OUTPUT]:
            raise ValueError(
                f"The teacher is a function, which has no layers to compare: {', '.join(others)}. Give a module as the "
                f"teacher, or compare 'output' only."
            )

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        with torch.no_grad():
            return {OUTPUT: self.function(*call.args, **call.kwargs)}


class BranchTeacher(Teacher):
    """A deep layer of the student teaches shallower layers in the same forward pass.

    Args:
        layer: name of the model's layer whose output is the teacher's output.

    Reference: Zhang et al., 2019, section 3.1, https://arxiv.org/abs/1905.08094

    >>> teacher = BranchTeacher("head")
    >>> logits = torch.zeros(1, 10)
    >>> call = ForwardCall(args=(), kwargs={}, output=logits, layers={"head": logits, "early_head": logits + 1})
    >>> teacher.teach(call, TeacherStep((), {}, torch.device("cpu"), number=0))["output"] is logits
    True
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def names_for(self, student: Names) -> Names:
        return (OUTPUT,)

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        for name in self.student_layers(tuple(layers)):
            get_submodule(model, name)  # raises if there is no such layer

    def student_layers(self, names: Names) -> Names:
        return tuple(self.layer if name == OUTPUT else name for name in names)

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        return {OUTPUT: call.layers.get(self.layer), **call.layers}


def check_not_shared(teacher: nn.Module, model: nn.Module) -> None:
    """Refuse a teacher that is part of the model, where it would be trained, saved and counted.

    Raises:
        ValueError: if the teacher is a submodule of the model, or shares parameters with it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> check_not_shared(nn.Linear(2, 1), model)
    >>> check_not_shared(model[1], model)
    Traceback (most recent call last):
    ValueError: The teacher is inside the module that is trained, as '1': ...
    """
    mine = {id(one): name for name, one in model.named_parameters()}
    shared = [mine[id(one)] for one in teacher.parameters() if id(one) in mine]
    inside = [name for name, module in model.named_modules() if module is teacher]
    if shared or inside:
        where = f"as '{inside[0]}'" if inside else f"and shares {shared[0]}"
        raise ValueError(
            f"The teacher is inside the module that is trained, {where}: it would be optimized and saved with it. Keep "
            f"the teacher outside the module, and pass it to Distillation only; if the teacher is a part of the "
            f"student, use BranchTeacher."
        )


def restore_modes(module: nn.Module, undo: ExitStack) -> None:
    """Restore training modes and the device of `module` when `undo` is closed.

    >>> module = nn.Dropout()
    >>> with ExitStack() as undo:
    ...     restore_modes(module, undo)
    ...     _ = module.eval()
    >>> module.training
    True
    """
    modes = [(one, one.training) for one in module.modules()]
    first = next(iter(module.parameters()), None)
    device = None if first is None else first.device

    def back() -> None:
        for one, training in modes:
            one.training = training
        if device is not None:
            module.to(device)

    undo.callback(back)


def copy_network(module: nn.Module) -> nn.Module:
    """Copy weights and structure, without any hooks: a hook may refer to the original module.

    >>> module = nn.Linear(2, 2)
    >>> _ = module.register_forward_hook(lambda *_: print("called"))
    >>> output = copy_network(module)(torch.zeros(1, 2))
    """
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

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     torch.save({"weight": torch.ones(1), "bias": torch.zeros(1)}, f"{folder}/teacher.pt")
    ...     teacher = load_teacher(f"{folder}/teacher.pt", lambda: nn.BatchNorm1d(1, track_running_stats=False))
    >>> teacher.weight.tolist()
    [1.0]
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
                f"The teacher's checkpoint '{path}' does not load into {name}: {error}. Load it yourself, and pass the "
                f"module: Distillation(teacher=module)."
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
    if hasattr(value, "logits"):  # in some versions Hugging Face's outputs are mappings, but no dicts
        return type(value)(**{key: _moved(one, device) for key, one in value.items()})
    return value
