"""A recipe: YAML that lists callbacks with their arguments, and for a complete run also model, data and trainer.

    callbacks:
      - Pruning: {final_sparsity: 0.9}
      - class_path: CompressionReport

With `start_from: trained.ckpt` beside them, the run begins with the weights of that checkpoint. It is read as
LightningCLI reads its files. Loading makes no object and imports nothing but this package and what the user allows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_compress.core.registry import restricted_imports
from lightning_compress.recipe.classes import Classes, allowed_by_environment, installed_lightning, lightning_of
from lightning_compress.recipe.objects import build_objects, construct, find_class, short_name
from lightning_compress.recipe.overrides import apply_override
from lightning_compress.recipe.safe_yaml import SourceValue, read_yaml
from lightning_compress.recipe.sections import (
    SECTIONS,
    callback_entries,
    check_sections,
    expand_sections,
    known_sections,
    section_names,
    trainer_class,
)
from lightning_compress.training.initialize_from import StartFrom


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `Recipe.load` reads one.

    Args:
        path: where it was read.
        root: its sections, each object written out with class_path and init_args.
        classes: which classes it may name.
        left_out: the sections of the file that `load` was told not to keep.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "prune.yaml"
    ...     written = file.write_text("callbacks: [{Pruning: {final_sparsity: 0.9, end: 50%}}]")
    ...     recipe = Recipe.load(file, overrides=["pruning.final_sparsity=0.95"])
    >>> [(type(one).__name__, one.final_sparsity, one.end) for one in recipe.callbacks()]
    [('Pruning', 0.95, '50%')]
    """

    path: Path
    root: SourceValue
    classes: Classes
    left_out: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        allow: Sequence[str] = (),
        sections: Sequence[str] = SECTIONS,
    ) -> "Recipe":
        """Read and check a recipe; nothing in it is made yet.

        Args:
            path: a YAML file.
            overrides: such as "pruning.final_sparsity=0.95", "callbacks.0.begin=20%", "trainer.max_epochs=3".
            allow: dotted paths of your own classes and functions that the recipe may name, `*` for any; the variable
                `LIGHTNING_COMPRESS_ALLOW` adds to them.
            sections: what to keep and check; `recipe.sections.JOINING` to join a run that has all the rest.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a recipe; with the file, the line, the place and the nearest right name.
        """
        _refuse_text("overrides", overrides)
        _refuse_text("allow", allow)
        classes = Classes((*allow, *allowed_by_environment()), installed_lightning())
        root = expand_sections(known_sections(read_yaml(path)))
        for setting in overrides:
            _refuse_left_out(setting, sections)
            root = expand_sections(apply_override(root, setting, section_names(root, classes), SECTIONS))
        kept = {key: section for key, section in root.value.items() if key in sections}
        left_out = tuple(key for key in root.value if key not in kept)
        recipe = cls(Path(path), SourceValue(kept, root.where), _for_the_model(classes, kept), left_out)
        check_sections(recipe.root, recipe.classes)
        return recipe

    def callbacks(self, lightning: str | None = None) -> list[Any]:
        """Make the callbacks, in the recipe's order, new ones at each call.

        With `start_from:` in the recipe there is one before them that gives the module the weights of that checkpoint,
        and nothing else of it: clock, optimizers and callbacks begin anew. A relative path is looked for where the run
        is started. A resumed run, `fit(ckpt_path=...)`, goes on with its own weights. Without a recipe load them into
        the module yourself: `MyModule.load_from_checkpoint("trained.ckpt")`.

        Args:
            lightning: whose `ModelCheckpoint` and the like to take, "pytorch_lightning" or "lightning.pytorch"; by
                default the one the recipe's model is written for, else the first that is installed.

        Raises:
            ValueError: what a constructor refuses, with the place in front.
        """
        classes = replace(self.classes, lightning=lightning or self.classes.lightning)
        start = [StartFrom(self.root.value["start_from"].value)] if "start_from" in self.root.value else []
        return [*start, *(self._build(entry, place, classes) for place, entry in callback_entries(self.root))]

    def model(self) -> Any:
        """Make the module of a complete recipe.

        Raises:
            ValueError: if there is none, or its constructor refuses its arguments.
        """
        return self._object("model")

    def data(self) -> Any:
        """Make the data module, None if there is none."""
        return self._object("data") if "data" in self.root.value else None

    def trainer(self, callbacks: list[Any], **defaults: Any) -> Any:
        """Make the Trainer with the recipe's arguments.

        Args:
            callbacks: those of this recipe, or others.
            defaults: for arguments that the recipe does not give.

        Raises:
            ValueError: if the Trainer refuses an argument.
        """
        section = self.root.value.get("trainer", SourceValue({}, self.root.where))
        arguments = {**defaults, **self._build(section, "trainer", self.classes), "callbacks": callbacks}
        return construct(trainer_class(self.classes), arguments, section.value, f"{section.where}: trainer")

    def timeline(self, length: Any = None) -> str:
        """Print when everything happens, before anything runs; the text is returned too.

        Args:
            length: optimizer steps, a Trainer, or a `Run`; by default what the recipe's own `trainer` section says.

        Raises:
            ValueError: if nothing tells how long the run is, or a constructor refuses its arguments.
        """
        from lightning_compress.recipe.timeline import format_timeline, run_from_length

        if length is None and "trainer" not in self.root.value:
            raise ValueError(f"{self.path} does not say how long the run is. Give its optimizer steps, or a Trainer.")
        return format_timeline(
            self.callbacks(), run_from_length(self.to_dict()["trainer"] if length is None else length)
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, with what was overridden: for W&B's config, JSON or YAML."""
        return self.root.plain()  # type: ignore[no-any-return]

    def _object(self, section: str) -> Any:
        if section not in self.root.value:
            raise ValueError(f"{self.path} has no `{section}:`, so it cannot run alone; its callbacks can join a run.")
        return self._build(self.root.value[section], section, self.classes)

    def _build(self, node: SourceValue, place: str, classes: Classes) -> Any:
        with restricted_imports(self.classes.allow):
            return build_objects(node, place, classes)


def _for_the_model(classes: Classes, sections: dict[str, SourceValue]) -> Classes:
    if "model" not in sections:
        return classes
    model = sections["model"]
    return replace(classes, lightning=lightning_of(find_class(model, f"model.{short_name(model)}", classes)))


def _refuse_left_out(setting: str, sections: Sequence[str]) -> None:
    section = re.split(r"[.\[=]", setting.strip(), maxsplit=1)[0]
    if section in SECTIONS and section not in sections:
        raise ValueError(
            f"--set {setting}: the run that the recipe joins has its own `{section}`, so this would change nothing. "
            f"Change it in your script."
        )


def _refuse_text(name: str, value: object) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name} is a list of texts, but is the text {value!r}. Write [{value!r}].")
