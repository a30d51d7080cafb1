"""Let a recipe join any Trainer, its script unchanged: `LIGHTNING_COMPRESS_RECIPE=recipe.yaml python train.py`.

Lightning calls one of these functions for every new Trainer, through the entry points of `setup.py`. All imports wait
until the variable is set: a Trainer that is not to be compressed pays nothing.
"""

import os
from functools import cache
from typing import Any

VARIABLE = "LIGHTNING_COMPRESS_RECIPE"


def callbacks_from_environment(lightning: str | None = None) -> list[Any]:
    """Make the callbacks of the recipe that `LIGHTNING_COMPRESS_RECIPE` names, a path or a ready recipe's name.

    Args:
        lightning: which Lightning asks, "pytorch_lightning" or "lightning.pytorch"; by default the first installed one.

    Returns:
        New callbacks at each call; none if the variable is not set.

    Raises:
        FileNotFoundError, ValueError: if the recipe is not there, or is not right.
    """
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        return []
    from lightning_compress.recipe import Recipe
    from lightning_compress.recipe.sections import JOINING
    from lightning_compress.recipe.shipped import locate

    try:
        recipe = Recipe.load(locate(name), sections=JOINING)
        _say_once(name, recipe.left_out)
        return recipe.callbacks(lightning)
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{VARIABLE}={name}: {error}") from error


def for_pytorch_lightning() -> list[Any]:
    """The entry point of the group `pytorch_lightning.callbacks_factory`."""
    return callbacks_from_environment("pytorch_lightning")


def for_lightning() -> list[Any]:
    """The entry point of the group `lightning.pytorch.callbacks_factory`."""
    return callbacks_from_environment("lightning.pytorch")


@cache
def _say_once(name: str, unused: tuple[str, ...]) -> None:
    from lightning_compress._lightning import rank_zero_info

    rest = f" Its {', '.join(unused)} stay unused: those of your script are taken." if unused else ""
    rank_zero_info(f"lightning_compress: the callbacks of {name} join this run, as {VARIABLE} says.{rest}")
