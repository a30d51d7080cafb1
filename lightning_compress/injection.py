"""Let a recipe join any Trainer, its script unchanged: `LIGHTNING_COMPRESS_RECIPE=recipe.yaml python train.py`.

`LIGHTNING_COMPRESS_SET="pruning.final_sparsity=0.95; pruning.end=50%"` changes it, as `--set` does for the command.

Lightning calls one of these functions for every new Trainer, through the entry points of `setup.py`.
"""

import os
from functools import cache
from typing import Any

from lightning_compress._lightning import rank_zero_info
from lightning_compress.recipe.builtin import find_recipe
from lightning_compress.recipe.environment import SETTINGS, VARIABLE, overrides_in_environment
from lightning_compress.recipe.recipe import Recipe
from lightning_compress.recipe.sections import JOINING


def callbacks_from_environment(lightning: str | None = None) -> list[Any]:
    """Make the callbacks of the recipe that `LIGHTNING_COMPRESS_RECIPE` names, a path or a ready recipe's name.

    What `LIGHTNING_COMPRESS_SET` overrides is parted by semicolons or line ends; no value can hold these.

    Args:
        lightning: which Lightning asks, "pytorch_lightning" or "lightning.pytorch"; by default the first installed one.

    Returns:
        New callbacks at each call; none if the variable is not set.

    Raises:
        FileNotFoundError, ValueError: if the recipe is not there, or is not right, or overrides have no recipe.
    """
    name, overrides = os.environ.get(VARIABLE, "").strip(), overrides_in_environment()
    if not name and overrides:
        raise ValueError(f"{SETTINGS}={'; '.join(overrides)} changes a recipe: name it by {VARIABLE}, or unset this.")
    if not name:
        return []
    try:
        recipe = Recipe.load(find_recipe(name), overrides=overrides, sections=JOINING)
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
    rest = f" Its {', '.join(unused)} stay unused: those of your script are taken." if unused else ""
    rank_zero_info(f"lightning_compress: the callbacks of {name} join this run, as {VARIABLE} says.{rest}")
