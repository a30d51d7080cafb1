"""Two gloo processes on the CPU that train in phases; each writes what it saw. Run by test_tuned_ranks.py."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_compress import FineTuning
from lightning_compress.core.distributed import tensor_hash

pl = import_module(sys.argv[1] if __name__ == "__main__" else "pytorch_lightning")
PHASES = {
    "frozen": [{"freeze": "net.0", "begin": 3, "end": 8}],
    "gradual": [{"freeze": "*", "unfreeze": "net.2", "gradual": True, "begin": 0, "end": 8}],
    "tuned": [{"layer_decay": 0.5, "warmup": 2, "end": 6}, {"rewind": 2, "begin": 6, "name": "rewound"}],
}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Note(pl.Callback):
    """The hash of the weights of each layer after each batch."""

    def __init__(self):
        self.layers, self.last = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.layers.append([tensor_hash(pl_module.net[place].parameters()) for place in (0, 2)])
        self.last = torch.cat([one.detach().flatten() for one in pl_module.parameters()]).tolist()


def run(name, folder, devices=2, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))
    note = Note()
    several = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    arguments = {"accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_model_summary": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "use_distributed_sampler": False}
    callbacks = [*(FineTuning(**one) for one in PHASES[name]), note]
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=folder, **several, **arguments, **quiet)
    own = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    sampler = DistributedSampler(data, num_replicas=devices, rank=own, shuffle=False)
    trainer.fit(Classifier(), DataLoader(data, batch_size=batch_size, sampler=sampler))
    return {"layers": note.layers, "last": note.last}, trainer.global_rank


if __name__ == "__main__":
    for phase in PHASES:
        seen, rank = run(phase, sys.argv[2])
        Path(sys.argv[2], f"{phase}-{rank}.json").write_text(json.dumps(seen))
