"""Ready recipes in runs that SIGKILL ends, and that go on from their last checkpoint; each in a process of its own."""

import logging
import os
import random
import signal
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytorch_lightning as pl
import torch
from fsspec.implementations.local import LocalFileOpener

from lightning_compress.core.conflicts import phase_windows
from lightning_compress.core.phases import Run
from lightning_compress.recipe.builtin import builtin_recipes
from lightning_compress.training.callback import CompressionCallback
from tests.recipe.kinds import BATCHES, EPOCHS, STEPS, callbacks, kind_of, module_of

DRAWN = 2  # steps of each recipe, beside those where its phases begin and end
PATIENCE_S = 120
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks")


@dataclass(frozen=True)
class Kill:
    """A run of a ready recipe that is killed in these steps, one after the other, each time resumed before.

    With `writing` it is when half of the checkpoint of the step is on the disk, else in the middle of the step.
    """

    recipe: str
    steps: tuple[int, ...]
    phase: str
    writing: bool = False

    @property
    def resumed_from(self):
        """The end of the last whole epoch before each step: no other checkpoint is written."""
        return tuple((step - 1) // BATCHES * BATCHES for step in self.steps)


def kills(name):
    """Where phases begin and end, an epoch later, steps drawn by the recipe's name, all in turn; and while writing."""
    windows = phases(name)
    edges = {int(edge) for window in windows.values() for edge in (window.begin, window.end)}
    drawn = random.Random(name).sample(range(1, STEPS + 1), DRAWN)
    steps = sorted(one for one in {*edges, *(edge + BATCHES for edge in edges), *drawn} if 1 <= one <= STEPS)
    each = [Kill(name, (step,), words(windows, step)) for step in steps]
    half = STEPS // 2
    return [*each, Kill(name, tuple(steps), "all of them"), Kill(name, (half,), words(windows, half), writing=True)]


def phases(name):
    """The windows of a recipe's callbacks that change the run."""
    ours = [one for one in callbacks(name, "pytorch_lightning") if isinstance(one, CompressionCallback)]
    windows = phase_windows(ours, Run(epochs=EPOCHS, batches_per_epoch=BATCHES))
    return {one.name: windows[one.name] for one in ours if one.has_phase}


def words(windows, step):
    """What is going on in a step."""
    open_ones = [(key, window) for key, window in windows.items() if window.begin <= step <= window.end]
    told = {key: f"{key}{' begins' * (step == one.begin)}{' ends' * (step == one.end)}" for key, one in open_ones}
    return ", ".join(told.values()) or "between phases"


class Killer:
    """Runs recipes in processes that are forked from one which has imported all that they need.

    Args:
        folder: for checkpoints and results.
    """

    def __init__(self, folder):
        self.folder, self.ends = Path(folder), {}
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["pytest", "pytorch_lightning", "lightning_compress", "tests.recipe.kinds"])

    def differences(self, kill):
        """Names of what ends otherwise than in a run that nobody disturbs; none if all is the same to the last byte.

        Raises:
            RuntimeError: if a run is not killed where it should be, or has another last checkpoint, or fails.
        """
        if kill.recipe not in self.ends:
            self.ends[kill.recipe] = self._end(self.folder / kill.recipe)
        folder = self.folder / "_".join(map(str, (kill.recipe, *kill.steps, kill.writing)))
        for step, resumed_from in zip(kill.steps, kill.resumed_from, strict=True):
            self._start(folder, kill.recipe, step, kill.writing)
            _, found = last_checkpoint(folder)
            if found != resumed_from:
                raise RuntimeError(f"{kill}: the last checkpoint is that of step {found}, not {resumed_from}.")
        return sorted(unlike(self.ends[kill.recipe], self._end(folder, kill.recipe)))

    def _end(self, folder, name=None):
        self._start(folder, name or folder.name)
        return torch.load(folder / "end.pt", weights_only=True)

    def _start(self, folder, name, killed_at=None, writing=False):
        expected = 0 if killed_at is None else -signal.SIGKILL
        process = self.context.Process(target=run, args=(folder, name, killed_at, writing))
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode != expected:
            process.kill()
            raise RuntimeError(f"{name}, killed at {killed_at}: ended with {process.exitcode}, not {expected}.")


def run(folder, name, killed_at, writing):
    """Begin a run or go on with it, with a checkpoint after each epoch, and write what it ends in."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    class Kill(pl.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if not writing and trainer.global_step + 1 == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_save_checkpoint(self, trainer, *_):
            if writing and trainer.global_step == killed_at:
                LocalFileOpener.write = write_half

    keep = pl.callbacks.ModelCheckpoint(folder / "epochs", filename="{step}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=[*callbacks(name, "pytorch_lightning"), keep, Kill()], accelerator="cpu",
        devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = kind_of(name).loader()
    trainer.fit(module_of(pl, name), loader, loader, ckpt_path=last_checkpoint(folder)[0])
    end = trainer._checkpoint_connector.dump_checkpoint()
    end["callbacks"] = {key: value for key, value in end["callbacks"].items() if key.startswith("lightning_compress")}
    torch.save({key: end[key] for key in COMPARED}, folder / "end.pt")


def write_half(file, content):
    """What is left of a file when the machine goes off too soon."""
    file.f.write(content[: len(content) // 2])
    file.f.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def last_checkpoint(folder):
    """The path of the last one and its step; None and 0 if there is none."""
    found = {int(path.stem.partition("=")[2]): path for path in (folder / "epochs").glob("*.ckpt")}
    return (found[max(found)], max(found)) if found else (None, 0)


def unlike(one, other, place=""):
    """The places at which two nested values are not the same to the last byte."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)
        return set() if alike else {place}
    if isinstance(one, dict) and isinstance(other, dict):
        both = one.keys() & other.keys()
        found = (unlike(one[key], other[key], f"{place}/{key}") for key in both)
        return {f"{place}/{key}" for key in one.keys() ^ other.keys()}.union(*found)
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return unlike(dict(enumerate(one)), dict(enumerate(other)), place)
    return set() if repr(one) == repr(other) else {place}


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_kills():
    return [kill for name in builtin_recipes() for kill in kills(name)]
