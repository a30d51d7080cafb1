"""What is compared with what, and by which loss: the `losses` of a distillation, read and checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import isclass, signature
from typing import Any

from torch import nn

from lightning_compress.core.registry import check_signature, find, in_snake_case, required_args
from lightning_compress.distillation import losses as known_losses

OUTPUT = "output"
MADE_OF = ("student_shape", "teacher_shape")

Names = tuple[str, ...]
LossSpec = Any  # a name, a function or a mapping of "loss", "weight" and options; or a mapping of layers to these


@dataclass(frozen=True)
class LossTerm:
    """One part of a distillation loss: layers of the student, layers of the teacher, and how they are compared.

    Args:
        student, teacher: layers by name; `teacher` None means the ones that the teacher calls the same.
        loss: a function of what `losses.OFFERED` names, or the class of a module that makes itself of two shapes.
        weight: by which its value is multiplied.
        options: what is handed to the loss beside what it asks for.
    """

    label: str
    student: Names
    teacher: Names | None
    loss: Callable[..., Any]
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether the loss has parameters of its own, and is made when the shapes are known."""
        return isclass(self.loss)

    @cached_property
    def parameters(self) -> dict[str, bool]:
        """The parameters of the loss by name, and whether it must be given them; looked up once, not at each step."""
        called: Any = self.loss.forward if self.learns else self.loss  # type: ignore[attr-defined]
        return {name: one.default is one.empty for name, one in signature(called).parameters.items()}


def parse_losses(losses: LossSpec) -> list[LossTerm]:
    """The terms that `losses` describes.

    Args:
        losses: one loss for the outputs, or a mapping of places to losses. A place is "output", a layer's name, a pair
            `(student's, teacher's)` of names or of tuples of names, or "student's -> teacher's". A loss is a name in
            `distillation.losses`, a dotted path, a function, or a mapping `{"loss": ..., "weight": 1.0, **options}`;
            a list of losses compares one place in several ways.

    Raises:
        ValueError: if a loss is unknown, asks for what is not there, or is told what it does not take.
    """
    places = losses if isinstance(losses, Mapping) and "loss" not in losses else {OUTPUT: losses}
    terms = [_term(place, spec) for place, several in places.items() for spec in _several(several)]
    if not terms:
        raise ValueError("losses is empty: name at least one, such as losses='kl_divergence'.")
    labels = [term.label for term in terms]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"losses says {', '.join(sorted(repeated))} twice: add their weights up.")
    return terms


def _several(spec: LossSpec) -> list[LossSpec]:
    return list(spec) if isinstance(spec, list) else [spec]


def _term(place: Any, spec: LossSpec) -> LossTerm:
    options = dict(spec) if isinstance(spec, Mapping) else {"loss": spec}
    if "loss" not in options:
        raise ValueError(
            f"The loss at {place!r} has no name: write {{'loss': 'attention_transfer', 'weight': 1000.0}}."
        )
    loss, weight = find(options.pop("loss"), known_losses, known_losses.RENAMED), options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise ValueError(f"The weight of the loss at {place!r} is a number of at least 0, but is {weight!r}.")
    student, teacher = _names(place)
    name = in_snake_case(getattr(loss, "__name__", type(loss).__name__))
    label = name if student == (OUTPUT,) else f"{'+'.join(student)}/{name}"
    term = LossTerm(label, student, teacher, loss, float(weight), options)
    _check(term, name)
    return term


def _check(term: LossTerm, name: str) -> None:
    if isclass(term.loss) and not issubclass(term.loss, nn.Module):
        raise ValueError(f"{name} is a class but no torch.nn.Module: a loss is a function, or a module of two shapes.")
    called: Any = term.loss.__init__ if term.learns else term.loss
    taken = set(signature(called).parameters) - {"self", *MADE_OF, *known_losses.OFFERED}
    if unknown := set(term.options) - taken:
        raise ValueError(
            f"{name} does not take {', '.join(sorted(unknown))}. Its options are {', '.join(sorted(taken)) or 'none'}."
        )
    if term.learns:
        missing = set(MADE_OF) - set(signature(called).parameters)
        if missing or required_args(called) - {"self", *MADE_OF, *term.options}:
            raise ValueError(f"{name} must be made of student_shape and teacher_shape, and of options with defaults.")
    else:
        check_signature(term.loss, (*known_losses.OFFERED, *term.options))


def _names(place: Any) -> tuple[Names, Names | None]:
    if isinstance(place, str) and "->" in place:
        place = tuple(part.strip() for part in place.split("->"))
    if isinstance(place, str):
        return (place,), None
    if isinstance(place, tuple) and len(place) == 2:
        student, teacher = (tuple(one) if isinstance(one, list | tuple) else (one,) for one in place)
        if student and teacher and all(isinstance(one, str) for one in student + teacher):
            return student, teacher
    raise ValueError(
        f"{place!r} is no place to compare. Write 'output', a layer's name, or a pair (student's, teacher's layer)."
    )
