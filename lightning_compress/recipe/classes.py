"""Which class a name in a recipe stands for: ours, a few of Lightning's, and those that the user allows.

Nothing else is imported, so that a recipe which somebody else wrote cannot decide which code runs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, isclass, signature
from typing import Any

from lightning_compress.core import schedules
from lightning_compress.core.registry import near_miss, path_matches, refuse_from_elsewhere

PACKAGE = "lightning_compress"
LIGHTNING_NAMES = ("pytorch_lightning", "lightning.pytorch")
OF_LIGHTNING = {
    "EarlyStopping": "callbacks",
    "LearningRateMonitor": "callbacks",
    "ModelCheckpoint": "callbacks",
    "CSVLogger": "loggers",
    "TensorBoardLogger": "loggers",
    "WandbLogger": "loggers",
}


def allowed_by_environment() -> tuple[str, ...]:
    """The names in `LIGHTNING_COMPRESS_ALLOW`, separated by commas."""
    names = os.environ.get("LIGHTNING_COMPRESS_ALLOW", "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def installed_lightning() -> str:
    """The first Lightning that is installed.

    Raises:
        ModuleNotFoundError: if none is.
    """
    for name in LIGHTNING_NAMES:
        if find_spec(name.partition(".")[0]) is not None:
            return name
    raise ModuleNotFoundError("lightning_compress needs Lightning: pip install pytorch-lightning")


def lightning_of(cls: type[Any]) -> str:
    """The Lightning that a user's module or callback is written for; the first installed one if it serves both."""
    roots = {base.__module__.partition(".")[0] for base in cls.__mro__}
    names = [name for name in LIGHTNING_NAMES if name.partition(".")[0] in roots]
    return names[0] if len(names) == 1 else installed_lightning()


def is_callback(cls: type[Any]) -> bool:
    """Whether `cls` is a callback of either Lightning."""
    roots = tuple(f"{name.partition('.')[0]}." for name in LIGHTNING_NAMES)
    return any(base.__name__ == "Callback" and base.__module__.startswith(roots) for base in cls.__mro__)


def arguments_of(cls: type[Any]) -> Mapping[str, Parameter] | None:
    """What the constructor takes by name; None if it takes anything."""
    try:
        parameters = signature(cls).parameters
    except ValueError:  # classes written in C tell nothing
        return None
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in by_name}


@dataclass(frozen=True)
class Classes:
    """The classes a recipe may name.

    Args:
        allow: dotted paths of the user's, with `*` wildcards.
        lightning: whose `ModelCheckpoint` and the like to take: "pytorch_lightning" or "lightning.pytorch".
    """

    allow: tuple[str, ...]
    lightning: str

    def find(self, name: object) -> type[Any]:
        """Return the class of a short name or a dotted path.

        Raises:
            ValueError: if there is none, or it is not allowed; the message has the nearest name.
        """
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is not the name of a class.")
        found = self._ours(name) or self._of_lightning(name) or self._allowed(name)
        if found is not None:
            return found
        if name.partition(".")[0] == PACKAGE or "." not in name:
            short = name.rpartition(".")[2]
            raise ValueError(f"unknown class '{name}'.{near_miss(short, [*_public_names(), *OF_LIGHTNING])}")
        raise ValueError(
            f"the class '{name}' is not allowed here. If you trust it, say so: allow=['{name}'], --allow {name} or "
            f"LIGHTNING_COMPRESS_ALLOW={name}."
        )

    def _ours(self, name: str) -> type[Any] | None:
        path, _, short = name.rpartition(".")
        if path.startswith(f"{PACKAGE}.recipes."):
            return _of_recipes(path, short)
        package = import_module(PACKAGE)
        found = getattr(package, short) if short in package.__all__ else getattr(schedules, short, None)
        if not isclass(found) or not found.__module__.startswith(f"{PACKAGE}."):
            return None
        return found if path in ("", PACKAGE, found.__module__) else None

    def _of_lightning(self, name: str) -> type[Any] | None:
        path, _, short = name.rpartition(".")
        folder = OF_LIGHTNING.get(short)
        if folder is None or path not in ("", *(f"{root}.{folder}" for root in LIGHTNING_NAMES)):
            return None
        return getattr(import_module(f"{self.lightning}.{folder}"), short)  # type: ignore[no-any-return]

    def _allowed(self, name: str) -> type[Any] | None:
        if "." not in name or not path_matches(name, self.allow):
            return None
        path, _, short = name.rpartition(".")
        try:
            found = getattr(import_module(path), short)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the class '{name}' cannot be imported: {error}.") from error
        if not isclass(found):
            raise ValueError(f"'{name}' is no class, but a {type(found).__name__}.")
        refuse_from_elsewhere(name, found, self.allow)
        return found


def _public_names() -> list[str]:
    package = import_module(PACKAGE)
    return [name for name in package.__all__ if name[:1].isupper()]


def _of_recipes(path: str, short: str) -> type[Any]:
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if not path.startswith(error.name or " "):
            raise
        raise ValueError(f"there is no module '{path}'.") from error
    public = [name for name, member in vars(module).items() if isclass(member) and member.__module__ == path]
    if short not in public or short.startswith("_"):
        raise ValueError(f"unknown class '{path}.{short}'.{near_miss(short, public)}")
    return getattr(module, short)  # type: ignore[no-any-return]
