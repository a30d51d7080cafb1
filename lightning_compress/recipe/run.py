"""Run a complete recipe: fit, test the best checkpoint, and say where things lie."""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress._lightning import resume_wandb_runs
from lightning_compress.reporting.wandb_resume import saved_run_ids
from lightning_compress.training.loggers import log_config, wandb_runs

if TYPE_CHECKING:
    from lightning_compress.recipe import Recipe

DATA_VARIABLE = "LIGHTNING_COMPRESS_DATA"


def run_recipe(
    recipe: "Recipe",
    *,
    data_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    ckpt_path: str | Path | None = None,
) -> Any:
    """Make everything the recipe lists, train it, and test it if it has a test step and test data.

    Args:
        recipe: a complete one: at least a model.
        data_dir: where data modules look, as `LIGHTNING_COMPRESS_DATA`.
        output_dir: the Trainer's `default_root_dir`, unless the recipe has one.
        ckpt_path: a checkpoint of an earlier run of this recipe, which is gone on with; in the same W&B run too, if it
            has a `CompressionReport`.

    Returns:
        The Trainer.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the recipe is not complete, or something in it is refused.
    """
    before = [] if ckpt_path is None else saved_run_ids(ckpt_path)
    if data_dir is not None:
        os.environ[DATA_VARIABLE] = str(Path(data_dir).absolute())
    _seed(recipe)
    callbacks, model, data = recipe.callbacks(), recipe.model(), recipe.data()
    trainer = recipe.trainer(callbacks, **({} if output_dir is None else {"default_root_dir": str(output_dir)}))
    resume_wandb_runs(trainer.loggers, before)
    log_config(trainer, {"recipe": recipe.to_dict()})
    trainer.fit(model, datamodule=data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    best = _best_checkpoint(trainer)
    if _is_written(model, "test_step") and (
        _is_written(data, "test_dataloader") or _is_written(model, "test_dataloader")
    ):
        trainer.test(model, datamodule=data, ckpt_path=best)
    places = _places(trainer, best)
    if trainer.is_global_zero:
        print("\n".join(places))
    return trainer


def _seed(recipe: "Recipe") -> None:
    seed = recipe.to_dict().get("seed_everything", False)
    if seed is False or seed is None:
        return
    seed_everything = import_module(recipe.classes.lightning).seed_everything
    seed_everything(None if seed is True else seed, workers=True)


def _best_checkpoint(trainer: Any) -> str | None:
    callback = trainer.checkpoint_callback
    return (callback.best_model_path or None) if callback is not None else None


def _is_written(part: Any, method: str) -> bool:
    """Whether a module or data module has its own `method`, not Lightning's empty one."""
    written_in = getattr(getattr(type(part), method, None), "__module__", "lightning")
    return str(written_in).partition(".")[0] not in ("lightning", "pytorch_lightning")


def _places(trainer: Any, best: str | None) -> list[str]:
    """Where the files of a run lie, a line each; every rank has to ask, for `log_dir` is broadcast."""
    folders = dict.fromkeys(filter(None, [trainer.log_dir, *(run.dir for run in wandb_runs(trainer))]))
    lines = [f"Logs: {Path(folder).absolute()}" for folder in folders]
    return [*lines, f"Checkpoint: {Path(best).absolute()}"] if best else [*lines, "Checkpoint: none was written."]
