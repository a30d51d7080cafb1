"""Compare `Pruning` with Lightning's `ModelPruning` on the same small run: resume, EMA, DDP, gradual schedules.

    python benchmarks/versus_model_pruning.py

Prints a table of what each of the two did, and writes `versus_model_pruning.json` and `.md` in `benchmarks/results`.
"""

import inspect
import io
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import Pruning

Make = Callable[..., pl.Callback]
OURS, LIGHTNINGS = "Pruning", "ModelPruning"
SPARSITY, EPOCHS = 0.8, 4


class Small(pl.LightningModule):
    """A classifier with 2,688 weights in two layers."""

    def __init__(self, seed_by_rank: bool = False) -> None:
        super().__init__()
        self.seed_by_rank = seed_by_rank
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def on_fit_start(self) -> None:
        if self.seed_by_rank:
            torch.manual_seed(1000 + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.003)

    def layers(self) -> list[tuple[nn.Module, str]]:
        return [(self.net[0], "weight"), (self.net[2], "weight")]

    def weights(self) -> Tensor:
        return torch.cat([getattr(layer, name).detach().flatten() for layer, name in self.layers()])

    def sparsity(self) -> float:
        """Fraction of exact zeros among the weights, as the forward pass sees them."""
        return float((self.weights() == 0).float().mean())


class Watch(pl.Callback):
    """The sparsity after each epoch's training and pruning."""

    def __init__(self) -> None:
        self.sparsities: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Small) -> None:
        self.sparsities.append(pl_module.sparsity())


def loader() -> Any:
    """512 samples in 16 batches, always in the same order."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(512, 32, generator=generator)
    labels = (samples @ torch.randn(32, 10, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(samples, labels), batch_size=32)


def fit(
    callbacks: Sequence[pl.Callback], epochs: int, model: Small | None = None, resumed: Path | None = None, **more: Any
) -> tuple[Small, pl.Trainer]:
    model = model or Small()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"devices": 1, "enable_checkpointing": False, **more},
    )
    trainer.fit(model, loader(), ckpt_path=resumed)
    return model, trainer


# The same in both: prune once, and hold ----------------------------------------------------------------------------


def ours_once(_model: Small, **more: Any) -> Pruning:
    return Pruning(SPARSITY, schedule="constant", begin=0, end="1 epochs", every="1 epochs", **more)


def lightnings_once(model: Small, function: str = "l1_unstructured", **more: Any) -> ModelPruning:
    return ModelPruning(
        function,
        model.layers(),
        amount=SPARSITY,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,  # on by default: it would rewind the weights
        **more,
    )


ONCE: dict[str, Make] = {OURS: ours_once, LIGHTNINGS: lightnings_once}


def survives_resume(which: str) -> str:
    """Two epochs, and one more from the checkpoint that `ModelCheckpoint` has saved."""
    found = [_resumed_once(ONCE[which])]
    if which == LIGHTNINGS:
        held = _or_crash(lambda: _resumed_once(lambda model: lightnings_once(model, make_pruning_permanent=False)))
        found.append(f"with make_pruning_permanent=False: {held}")
    return "; ".join(found)


def _resumed_once(make: Make) -> str:
    before, after, _ = resumed(make, 3)
    return f"sparsity {before[1]:.2f} before, {after[-1]:.2f} after"


def resumed(make: Make, epochs: int) -> tuple[list[float], list[float], Small]:
    """Sparsity by epoch of a whole run, and of one that goes on after its second epoch; and the model of the latter."""
    whole, rest, model, again = Watch(), Watch(), Small(), Small()
    with tempfile.TemporaryDirectory() as folder:
        saved = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        fit([make(model), whole, saved], epochs, model, enable_checkpointing=True)
        fit([make(again), rest], epochs, again, Path(folder) / "epoch=1.ckpt")
    return whole.sparsities, rest.sparsities, again


def with_ema(which: str) -> str:
    """Beside `EMAWeightAveraging`, in both orders of the list."""
    return "; ".join(
        f"listed {place}: {_or_crash(lambda first=first: _averaged(which, first))}"
        for place, first in (("first", True), ("last", False))
    )


def _averaged(which: str, first: bool) -> str:
    model = Small()
    callbacks = [ONCE[which](model), EMAWeightAveraging(decay=0.9)]
    fit(callbacks if first else callbacks[::-1], 3, model)
    return f"sparsity {model.sparsity():.2f}"


def ranks_agree(which: str) -> str:
    """Two processes whose random streams differ, with random pruning."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--rank-of", which, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        files = sorted(Path(folder).glob("*.pt"))
        if done.returncode or len(files) != 2:
            return f"crash: {done.stderr.strip().splitlines()[-1]}"
        first, second = (torch.load(file, weights_only=True) for file in files)
    differing = float(((first != 0) != (second != 0)).float().mean())
    return "equal" if differing == 0 else f"differ in {differing:.0%} of the weights"


def one_rank_prunes(which: str) -> str:
    """The training of `ranks_agree` on one rank in this process: a quick look starts no processes."""
    with tempfile.TemporaryDirectory() as folder:
        train_as_rank(which, Path(folder), devices=1)
        weights = torch.load(Path(folder) / "0.pt", weights_only=True)
    return f"one rank only: sparsity {float((weights == 0).float().mean()):.2f}"


