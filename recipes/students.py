"""Small networks for MNIST and larger ones to learn from, all of LeNet-5's form; none knows of compression."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, Metric

from .digits import Digits, Split
from .mnist import CLASSES, MNIST, LeNet5

LARGEST_DEGREES = 45.0


class MovedLeNet5(LeNet5):
    """LeNet-5 that is shown each training image turned, scaled and shifted by chance, and so sees more than there is.

    Args:
        learning_rate, weight_decay: as of `LeNet5`.
        degrees: largest turn either way.
        shift: largest shift either way, as a fraction of the image.
        scale: largest change of size either way, as a fraction.
    """

    def __init__(
        self,
        learning_rate: float = 0.002,
        weight_decay: float = 0.0,
        degrees: float = 12.0,
        shift: float = 0.08,
        scale: float = 0.12,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.degrees, self.shift, self.scale = degrees, shift, scale

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        chance = torch.rand(4, len(images), device=images.device) * 2 - 1
        size = 1 + self.scale * chance[1]
        moved = turned(images, self.degrees * chance[0], size, 2 * self.shift * chance[2:].T)
        return super().training_step((moved, labels), batch_idx)


class DeepLeNet5(MovedLeNet5):
    """LeNet-5 of twice as many convolutions, with BatchNorm and dropout: 831,642 parameters, and shown moved images.

    Arguments are those of `MovedLeNet5`, and `dropout`, the chance that a unit before the last layer is left out.
    """

    def __init__(
        self,
        learning_rate: float = 0.002,
        weight_decay: float = 0.0,
        degrees: float = 12.0,
        shift: float = 0.08,
        scale: float = 0.12,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(learning_rate, weight_decay, degrees, shift, scale)
        layers = {
            "conv1": (*_convolution(1, 16), *_convolution(16, 16)),
            "conv2": (*_convolution(16, 32), *_convolution(32, 64)),
            "fc1": (nn.Linear(64 * 7 * 7, 256, bias=False), nn.BatchNorm1d(256)),
            "fc2": (nn.Dropout(dropout), nn.Linear(256, CLASSES)),
        }
        for name, several in layers.items():
            self.add_module(name, nn.Sequential(*several))


class NarrowLeNet5(LeNet5):
    """LeNet-5 with fewer channels: 8,474 parameters by default, 2 % of those of `LeNet5`, under the same names.

    Args:
        learning_rate, weight_decay: as of `LeNet5`.
        label_smoothing: share of each label that is spread over all classes, in [0, 1].
        channels: of the two convolutions.
        hidden: units between them and the output.
        outputs: of the last layer.
    """

    def __init__(
        self,
        learning_rate: float = 0.002,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        channels: Sequence[int] = (6, 12),
        hidden: int = 32,
        outputs: int = CLASSES,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.label_smoothing = label_smoothing
        self.conv1 = nn.Conv2d(1, channels[0], kernel_size=5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel_size=5)
        self.fc1 = nn.Linear(channels[1] * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)
        return loss


class Perceptron(NarrowLeNet5):
    """A hidden layer instead of convolutions: 38,170 parameters by default.

    Args:
        learning_rate, weight_decay, label_smoothing: as of `NarrowLeNet5`.
        hidden: units between the pixels and the output.
    """

    def __init__(
        self,
        learning_rate: float = 0.002,
        weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        hidden: int = 48,
    ) -> None:
        super().__init__(learning_rate, weight_decay, label_smoothing, hidden=hidden)
        del self.conv1, self.conv2
        self.fc1 = nn.Linear(28 * 28, hidden)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(self.fc1(images.flatten(1)).relu())  # type: ignore[no-any-return]


class Parity(NarrowLeNet5):
    """The narrow network with two outputs: is the digit even (0) or odd (1)? Its batches are those of `MNIST`."""

    def __init__(self, learning_rate: float = 0.002, weight_decay: float = 0.0) -> None:
        super().__init__(learning_rate, weight_decay, outputs=2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images, labels % 2), batch_idx)

    def _evaluate(self, batch: tuple[Tensor, Tensor], **metrics: Metric) -> None:
        images, labels = batch
        super()._evaluate((images, labels % 2), **metrics)


class Angle(NarrowLeNet5):
    """By how much an image is turned: one output, in units of `LARGEST_DEGREES`; the loss is the squared error.

    Args:
        learning_rate, weight_decay, channels, hidden: as of `NarrowLeNet5`; (20, 50) and 500 make it as large as
            `LeNet5`, but for the last layer.

    Logs `train_loss`; `val_degrees` and `test_degrees`, the mean absolute error.
    """

    def __init__(
        self,
        learning_rate: float = 0.002,
        weight_decay: float = 0.0,
        channels: Sequence[int] = (6, 12),
        hidden: int = 32,
    ) -> None:
        super().__init__(learning_rate, weight_decay, channels=channels, hidden=hidden, outputs=1)
        self.val_degrees, self.test_degrees = MeanAbsoluteError(), MeanAbsoluteError()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, angles = batch
        loss = nn.functional.mse_loss(self(images), angles)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(batch, "val_degrees", self.val_degrees)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(batch, "test_degrees", self.test_degrees)

    def _measure(self, batch: tuple[Tensor, Tensor], name: str, metric: Metric) -> None:
        images, angles = batch
        metric.update(LARGEST_DEGREES * self(images), LARGEST_DEGREES * angles)
        self.log(name, metric, on_step=False, on_epoch=True)


class TurnedMNIST(MNIST):
    """MNIST turned: each image by an angle of its own, drawn once, as `(images, angles)`.

    The angles have shape `(batch, 1)`, in units of `LARGEST_DEGREES`, evenly from -1 to 1. Arguments are those of
    `MNIST`; `seed` also draws the angles. How much a digit leans by itself cannot be told from how it was turned.
    """

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, angles = batch
        return turned(images, LARGEST_DEGREES * angles.squeeze(1)), angles

    def _read(self) -> Digits:
        digits, chance = super()._read(), torch.Generator().manual_seed(self.seed)
        splits = (digits.train, digits.validation, digits.test)
        train, validation, test = (Split(one.images, _angles(len(one), chance)) for one in splits)
        return replace(digits, train=train, validation=validation, test=test)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """A convolution of 3x3 that keeps the size of images, BatchNorm and ReLU."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def _angles(count: int, chance: torch.Generator) -> Tensor:
    return torch.rand(count, 1, generator=chance) * 2 - 1


def turned(images: Tensor, degrees: Tensor, size: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Images turned about their middle, each by its own angle; what comes in at the edges repeats the border.

    Args:
        images: shape `(batch, channels, height, width)`.
        degrees: shape `(batch,)`.
        size: by which the distance between two places of the original is multiplied, shape `(batch,)`.
        shift: of the original, shape `(batch, 2)`, in halves of the image.
    """
    radians = degrees * (math.pi / 180)
    size = torch.ones_like(radians) if size is None else size
    shift = radians.new_zeros(len(radians), 2) if shift is None else shift
    cosine, sine = size * radians.cos(), size * radians.sin()
    rows = (torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1))
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
