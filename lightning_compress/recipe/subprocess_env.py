"""Start a program with a recipe in its environment, as an agent of W&B does it: settings come as `--key=value`."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_compress.recipe.builtin import find_recipe
from lightning_compress.recipe.environment import recipe_variables
from lightning_compress.recipe.recipe import Recipe
from lightning_compress.recipe.sections import JOINING

ALLOW = "LIGHTNING_COMPRESS_ALLOW"


def overrides_from_arguments(arguments: Sequence[str]) -> list[str]:
    """The overrides of a recipe, from arguments as `${args}` of a sweep's command writes them.

    Raises:
        ValueError: if one is not of the form `--key=value`.

    >>> overrides_from_arguments(["--pruning.end=50%", "--finetuning.learning_rate=None"])
    ['pruning.end=50%', 'finetuning.learning_rate=null']
    """
    for one in arguments:
        if not one.startswith("--") or "=" not in one:
            raise ValueError(f"'{one}' is no setting of the recipe. Write --key=value: --pruning.final_sparsity=0.95.")
    settings = [one.removeprefix("--") for one in arguments]
    # W&B writes null as Python does.
    return [f"{one.removesuffix('None')}null" if one.endswith("=None") else one for one in settings]


def subprocess_environment(
    recipe: str | Path, overrides: Sequence[str], allow: Sequence[str], around: Mapping[str, str]
) -> dict[str, str]:
    """The environment in which a recipe joins a program's Trainers; its callbacks are made once, to see that they can.

    Args:
        recipe: a path, or the name of a ready recipe.
        overrides: such as "pruning.final_sparsity=0.95".
        allow: dotted paths that the recipe may name, as in `Recipe.load`.
        around: the environment to add to.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if it, or an override, is refused.
    """
    path = find_recipe(recipe).absolute()
    Recipe.load(path, overrides=overrides, allow=allow, sections=JOINING).callbacks()
    allowed = {ALLOW: ",".join([*allow, around.get(ALLOW, "")])} if allow else {}
    return {**around, **allowed, **recipe_variables(str(path), overrides)}


def run_program_with_recipe(program: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program in an environment, and return its exit code.

    Raises:
        ValueError: if there is none.
        OSError: if it cannot be started.
    """
    if not program:
        raise ValueError("There is no program to run. Write it after --: -- python train.py.")
    if os.name == "posix":
        # In our place: an agent that ends a run ends the process that it knows, and knows only this one.
        sys.stdout.flush()
        os.execvpe(program[0], list(program), dict(environment))
    return subprocess.run(program, env=environment, check=False).returncode
