"""Two gloo processes on the CPU whose random streams differ; each writes what it saw. Run by test_two_ranks.py."""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Pruning
from lightning_compress.core.distributed import tensor_hash

pl = import_module(sys.argv[1] if __name__ == "__main__" else "pytorch_lightning")


def by_chance(weight):
    """A criterion that is not seeded: each rank has scores of its own."""
    return torch.rand_like(weight)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def on_train_start(self):
        torch.manual_seed(self.global_rank)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Note(pl.Callback):
    """The hash of masks and of weights after each batch."""

    def __init__(self, pruning):
        self.pruning, self.masks, self.weights = pruning, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.masks.append(tensor_hash(self.pruning.masks.values()))
        self.weights.append(tensor_hash(pl_module.parameters()))


def run(criterion, folder):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))
    pruning = Pruning(0.75, criterion=criterion, begin=1, end=9, every=2)
    note = Note(pruning)
    arguments = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 3, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[pruning, note], default_root_dir=folder, **arguments, **quiet)
    module = Classifier()
    trainer.fit(module, DataLoader(data, batch_size=8))
    zeros = int((module.net[0].weight == 0).sum())
    seen = {"masks": note.masks, "weights": note.weights, "sparsity": pruning.sparsity, "zeros": zeros}
    name = criterion if isinstance(criterion, str) else criterion.__name__
    Path(folder, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    for one in ("magnitude", "taylor", "wanda", "random", by_chance):
        run(one, sys.argv[2])
