"""Two gloo processes replace a Linear by two of a lower rank in mid-run. Run by test_replaced_ranks.py."""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.core.distributed import tensor_hash
from tests.ddp.channel_ranks import network, table
from tests.training.toy import LowRank

pl = import_module(sys.argv[1] if __name__ == "__main__" else "pytorch_lightning")


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


class Save(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(sys.argv[2], f"{self.name}.ckpt"))


class RandomFactors(LowRank):
    """Each rank draws other values, and all have those of the first one."""

    def replace_modules(self, trainer, pl_module, changes, seed=0):
        changes = [type(one)(one.replacement) for one in changes]
        super().replace_modules(trainer, pl_module, changes, seed=trainer.global_rank)


class OtherRanks(LowRank):
    """Each rank would replace the module by another one."""

    def replace_modules(self, trainer, pl_module, changes, seed=0):
        self.rank = 1 + trainer.global_rank
        changes = [type(one)(self.plan(pl_module, one.replacement.name)) for one in changes]
        super().replace_modules(trainer, pl_module, changes)


def run(name, folder, callback, resumed=None):
    note, save, average = Note(), Save(), pl.callbacks.WeightAveraging()
    save.name = name
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, **quiet,
                         callbacks=[callback, note, save, average], default_root_dir=folder)  # fmt: skip
    module, error = Classifier(), ""
    path = None if resumed is None else Path(folder, f"{resumed}.ckpt")
    try:
        trainer.fit(module, DataLoader(TensorDataset(*table()), batch_size=4), ckpt_path=path)
    except ValueError as caught:
        error = str(caught)
    averaged = 0 if average._average_model is None else tensor_hash(average._average_model.parameters())
    seen = {"averaged": averaged, "shapes": note.shapes, "hashes": note.hashes, "wrapped": note.wrapped, "error": error}
    Path(folder, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    run("once", sys.argv[2], LowRank(begin=3, end=11, every=8, layers=("net.0", "net.2")))
    run("resumed", sys.argv[2], LowRank(begin=3, end=11, every=8, layers=("net.0", "net.2")), resumed="once")
    run("random", sys.argv[2], RandomFactors(begin=3, end=4))
    run("differing", sys.argv[2], OtherRanks(begin=3, end=4))
