"""CIFAR-10 and the residual networks made for it, as a plain Lightning run that knows nothing of compression."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress._lightning import LightningDataModule, LightningModule

CLASSES, SIDE = 10, 32
MEAN, STANDARD_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FOLDER = "cifar-10-batches-py"
TRAIN_FILES, TEST_FILES = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
# What an array is rebuilt with, in files of old and new numpy; a pickle may name anything else, and is then refused.
HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class Block(nn.Module):
    """Two convolutions of 3x3 beside a shortcut without parameters: thinned, and new channels zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.added, stride = outputs - inputs, outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        changed = self.norm2(self.conv2(self.norm1(self.conv1(features)).relu()))
        if self.added:
            features = nn.functional.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.added))
        return torch.relu(changed + features)


class ResNet(LightningModule):
    """ResNet of `6 * depth + 2` layers: 75,290 parameters at depth 1 (ResNet-8), 269,722 at depth 3 (ResNet-20).

    Args:
        depth: blocks in each of the three stages, `stages.0` to `stages.2`.
        learning_rate: the peak of one-cycle SGD with momentum.
        weight_decay: L2 penalty.
        label_smoothing: share of each label that is spread over all classes, in [0, 1].
        width: channels of the first stage; each later stage has twice as many.

    Logs `train_loss`, `val_error` and `test_error`, fractions in [0, 1].

    Reference: He et al., 2015, section 4.2, https://arxiv.org/abs/1512.03385
    """

    def __init__(
        self,
        depth: int = 3,
        learning_rate: float = 0.4,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.weight_decay, self.label_smoothing = learning_rate, weight_decay, label_smoothing
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        widths = [(before, *[after] * depth) for before, after in pairwise((width, width, 2 * width, 4 * width))]
        self.stages = nn.Sequential(*(nn.Sequential(*(Block(*pair) for pair in pairwise(stage))) for stage in widths))
        self.head = nn.Linear(4 * width, CLASSES)
        self.val_accuracy, self.test_accuracy = (MulticlassAccuracy(CLASSES, average="micro") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.norm(self.conv(images)).relu())
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_accuracy.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val_error", 1 - self.val_accuracy.compute(), prog_bar=True)
        self.val_accuracy.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.test_accuracy.update(self(batch[0]), batch[1])

    def on_test_epoch_end(self) -> None:
        self.log("test_error", 1 - self.test_accuracy.compute())
        self.test_accuracy.reset()

    def configure_optimizers(self) -> Any:
        settings = {"lr": self.learning_rate, "momentum": 0.9, "nesterov": True, "weight_decay": self.weight_decay}
        optimizer = torch.optim.SGD(self.parameters(), **settings)  # type: ignore[arg-type]
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=steps, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class CIFAR10(LightningDataModule):
    """CIFAR-10 in memory, as `(images, labels)` of shape `(batch, 3, 32, 32)` and `(batch,)`.

    Images stay bytes until they are on the device. There they are normalised; those to train on are shifted by up to
    four pixels and mirrored by chance.

    Args:
        data_dir: folder that holds `cifar-10-batches-py`, as its authors publish it.
        batch_size: images per training batch; validation and test use larger ones.
        validation: training images held back to validate on, the same ones for the same seed.
        seed: of the split.
    """

    def __init__(self, data_dir: str | Path, batch_size: int = 512, validation: int = 5000, seed: int = 0) -> None:
        super().__init__()
        self.folder = Path(data_dir).expanduser() / FOLDER
        self.batch_size, self.validation, self.seed = batch_size, validation, seed
        self.splits: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        images, labels = read_batches(self.folder, TRAIN_FILES)
        if not 0 < self.validation < len(labels):
            raise ValueError(f"validation is a number of images below {len(labels):,}, but is {self.validation}.")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        kept, held = order[self.validation :], order[: self.validation]
        self.splits = {
            "train": (images[kept], labels[kept]),
            "validation": (images[held], labels[held]),
            "test": read_batches(self.folder, TEST_FILES),
        }

    def train_dataloader(self) -> "DataLoader[Any]":
        return _loader(self.splits["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> "DataLoader[Any]":
        return _loader(self.splits["validation"], max(self.batch_size, 2500))

    def test_dataloader(self) -> "DataLoader[Any]":
        return _loader(self.splits["test"], max(self.batch_size, 2500))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        mean, deviation = (torch.tensor(one, device=images.device).view(3, 1, 1) for one in (MEAN, STANDARD_DEVIATION))
        images = (images.float() / 255 - mean) / deviation
        training = self.trainer is not None and self.trainer.training
        return (moved(images) if training else images), labels


def moved(images: Tensor, pixels: int = 4) -> Tensor:
    """Each image shifted by up to `pixels` either way, with zeros from outside, and mirrored, by chance."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (pixels,) * 4).permute(0, 2, 3, 1)
    down, right, mirrored = torch.randint(0, 2 * pixels + 1, (3, count, 1), device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = right + torch.where(mirrored % 2 == 1, columns.flip(1), columns)
    one = torch.arange(count, device=images.device)
    return padded[one[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def read_batches(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images as bytes of shape `(count, 3, 32, 32)`, and labels.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if a file holds something else.
    """
    found = [_read(folder / name) for name in names]
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def _read(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Name the folder in which {FOLDER} lies, unpacked (data_dir).")
    with path.open("rb") as file:
        content = _Plain(file, encoding="bytes").load()
    pixels, labels = numpy.asarray(content[b"data"]), torch.tensor(content[b"labels"])
    if pixels.dtype != numpy.uint8 or pixels.shape != (len(labels), 3 * SIDE * SIDE):
        raise ValueError(f"{path} should hold {len(labels):,} rows of 3,072 bytes, but holds {pixels.shape}.")
    return torch.from_numpy(pixels.copy()).view(-1, 3, SIDE, SIDE), labels


class _Plain(pickle.Unpickler):
    """Reads arrays, lists and numbers, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise ValueError(f"A file of CIFAR-10 needs no {module}.{name}: this one is not to be trusted.")
        return super().find_class(module, name)


class _Batches(TensorDataset):
    """Fetches a whole batch by one indexing operation per tensor, instead of image by image."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def _loader(split: tuple[Tensor, Tensor], batch_size: int, shuffle: bool = False) -> "DataLoader[Any]":
    return DataLoader(_Batches(*split), batch_size, shuffle=shuffle, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch
