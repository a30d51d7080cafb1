"""The distillation loss of one step: each term of each teacher, and the modules of those losses that learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.batch_fields import Key, select_tensor
from lightning_compress.distillation.loss_terms import OUTPUT, LossTerm, Names
from lightning_compress.distillation.teachers.base import Teacher
from lightning_compress.nn.forward_capture import ForwardCall
from lightning_compress.nn.isolation import preserved_random_state


@dataclass(frozen=True)
class LossContext:
    """What all losses of one call of the student are offered beside the two outputs."""

    temperature: float
    target: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class WeightedTeacher:
    """A teacher, how much it counts, and what it is asked about.

    Args:
        classes: the classes it knows, in the order of its outputs; None: all of the student's.
    """

    teacher: Teacher
    weight: float = 1.0
    classes: tuple[int, ...] | None = None

    def names(self, term: LossTerm) -> Names:
        """The teacher's layers of a term."""
        return self.teacher.names_for(term.student) if term.teacher is None else term.teacher


class DistillationObjective:
    """Every term of every teacher.

    Args:
        terms, tutors: what is compared, and with whom.
        output: which part of an output holds the logits, see `batch_fields.select_tensor`.
        seed: of the modules of losses that learn.
    """

    def __init__(
        self, terms: Sequence[LossTerm], tutors: Sequence[WeightedTeacher], output: Key | None = None, seed: int = 0
    ) -> None:
        self.terms, self.tutors, self.output, self.seed = list(terms), list(tutors), output, seed
        self.learned = nn.ModuleDict()

    def student_layers(self) -> list[str]:
        """The student's layers that are needed, by name."""
        names = [name for term in self.terms for name in term.student]
        for tutor in self.tutors:
            names += [name for term in self.terms for name in tutor.teacher.student_layers(tutor.names(term))]
        return [name for name in dict.fromkeys(names) if name != OUTPUT]

    def teacher_layers(self, tutor: WeightedTeacher) -> list[str]:
        """The names that a teacher is asked for."""
        return list(dict.fromkeys(name for term in self.terms for name in tutor.names(term)))

    def asks_for(self, name: str) -> bool:
        """Whether a loss needs `name`, or a teacher does that knows some of the classes only."""
        grouped = name == "target" and any(tutor.classes is not None for tutor in self.tutors)
        return grouped or any(name in term.parameters for term in self.terms)

    def build(self, call: ForwardCall, taught: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Make the modules of losses that learn, of the shapes at hand; the user's random stream stays where it is."""
        with preserved_random_state():
            torch.manual_seed(self.seed)
            for place, (tutor, outputs) in enumerate(zip(self.tutors, taught, strict=True)):
                for number, term in enumerate(self.terms):
                    if term.learns:
                        student, teacher = self._pair(term, tutor, recorded_outputs(call), outputs)
                        module = term.loss(_shape(student), _shape(teacher), **term.options)
                        self.learned[f"{place}_{number}"] = module.to(device)

    def __call__(
        self, student: Mapping[str, Any], taught: Sequence[Mapping[str, Any]], lesson: LossContext
    ) -> dict[str, Tensor]:
        """Each term's value, already multiplied by its own weight and its teacher's."""
        values: dict[str, Tensor] = {}
        for place, (tutor, outputs) in enumerate(zip(self.tutors, taught, strict=True)):
            for number, term in enumerate(self.terms):
                value = self._value(term, tutor, f"{place}_{number}", student, outputs, lesson)
                if (weight := term.weight * tutor.weight) != 1.0:
                    value = weight * value
                label = term.label if len(self.tutors) == 1 else f"{term.label}/teacher_{place}"
                values[label] = value
        return values

    def _value(
        self,
        term: LossTerm,
        tutor: WeightedTeacher,
        key: str,
        student: Mapping[str, Any],
        taught: Mapping[str, Any],
        lesson: LossContext,
    ) -> Tensor:
        ours, theirs = self._pair(term, tutor, student, taught)
        target = lesson.target
        if tutor.classes is not None and term.student == (OUTPUT,):
            ours, theirs, target = select_classes(ours, theirs, target, tutor.classes)
            if not len(ours):
                return ours.sum()  # no sample of this teacher's: nothing to learn, but a place in the graph
        offered = {"temperature": lesson.temperature, "target": target, "mask": lesson.mask}
        present = {name: value for name, value in offered.items() if value is not None}
        if missing := [name for name in ("target", "mask") if term.parameters.get(name) and name not in present]:
            raise ValueError(
                f"The loss '{term.label}' asks for '{missing[0]}', which this batch does not show. Say where it is: "
                f"{missing[0]}=1, {missing[0]}='labels', or a function of the batch."
            )
        called, options = (self.learned[key].forward, {}) if term.learns else (term.loss, term.options)
        offered = {"student": ours, "teacher": theirs, **present, **options}
        return _scalar(called(**{name: offered[name] for name in term.parameters if name in offered}), term)

    def _pair(
        self, term: LossTerm, tutor: WeightedTeacher, student: Mapping[str, Any], taught: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        names = tutor.names(term)
        ours = [self._tensor(name, student, "student") for name in term.student]
        theirs = [self._tensor(name, taught, "teacher") for name in names]
        return (ours[0], theirs[0]) if len(ours) == len(theirs) == 1 else (ours, theirs)

    def _tensor(self, name: str, outputs: Mapping[str, Any], who: str) -> Tensor:
        if outputs.get(name) is None:
            raise ValueError(
                f"The {who}'s layer '{name}' gave nothing: it was not called in the forward pass, or not as a module. "
                f"Choose a layer that is called, such as one of those inside it."
            )
        found = select_tensor(outputs[name], self.output if name == OUTPUT else None)
        return found if who == "student" else found.detach()


def recorded_outputs(call: ForwardCall) -> dict[str, Any]:
    """What a student gave in one call, by name."""
    return {OUTPUT: call.output, **call.layers}


def weighted_sum(values: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms."""
    first, *others = values.values()
    for value in others:
        first = first + value
    return first


def select_classes(
    student: Tensor, teacher: Tensor, target: Tensor | None, classes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Restrict logits to the classes that a teacher knows, and to the samples that belong to them.

    Raises:
        ValueError: if there are no labels to tell which samples these are.
    """
    if target is None:
        raise ValueError("teacher_classes needs the labels, to ask each teacher about its own samples: name target=.")
    known = torch.tensor(classes, device=target.device)
    places = target.unsqueeze(-1) == known
    rows = places.any(-1)
    return student[rows][:, list(classes)], teacher[rows], places[rows].int().argmax(-1)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else [tuple(one.shape) for one in value]


def _scalar(value: Any, term: LossTerm) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"The loss '{term.label}' returned {shown}, but a loss is a scalar tensor: take its mean.")
    return value
