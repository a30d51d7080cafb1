"""The environment variables by which a recipe joins the Trainers of a program."""

import os
from collections.abc import Sequence

VARIABLE = "LIGHTNING_COMPRESS_RECIPE"
SETTINGS = "LIGHTNING_COMPRESS_SET"


def recipe_variables(recipe: str, overrides: Sequence[str]) -> dict[str, str]:
    """The variables by which a recipe with overrides joins the Trainers of a program.

    Raises:
        ValueError: if an override has a semicolon or a line end, which part them there.
    """
    for setting in overrides:
        if ";" in setting or "\n" in setting:
            raise ValueError(f"{setting!r} has a semicolon or a line end, which {SETTINGS} cannot hold.")
    return {VARIABLE: recipe, SETTINGS: "; ".join(overrides)}


def overrides_in_environment() -> list[str]:
    """What `LIGHTNING_COMPRESS_SET` overrides, one setting each."""
    parts = os.environ.get(SETTINGS, "").replace("\n", ";").split(";")
    return [part.strip() for part in parts if part.strip()]
