"""The ready recipes that ship with the package, and finding a recipe by its name or its path."""

from importlib.resources import files
from pathlib import Path

from lightning_compress.core.registry import near_miss


def builtin_recipes(folder: str = "") -> dict[str, Path]:
    """Each ready recipe's file by its name, such as "prune"; of the folder "sweeps", each ready sweep's."""
    here = Path(str(files("lightning_compress.recipes"))) / folder
    return {path.stem: path for path in sorted(here.glob("*.yaml"))}


def recipe_purpose(path: Path) -> str:
    """What a recipe is for: the first comment line at its top, empty if there is none."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find_recipe(name: str | Path, folder: str = "") -> Path:
    """Return the file of a path, or of the name of a ready recipe, or sweep in the folder "sweeps".

    Raises:
        FileNotFoundError: if there is neither; with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    ready, kind = builtin_recipes(folder), folder.removesuffix("s") or "recipe"
    if str(name) in ready:
        return ready[str(name)]
    raise FileNotFoundError(
        f"There is no file '{name}' in {Path.cwd()}, nor a ready {kind} of that name."
        f"{near_miss(path.stem, ready)} Ready ones: {', '.join(ready)}."
    )


def copy_recipe(name: str, target: str | Path, *, force: bool = False) -> Path:
    """Copy a ready recipe to a file, or into a folder under its own name; return where it lies.

    Raises:
        ValueError: if there is no such recipe.
        FileExistsError: if the file is there already and `force` is not set.
    """
    ready = builtin_recipes()
    if name not in ready:
        raise ValueError(f"There is no ready recipe '{name}'.{near_miss(name, ready)} Ready ones: {', '.join(ready)}.")
    path = Path(target)
    if path.is_dir():
        path = path / f"{name}.yaml"
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(ready[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise FileExistsError(f"{path} exists already. Write another name, or --force to replace it.") from error
    return path
