"""Two gloo processes on the CPU that distil; each writes what it saw. Run by test_distilled_ranks.py."""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import AveragedTeacher, Distillation, PeerTeacher
from lightning_compress.core.distributed import tensor_hash

pl = import_module(sys.argv[1] if __name__ == "__main__" else "pytorch_lightning")


def network(width, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


TEACHER = network(32, seed=7)


class Classifier(pl.LightningModule):
    def __init__(self, by_hand=False, width=16):
        super().__init__()
        self.net, self.by_hand = network(width, seed=0), by_hand

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        if not self.by_hand:
            return loss
        with torch.no_grad():
            answer = TEACHER(batch[0])
        p, q = F.log_softmax(answer / 4.0, -1), F.log_softmax(logits / 4.0, -1)
        lesson = F.kl_div(q, p, reduction="batchmean", log_target=True) * 4.0**2
        return (1 - 0.9) * loss + 0.9 * lesson

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def cases(folder):
    """Callbacks by name; None is the loss written by hand."""
    return {
        "by_hand": None,
        "distilled": Distillation(TEACHER),
        "cached": Distillation(TEACHER, cache=Path(folder, "cache")),
        "learned": Distillation(TEACHER, losses={("net.0", "0"): ["projected_hint", "crd"], "output": "dkd"}),
        "averaged": Distillation(AveragedTeacher(0.9), alpha=0.5),
        "own_past": Distillation("self@25%", alpha=0.5),
        "peer": Distillation(PeerTeacher(Classifier(width=32)), alpha=0.5),
    }


def beside(callback):
    """What a callback trains beside the model."""
    if callback is None:
        return []
    teacher = callback.distiller.objective.tutors[0].teacher
    peer = list(teacher.peer.parameters()) if isinstance(teacher, PeerTeacher) else []
    return [*callback.distiller.objective.learned.parameters(), *peer]


class Note(pl.Callback):
    """The hash of weights after each batch."""

    def __init__(self, callback):
        self.callback, self.weights, self.beside = callback, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(tensor_hash(pl_module.parameters()))
        self.beside.append(tensor_hash(beside(self.callback)))


def run(name, callback, folder):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))
    note = Note(callback)
    arguments = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [note] if callback is None else [callback, note]
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=folder, log_every_n_steps=2, **arguments, **quiet)
    module = Classifier(by_hand=callback is None)
    trainer.fit(module, DataLoader(data, batch_size=8))
    seen = {
        "weights": note.weights,
        "beside": note.beside,
        "keys": list(module.state_dict()),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if key.endswith("_epoch")},
    }
    Path(folder, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    for one, made in cases(sys.argv[2]).items():
        run(one, made, sys.argv[2])
