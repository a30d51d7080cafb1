"""What the arguments of distillation must be like, checked before anything is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress.core.registry import find
from lightning_compress.distillation import losses
from lightning_compress.distillation.objective import WeightedTeacher
from lightning_compress.distillation.snapshots import is_self_teacher
from lightning_compress.distillation.teachers.base import Teacher
from lightning_compress.distillation.teachers.cached import CachedTeacher
from lightning_compress.distillation.teachers.network import PRECISIONS, FunctionTeacher, NetworkTeacher, load_teacher
from lightning_compress.distillation.teachers.self_teachers import SnapshotTeacher


def check_share(name: str, value: Any) -> float | None:
    """Return `value`, a fraction in [0, 1] or None.

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(
            f"{name} is the share of the distillation losses, in [0, 1], but is {value!r}: loss = (1 - alpha) * task + "
            f"alpha * distillation. To weigh one loss more, give it a weight: {{'loss': 'hint', 'weight': 100.0}}."
        )
    return float(value)


def check_temperature(name: str, value: Any) -> float | None:
    """Return `value`, above 0, or None.

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} divides the logits and is above 0, but is {value!r}. 1 changes nothing; 4 is usual.")
    return float(value)


def check_precision(precision: str | None) -> None:
    """Refuse an unknown precision.

    Raises:
        ValueError: if it is none of those in `teachers.PRECISIONS`.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"teacher_precision is {precision!r}. Write one of {', '.join(map(repr, PRECISIONS))}, or None."
        )


def check_several(teacher: Any, weights: Sequence[float] | None, classes: Sequence[Sequence[int]] | None) -> None:
    """Refuse weights or classes that are not one per teacher.

    Raises:
        ValueError: if their number differs from that of the teachers, or a weight is negative.
    """
    several = teacher if isinstance(teacher, list | tuple) else [teacher]
    if not several:
        raise ValueError("teacher is an empty list: give at least one teacher.")
    for name, given in (("teacher_weights", weights), ("teacher_classes", classes)):
        if given is not None and len(given) != len(several):
            raise ValueError(f"{name} has {len(given)} entries for {len(several)} teachers: give one for each.")
    if weights is not None and (any(one < 0 for one in weights) or sum(weights) <= 0):
        raise ValueError(f"teacher_weights are at least 0 and not all 0, but are {list(weights)}.")


def as_teacher_class(teacher_class: str | type | None) -> Any:
    """The class, or what a dotted path leads to; found at construction, where a recipe says what may be imported.

    Raises:
        ValueError: if there is no such class.
    """
    if teacher_class is None or not isinstance(teacher_class, str):
        return teacher_class
    if "." not in teacher_class:
        raise ValueError(f"teacher_class is {teacher_class!r}. Write where it is: 'my_package.{teacher_class}'.")
    return find(teacher_class, losses)


def as_weighted_teachers(distillation: Any) -> list[WeightedTeacher]:
    """The teachers that a `Distillation` was given, read from their checkpoints where they are paths.

    Raises:
        ValueError: if one cannot be a teacher.
    """
    given = distillation.teacher
    several = list(given) if isinstance(given, list | tuple) else [given]
    weights = distillation.teacher_weights or [1.0] * len(several)
    classes = distillation.teacher_classes or [None] * len(several)
    return [
        WeightedTeacher(
            _cached(_teacher(one, distillation), place, distillation), weight / sum(weights), own and tuple(own)
        )
        for place, (one, weight, own) in enumerate(zip(several, weights, classes, strict=True))
    ]


def _teacher(given: Any, distillation: Any) -> Teacher:
    network = {"precision": distillation.teacher_precision, "device": distillation.teacher_device}
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return NetworkTeacher(given, **network)
    if isinstance(given, str) and is_self_teacher(given):
        return SnapshotTeacher()
    if isinstance(given, str | Path):
        return NetworkTeacher(_loaded(Path(given), distillation.teacher_class), **network)
    if isinstance(given, Callable):  # type: ignore[arg-type]
        return FunctionTeacher(given)
    raise ValueError(
        f"teacher is {given!r}. Give a module, the path of a checkpoint with teacher_class=, 'self@10%', a function, "
        f"an AveragedTeacher, BranchTeacher or PeerTeacher, or a list of these."
    )


def _loaded(path: Path, teacher_class: Any) -> nn.Module:
    if not path.exists():
        beside = sorted(one.name for one in path.parent.glob("*.ckpt"))[:10] if path.parent.is_dir() else []
        there = f" In {path.parent} there are {', '.join(beside)}." if beside else ""
        raise ValueError(f"There is no teacher at '{path}'.{there} Train it first, or correct the path.")
    if teacher_class is None:
        raise ValueError(f"The teacher '{path}' is a checkpoint: say of which class it is, teacher_class=MyModule.")
    return load_teacher(str(path), teacher_class)


def _cached(teacher: Teacher, place: int, distillation: Any) -> Teacher:
    if distillation.cache is None:
        return teacher
    several = isinstance(distillation.teacher, list | tuple) and len(distillation.teacher) > 1
    folder = Path(distillation.cache)
    path = folder.with_name(f"{folder.name}-{place}") if several else folder
    return CachedTeacher(teacher, path, distillation.cache_form, distillation.output)
