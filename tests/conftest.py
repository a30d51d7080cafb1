"""A small classifier under each Lightning name, and Trainers that write nothing."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def loader():
    """64 samples of 8 features and 3 classes, in batches of 8: 8 batches an epoch, always in the same order."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


@pytest.fixture
def make_module(pl):
    """A factory of classifiers with 128 + 48 weights to prune, equal each time."""

    class Classifier(pl.LightningModule):
        def __init__(self, optimizer=adamw, net=None):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)) if net is None else net()
            self.optimizer = optimizer

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        test_step = validation_step

        def configure_optimizers(self):
            return self.optimizer(self.parameters())

    return Classifier


@pytest.fixture
def make_trainer(pl, tmp_path):
    """A factory of Trainers on the CPU that are quiet, and write nothing unless told."""

    def make(callbacks=(), **arguments):
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})

    return make