def train_as_rank(which: str, folder: Path, devices: int = 2) -> None:
    """Train one rank of `ranks_agree` and save its weights; Lightning starts the script again as the second rank."""
    model = Small(seed_by_rank=True)
    more = {"criterion": "random"} if which == OURS else {"function": "random_unstructured"}
    _, trainer = fit([ONCE[which](model, **more)], 2, model, devices=devices, strategy="ddp" if devices > 1 else "auto")
    torch.save(model.weights(), folder / f"{trainer.global_rank}.pt")


def constant_amount(which: str) -> str:
    """One constant, 0.5, over four epochs: sparsity after each."""
    model, watch = Small(), Watch()
    if which == OURS:
        added: pl.Callback = Pruning(0.5, schedule="constant", begin=0, end=f"{EPOCHS} epochs", every="1 epochs")
    else:
        added = ModelPruning("l1_unstructured", model.layers(), amount=0.5, use_lottery_ticket_hypothesis=False)
    fit([added, watch], EPOCHS, model)
    return ", ".join(f"{sparsity:.3f}" for sparsity in watch.sparsities)


# A gradual schedule to 90 % that survives a resume -------------------------------------------------------------------


def ours_gradual(_model: Small) -> pl.Callback:
    return Pruning(0.9, begin="0%", end="75%")


def lightnings_gradual(model: Small) -> pl.Callback:
    def target(epoch: int) -> float:
        return 0.9 * (1 - (1 - min((epoch + 1) / 3, 1)) ** 3)

    def increment(epoch: int) -> float:
        before = target(epoch - 1) if epoch else 0.0
        return (target(epoch) - before) / (1 - before)

    class ResumedPruning(ModelPruning):
        saved: dict[int, Tensor] = {}

        def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            layers = enumerate(self._parameters_to_prune)
            masks = {place: getattr(layer, f"{name}_mask", None) for place, (layer, name) in layers}
            checkpoint["masks"] = {place: mask.clone() for place, mask in masks.items() if mask is not None}

        def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
            self.saved = checkpoint["masks"]

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            # Not before: the masks change the order of parameters, by which the optimizer's state is restored.
            for place, mask in self.saved.items():
                prune.custom_from_mask(*self._parameters_to_prune[place], mask)

    return ResumedPruning("l1_unstructured", model.layers(), amount=increment, use_lottery_ticket_hypothesis=False)


GRADUAL: dict[str, Make] = {OURS: ours_gradual, LIGHTNINGS: lightnings_gradual}


def lines_to_write(which: str) -> str:
    """Lines of code of `ours_gradual` or `lightnings_gradual`, and what they do in a run that is resumed half-way."""
    make, model = GRADUAL[which], Small()
    fit([make(model)], EPOCHS, model)
    before, after, again = resumed(make, EPOCHS)
    difference = float((model.weights() - again.weights()).abs().max())
    same = "the same weights, bit for bit," if difference == 0 else f"weights that differ by up to {difference:.1g}"
    path = ", ".join(f"{sparsity:.2f}" for sparsity in [*before[:2], *after])
    return f"{_lines_of_code(make)} (sparsity by epoch {path}; resumed after the second: {same} as without)"


def _lines_of_code(function: Callable[..., Any]) -> int:
    """Lines of the body that hold code."""
    source = textwrap.dedent(inspect.getsource(function))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({token.start[0] for token in tokens if token.type not in skipped}) - 1


def _or_crash(action: Callable[[], str]) -> str:
    try:
        return action()
    except Exception as error:
        words = " ".join(str(error).split())
        return f"crash, {type(error).__name__}: {words[:110]}{'...' if len(words) > 110 else ''}"


QUESTIONS: dict[str, Callable[[str], str]] = {
    f"pruned to {SPARSITY}, then resumed for one epoch": survives_resume,
    "with EMAWeightAveraging": with_ema,
    "masks of 2 DDP ranks, random pruning": ranks_agree,
    "0.5 at each of 4 epochs": constant_amount,
    "lines for a gradual schedule to 0.9 that is resumed": lines_to_write,
}


# What is said ------------------------------------------------------------------------------------------------------


def markdown(rows: dict[str, dict[str, str]], versions: dict[str, Any]) -> str:
    lines = [f"| | `{OURS}` | Lightning's `{LIGHTNINGS}` |", "|---|---|---|"]
    lines += [f"| {question} | {cells[OURS]} | {cells[LIGHTNINGS]} |" for question, cells in rows.items()]
    about = f"Measured by `benchmarks/versus_model_pruning.py` on pytorch-lightning {versions['pytorch-lightning']}, "
    return "\n".join([*lines, "", f"{about}torch {versions['torch']}.", ""])


def main() -> None:
    read = arguments(
        "versus_model_pruning",
        __doc__,
        **{
            "rank-of": {"choices": [OURS, LIGHTNINGS], "help": "only train as one of two DDP ranks"},
            "folder": {"type": Path, "help": "where such a rank writes its weights"},
        },
    )
    be_quiet()
    torch.set_num_threads(1)
    if read.rank_of:
        train_as_rank(read.rank_of, read.folder)
        return
    rows: dict[str, dict[str, str]] = {}
    console, table = Console(), Table("", OURS, f"Lightning's {LIGHTNINGS}", title="On the same small run")
    with console.status("") as status:
        for question, measure in QUESTIONS.items():
            status.update(question)
            if read.quick and measure is ranks_agree:
                measure = one_rank_prunes
            rows[question] = {which: measure(which) for which in ONCE}
            table.add_row(question, *rows[question].values())
    console.print(table)
    versions = environment()
    write(read.output, {"environment": versions, "rows": rows})
    read.output.with_suffix(".md").write_text(markdown(rows, versions), encoding="utf-8")
    console.print(f"Written to {read.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
