"""Two gloo processes lose the channels that both together find least active. Run by test_channel_ranks.py."""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ChannelPruning
from lightning_compress.core.distributed import tensor_hash

pl = import_module(sys.argv[1] if __name__ == "__main__" else "pytorch_lightning")
UNITS = 8


def table():
    """64 samples; rank 0 is given the even ones, rank 1 the odd ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, UNITS), nn.ReLU(), nn.Linear(UNITS, 3))


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Note(pl.Callback):
    """Shapes, hashes of weights and of momenta, and the wrapper, after each batch."""

    def __init__(self):
        self.shapes, self.hashes, self.wrapped = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = list(pl_module.parameters())
        momenta = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
        self.shapes.append([list(one.shape) for one in weights])
        self.hashes.append([tensor_hash(weights), tensor_hash(momenta)])
        self.wrapped.append(type(trainer.strategy.model).__name__)


def by_rank(weight):
    """Scores that only the sum over both ranks puts into the right order."""
    unit = torch.arange(float(UNITS))
    return unit if torch.distributed.get_rank() == 0 else (UNITS - 1 - unit) ** 2


def other_units(groups, scores, originals, fraction, min_density):
    """Each rank would have other units go."""
    first = 4 * torch.distributed.get_rank()
    return {groups[0].name: tuple(range(first, first + 4)) if groups[0].units == UNITS else ()}


def run(name, folder, **arguments):
    pruning = ChannelPruning(sparsity=0.5, recalibrate=0, **{"criterion": "apoz", **arguments})
    note = Note()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        callbacks=[pruning, note],
        default_root_dir=folder,
        **quiet,
    )
    module = Classifier()
    trainer.fit(module, DataLoader(TensorDataset(*table()), batch_size=4))
    kept = {
        key: {dim: one.tolist() for dim, one in dims.items()} for key, dims in pruning.cut.state_dict()["kept"].items()
    }
    seen = {"shapes": note.shapes, "hashes": note.hashes, "wrapped": note.wrapped}
    Path(folder, f"{name}-{trainer.global_rank}.json").write_text(json.dumps({**seen, "kept": kept}))


if __name__ == "__main__":
    run("once", sys.argv[2], begin=3, end=4, every=1, schedule="constant")
    run("twice", sys.argv[2], begin=3, end=11, every=4)
    run("by_rank", sys.argv[2], begin=3, end=4, every=1, criterion=by_rank)
    run("other_units", sys.argv[2], begin=3, end=4, every=1, distribution=other_units)
