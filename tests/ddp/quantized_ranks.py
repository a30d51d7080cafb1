"""Two gloo processes on the CPU that train quantized; each writes what it saw. Run by test_quantized_ranks.py."""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QuantizationAwareTraining
from lightning_compress.core.distributed import tensor_hash

pl = import_module(sys.argv[1] if __name__ == "__main__" else "pytorch_lightning")
CASES = {
    "ranges": {"weights": 8, "activations": 8, "method": "moving_average"},
    "widening": {"weights": 8, "activations": 8, "method": "min_max"},
    "learned": {"weights": 4, "activations": 4, "first": "same", "last": "same"},
}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Note(pl.Callback):
    """The hash of the weights and of all that the quantizers hold, after each batch."""

    def __init__(self, callback):
        self.callback, self.weights, self.grids = callback, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(tensor_hash(pl_module.parameters()))
        known = self.callback.quantized
        held = [] if known is None else [one for each in known.quantizers() for one in each.state_dict().values()]
        self.grids.append(tensor_hash(held))


def run(name, folder):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))
    callback = QuantizationAwareTraining(begin=2, **CASES[name])
    note = Note(callback)
    arguments = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    # After ours, so that it sees what the ranks have agreed on at the end of the batch.
    trainer = pl.Trainer(callbacks=[callback, note], default_root_dir=folder, **arguments, **quiet)
    module = Classifier()
    trainer.fit(module, DataLoader(data, batch_size=8))
    seen = {"weights": note.weights, "grids": note.grids, "keys": list(module.state_dict())}
    Path(folder, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    for one in CASES:
        run(one, sys.argv[2])
